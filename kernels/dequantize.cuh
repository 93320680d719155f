// What the files dequantize*.cu share: stored blocks go through shared memory, so that blocks of 18 or 210 bytes too are read from
// device memory 16 bytes at a time; a thread then decodes 8 neighbouring values and writes them 16 bytes at a time.
//
// Launch rule of every kernel that reads whole matrices: grid (ceil(rows * columns / CHUNK)), block (THREADS).
// Launch rule of every kernel that looks rows up:        grid (rows, ceil(columns / CHUNK)), block (THREADS).
// No dynamic shared memory. CHUNK and THREADS also stand in engine/src/ops/cuda/dequantize.rs.

#pragma once

#include "common.cuh"

namespace dequantization {

// A kernel's matrix of values, and what one of its blocks of threads writes of it.
constexpr int CHUNK = 4096;
constexpr int THREADS = 256;

// ---------------------------------------------------------------- device helpers

// Eight bytes from a place with that alignment.
template <int ALIGNMENT>
__device__ __forceinline__ uint2 load_bytes(const uint8_t* at) {
    if constexpr (ALIGNMENT >= 8) {
        return *reinterpret_cast<const uint2*>(at);
    } else if constexpr (ALIGNMENT == 4) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(at);
        return make_uint2(words[0], words[1]);
    } else {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(at);
        return make_uint2(halves[0] | uint32_t(halves[1]) << 16, halves[2] | uint32_t(halves[3]) << 16);
    }
}

__device__ __forceinline__ float load_half(const uint8_t* at) {
    return to_f32(*reinterpret_cast<const f16*>(at));
}

// The bytes as floats, less `bias`, exactly: a float of 2^23 + b holds the byte b in its lowest bits.
__device__ __forceinline__ void bytes_to_floats(uint2 bytes, float bias, float (&values)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        uint32_t word = i < 4 ? bytes.x : bytes.y;
        values[i] = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7650 | (i & 3))) - (8388608.0f + bias);
    }
}

// The lower (shift 0) or upper (shift 4) halves of eight bytes, or any bits that `mask` leaves.
__device__ __forceinline__ uint2 shift_and_mask(uint2 bytes, int shift, uint32_t mask) {
    return make_uint2(bytes.x >> shift & mask, bytes.y >> shift & mask);
}

// Products and sums are rounded one by one, as the CPU rounds them: never contracted to fused operations.
__device__ __forceinline__ void scale_values(float (&values)[GROUP], float scale) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        values[i] = __fmul_rn(values[i], scale);
    }
}

__device__ __forceinline__ void scale_and_add(float (&values)[GROUP], float scale, float term) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        values[i] = __fadd_rn(__fmul_rn(values[i], scale), term);
    }
}

// Copies bytes to shared memory, which keeps their alignment to 16 and so must have room for 15 more; where they lie then.
__device__ __forceinline__ const uint8_t* stage(uint8_t* shared, const uint8_t* source, int bytes) {
    int shift = int(reinterpret_cast<uintptr_t>(source) & 15);
    uint8_t* staged = shared + shift;
    int head = min((16 - shift) & 15, bytes);
    int whole = (bytes - head) / 16;
    int tail = bytes - head - 16 * whole;
    for (int i = threadIdx.x; i < whole; i += THREADS) {
        reinterpret_cast<uint4*>(staged + head)[i] = __ldcs(reinterpret_cast<const uint4*>(source + head) + i);
    }
    if (int(threadIdx.x) < head) {
        staged[threadIdx.x] = source[threadIdx.x];
    }
    if (int(threadIdx.x) < tail) {
        int at = head + 16 * whole + threadIdx.x;
        staged[at] = source[at];
    }
    __syncthreads();
    return staged;
}

// ---------------------------------------------------------------- bodies of the kernels

// `Format` tells VALUES and BYTES of a block, and decodes values first .. first + 8 of one.


template <class Format, class T>
__device__ __forceinline__ void dequantize(T* out, long long out_stride, const uint8_t* blocks, int rows, int columns) {
    static_assert(CHUNK % Format::VALUES == 0, "a chunk is whole blocks");
    __shared__ alignas(16) uint8_t shared[CHUNK / Format::VALUES * Format::BYTES + 16];
    size_t start = size_t(blockIdx.x) * CHUNK;
    int count = int(min(size_t(rows) * columns - start, size_t(CHUNK)));
    size_t first_block = start / Format::VALUES;
    const uint8_t* staged =
        stage(shared, blocks + first_block * Format::BYTES, count / Format::VALUES * Format::BYTES);
    size_t first_row = start / unsigned(columns);
    unsigned first_column = unsigned(start - first_row * columns);
#pragma unroll
    for (int i = 0; i < CHUNK / GROUP / THREADS; i++) {
        int at = (i * THREADS + threadIdx.x) * GROUP;
        if (at < count) {
            unsigned row = (first_column + at) / unsigned(columns);
            unsigned column = (first_column + at) - row * columns;
            float values[GROUP];
            Format::decode(staged + at / Format::VALUES * Format::BYTES, at % Format::VALUES, values);
            store(out + (first_row + row) * out_stride + column, pack<T>(values));
        }
    }
}

template <class Format, class T>
__device__ __forceinline__ void dequantize_rows(
    T* out, long long out_stride, const uint8_t* blocks, const int* row_index, int rows, int columns) {
    __shared__ alignas(16) uint8_t shared[CHUNK / Format::VALUES * Format::BYTES + 16];
    int start = blockIdx.y * CHUNK;
    int count = min(columns - start, CHUNK);
    size_t row_bytes = size_t(columns / Format::VALUES) * Format::BYTES;
    const uint8_t* source = blocks + size_t(row_index[blockIdx.x]) * row_bytes + size_t(start / Format::VALUES) * Format::BYTES;
    const uint8_t* staged = stage(shared, source, count / Format::VALUES * Format::BYTES);
    T* row = out + size_t(blockIdx.x) * out_stride + start;
    for (int at = threadIdx.x * GROUP; at < count; at += THREADS * GROUP) {
        float values[GROUP];
        Format::decode(staged + at / Format::VALUES * Format::BYTES, at % Format::VALUES, values);
        store(row + at, pack<T>(values));
    }
}

}  // namespace dequantization

#define DEQUANTIZE_KERNELS_OF(NAME, FORMAT, SUFFIX, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(dequantization::THREADS) dequantize_##NAME##_##SUFFIX(                          \
        T* out, long long out_stride, const uint8_t* blocks, int rows, int columns) {                                            \
        dequantization::dequantize<FORMAT>(out, out_stride, blocks, rows, columns);                                              \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(dequantization::THREADS) dequantize_rows_##NAME##_##SUFFIX(                     \
        T* out, long long out_stride, const uint8_t* blocks, const int* row_index, int rows, int columns) {                      \
        dequantization::dequantize_rows<FORMAT>(out, out_stride, blocks, row_index, rows, columns);                              \
    }

// The four kernels of a stored type: whole matrices and rows, to bf16 and to f32.
#define DEQUANTIZE_KERNELS(NAME, FORMAT)                                                                                         \
    DEQUANTIZE_KERNELS_OF(NAME, FORMAT, bf16, bf16)                                                                              \
    DEQUANTIZE_KERNELS_OF(NAME, FORMAT, f32, float)
