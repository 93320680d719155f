// Device helpers that several kernels share: eight values of a row at a time, conversions, sums that are the same in every run.
//
// A row is read in groups of eight values: one 16-byte access for bf16 and f16, two for f32. Where a row's address is no multiple
// of 16, or fewer than eight values are left, the `_part` functions go value by value, so that one loop serves every size.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int WARP = 32;
// Values of a group.
constexpr int GROUP = 8;

// ---------------------------------------------------------------- conversions

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_f32(f16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ float from_f32<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_f32<f16>(float x) {
    return __float2half_rn(x);
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t f16_pair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// 2^x in one instruction; a result below 2^-126 is 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// ---------------------------------------------------------------- groups of eight

// Eight values as they lie in memory: kept like this they take half the registers of their f32 forms.
template <typename T>
struct Eight {
    uint4 words[sizeof(T) / 2];
};

__device__ __forceinline__ void unpack(const Eight<bf16>& group, float (&x)[GROUP]) {
    const uint32_t words[4] = {group.words[0].x, group.words[0].y, group.words[0].z, group.words[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void unpack(const Eight<f16>& group, float (&x)[GROUP]) {
    const uint32_t words[4] = {group.words[0].x, group.words[0].y, group.words[0].z, group.words[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void unpack(const Eight<float>& group, float (&x)[GROUP]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        x[4 * i] = __uint_as_float(group.words[i].x);
        x[4 * i + 1] = __uint_as_float(group.words[i].y);
        x[4 * i + 2] = __uint_as_float(group.words[i].z);
        x[4 * i + 3] = __uint_as_float(group.words[i].w);
    }
}

template <typename T>
__device__ __forceinline__ Eight<T> pack(const float (&x)[GROUP]);
template <>
__device__ __forceinline__ Eight<bf16> pack<bf16>(const float (&x)[GROUP]) {
    return {make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]))};
}
template <>
__device__ __forceinline__ Eight<f16> pack<f16>(const float (&x)[GROUP]) {
    return {make_uint4(f16_pair(x[0], x[1]), f16_pair(x[2], x[3]), f16_pair(x[4], x[5]), f16_pair(x[6], x[7]))};
}
template <>
__device__ __forceinline__ Eight<float> pack<float>(const float (&x)[GROUP]) {
    Eight<float> group;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        group.words[i] = make_uint4(__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]), __float_as_uint(x[4 * i + 2]),
                                    __float_as_uint(x[4 * i + 3]));
    }
    return group;
}

// Whether whole groups of a row that begins there can be read in 16-byte accesses.
__device__ __forceinline__ bool is_aligned(const void* row) { return (reinterpret_cast<uintptr_t>(row) & 15) == 0; }

// `from` is a multiple of 16 bytes, and eight values stand there.
template <typename T>
__device__ __forceinline__ Eight<T> load(const T* from) {
    Eight<T> group;
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) {
        group.words[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    return group;
}

template <typename T>
__device__ __forceinline__ void store(T* to, const Eight<T>& group) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) {
        reinterpret_cast<uint4*>(to)[i] = group.words[i];
    }
}

// The same for what is not needed again soon: the caches keep other things before it.
template <typename T>
__device__ __forceinline__ Eight<T> load_once(const T* from) {
    Eight<T> group;
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) {
        group.words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    }
    return group;
}

template <typename T>
__device__ __forceinline__ void store_once(T* to, const Eight<T>& group) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) {
        __stcs(reinterpret_cast<uint4*>(to) + i, group.words[i]);
    }
}

// The group at `from`, of which `left` values (any number) are in the row; the others are 0.
template <typename T>
__device__ __forceinline__ Eight<T> load_part(const T* from, int left, bool aligned) {
    if (aligned && left >= GROUP) {
        return load(from);
    }
    float x[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        x[i] = i < left ? to_f32(from[i]) : 0.0f;
    }
    return pack<T>(x);
}

template <typename T>
__device__ __forceinline__ void load_part(const T* from, int left, bool aligned, float (&x)[GROUP]) {
    unpack(load_part(from, left, aligned), x);
}

// Writes the first `left` values of a group, all eight where it is more.
template <typename T>
__device__ __forceinline__ void store_part(T* to, int left, bool aligned, const float (&x)[GROUP]) {
    if (aligned && left >= GROUP) {
        store(to, pack<T>(x));
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        if (i < left) {
            to[i] = from_f32<T>(x[i]);
        }
    }
}

// ---------------------------------------------------------------- flat grids

// Threads of a block of a flat grid; engine/src/ops/cuda names it too.
constexpr int FLAT_THREADS = 256;

// The group that a thread of a flat grid has: the groups of all rows one after the other, so that no row's end leaves threads idle.
// Launch rule "flat": ceil(rows * ceil(width / 8) / 256) blocks of 256 threads; fewer than 2^32 groups.
struct Place {
    unsigned row;
    // First column of the group.
    int column;
};

__device__ __forceinline__ Place flat_place(int width) {
    const unsigned index = blockIdx.x * FLAT_THREADS + threadIdx.x, groups = unsigned(width + GROUP - 1) / GROUP;
    const unsigned row = index / groups;
    return {row, int(index - row * groups) * GROUP};
}

// ---------------------------------------------------------------- sums and maxima

// Over all lanes of a warp, in every lane; all lanes take part.
template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

// Over all threads of a block, in every thread; whole warps in one dimension, and all threads take part.
template <typename V>
__device__ __forceinline__ V block_sum(V value) {
    __shared__ V parts[WARP];
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_sum(value);
    if (lane == 0) {
        parts[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = warp_sum(lane < warps ? parts[lane] : V(0));
    // The next call writes `parts` again.
    __syncthreads();
    return value;
}

__device__ __forceinline__ float block_max(float value) {
    __shared__ float parts[WARP];
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_max(value);
    if (lane == 0) {
        parts[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = warp_max(parts[lane < warps ? lane : 0]);
    __syncthreads();
    return value;
}
