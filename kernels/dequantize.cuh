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

// The lower (shift 0) or upper (shift 4) halves of eight bytes, or any bits that `mask` leaves.
__device__ __forceinline__ uint2 shift_and_mask(uint2 bytes, int shift, uint32_t mask) {
    return make_uint2(bytes.x >> shift & mask, bytes.y >> shift & mask);
}

// v = scale (q - bias) or scale q + term for eight bytes q. A scale has 19 bits at most and a level 8, so that their product is exact in f32 and
// one fused operation rounds as the CPU's two do.
//
// A float whose second byte from above is q < 128 below the bits of 128.0 is 128 + q; one whose third is q below those of 2^15 is
// 2^15 + q. What has no term is then one operation a value: (base + bias) scale is exact too.
template <bool WHOLE_BYTES>
__device__ __forceinline__ void scale_bytes(uint2 bytes, float scale, float bias, float (&values)[GROUP]) {
    constexpr float BASE = WHOLE_BYTES ? 32768.0f : 128.0f;
    const float below = -(BASE + bias) * scale;
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        const uint32_t word = i < 4 ? bytes.x : bytes.y;
        const uint32_t bits = WHOLE_BYTES ? __byte_perm(word, 0x47000000, 0x7604 | (i & 3) << 4)
                                          : __byte_perm(word, 0x43000000, 0x7054 | (i & 3) << 8);
        values[i] = fmaf(__uint_as_float(bits), scale, below);
    }
}

__device__ __forceinline__ void scale_and_add(uint2 bytes, float scale, float term, float (&values)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        const uint32_t bits = __byte_perm(i < 4 ? bytes.x : bytes.y, 0x43000000, 0x7054 | (i & 3) << 8);
        values[i] = fmaf(__uint_as_float(bits) - 128.0f, scale, term);
    }
}

// The first row and column of a chunk of a matrix whose columns are a multiple of 8.
__device__ __forceinline__ void chunk_start(unsigned chunk, int columns, unsigned& row, unsigned& column) {
    const unsigned first_group = chunk * (CHUNK / GROUP), groups = unsigned(columns) / GROUP;
    row = first_group / groups;
    column = (first_group - row * groups) * GROUP;
}

// Row and column of a value `at` values further.
__device__ __forceinline__ void move_on(unsigned at, int columns, unsigned& row, unsigned& column) {
    column += at;
    while (column >= unsigned(columns)) {
        column -= columns;
        row++;
    }
}

// Copies bytes to shared memory, which keeps their alignment to 16 and so must have room for 15 more; where they lie then.
__device__ __forceinline__ const uint8_t* stage(uint8_t* shared, const uint8_t* source, int bytes) {
    int shift = int(reinterpret_cast<uintptr_t>(source) & 15);
    uint8_t* staged = shared + shift;
    int head = min((16 - shift) & 15, bytes);
    int whole = (bytes - head) / 16;
    int tail = bytes - head - 16 * whole;
#pragma unroll 1
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
    constexpr int CHUNK_BYTES = CHUNK / Format::VALUES * Format::BYTES;
    static_assert(CHUNK % Format::VALUES == 0 && CHUNK_BYTES % 16 == 0, "a chunk is whole blocks and begins at 16 bytes");
    __shared__ alignas(16) uint8_t shared[CHUNK_BYTES + 16];
    const uint8_t* source = blocks + size_t(blockIdx.x) * CHUNK_BYTES;
    unsigned count = CHUNK;
    if (blockIdx.x < gridDim.x - 1) {
#pragma unroll
        for (int i = 0; i < (CHUNK_BYTES / 16 + THREADS - 1) / THREADS; i++) {
            const int unit = i * THREADS + threadIdx.x;
            if (CHUNK_BYTES / 16 % THREADS == 0 || unit < CHUNK_BYTES / 16) {
                reinterpret_cast<uint4*>(shared)[unit] = __ldcs(reinterpret_cast<const uint4*>(source) + unit);
            }
        }
        __syncthreads();
    } else {
        count = unsigned(size_t(rows) * columns - size_t(blockIdx.x) * CHUNK);
        stage(shared, source, count / Format::VALUES * Format::BYTES);
    }
    unsigned first_row, first_column;
    chunk_start(blockIdx.x, columns, first_row, first_column);
#pragma unroll
    for (int i = 0; i < CHUNK / GROUP / THREADS; i++) {
        const unsigned at = (i * THREADS + threadIdx.x) * GROUP;
        if (at < count) {
            unsigned row = first_row, column = first_column;
            move_on(at, columns, row, column);
            float values[GROUP];
            Format::decode(shared + at / Format::VALUES * Format::BYTES, at % Format::VALUES, values);
            store(out + row * size_t(out_stride) + column, pack<T>(values));
        }
    }
}

template <class Format, class T>
__device__ __forceinline__ void dequantize_rows(
    T* out, long long out_stride, const uint8_t* blocks, const int* row_index, int rows, int columns) {
    __shared__ alignas(16) uint8_t shared[CHUNK / Format::VALUES * Format::BYTES + 16];
    int start = blockIdx.y * CHUNK;
    const unsigned count = min(columns - start, CHUNK);
    size_t row_bytes = size_t(columns / Format::VALUES) * Format::BYTES;
    const uint8_t* source = blocks + size_t(row_index[blockIdx.x]) * row_bytes + size_t(start / Format::VALUES) * Format::BYTES;
    const uint8_t* staged = stage(shared, source, count / Format::VALUES * Format::BYTES);
    T* row = out + size_t(blockIdx.x) * out_stride + start;
    for (unsigned at = threadIdx.x * GROUP; at < count; at += THREADS * GROUP) {
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
