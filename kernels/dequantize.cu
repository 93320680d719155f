// Stored weights of plain numbers and of blocks of 32 values to bf16 or f32.
//
// blocks (rows, columns) in the stored type, row after row -> out (rows, columns), row stride out_stride.
// dequantize_rows_*: row i of out is row row_index[i] of blocks (an embedding looked up).
// Layouts (scales d and minima m are f16; a byte of levels holds value i in its low half and value i + 16 in its high one):
//   F32, F16, BF16  the numbers
//   Q4_0    d, 16 bytes of levels                      v = d (q - 8)
//   Q4_1    d, m, 16 bytes of levels                   v = d q + m
//   Q5_0    d, 32 fifth bits, 16 bytes of levels       v = d (q - 16)
//   Q5_1    d, m, 32 fifth bits, 16 bytes of levels    v = d q + m
//   Q8_0    d, 32 signed bytes                         v = d q
//   IQ4_NL  d, 16 bytes of levels                      v = d LEVELS[q]
// f32 results are the CPU's, bit for bit but for the sign of a zero; bf16 ones are those rounded to nearest even.
//
// Launch rule: see dequantize.cuh. `blocks` is 16-byte aligned; columns are a multiple of the block, out_stride of 8.
// CPU twin: engine/src/model/weights.rs. Source: the block structs of llama.cpp's ggml-common.h.

#include "dequantize.cuh"

// ---------------------------------------------------------------- device helpers

namespace {

using namespace dequantization;

// Levels first .. first + 8 of the 16 bytes at `levels`.
template <int ALIGNMENT>
__device__ __forceinline__ uint2 half_bytes(const uint8_t* levels, unsigned first) {
    return shift_and_mask(load_bytes<ALIGNMENT>(levels + (first & 15)), first & 16 ? 4 : 0, 0x0f0f0f0f);
}

// Levels first .. first + 8 with the fifth bits, one a value, at `fifth`.
template <int ALIGNMENT>
__device__ __forceinline__ uint2 five_bits(const uint8_t* fifth, const uint8_t* levels, unsigned first) {
    uint2 low = half_bytes<ALIGNMENT>(levels, first);
    uint32_t high = fifth[first / 8];
    // Bit i of four to bit 4 of byte i: the factor adds copies moved by 4, 11, 18 and 25, no two on one bit of the mask.
    low.x |= (high & 15) * 0x02040810u & 0x10101010;
    low.y |= (high >> 4) * 0x02040810u & 0x10101010;
    return low;
}

struct Q4_0 {
    static constexpr int VALUES = 32, BYTES = 18;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        scale_bytes<false>(half_bytes<2>(block + 2, first), load_half(block), 8.0f, values);
    }
};

struct Q4_1 {
    static constexpr int VALUES = 32, BYTES = 20;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        scale_and_add(half_bytes<4>(block + 4, first), load_half(block), load_half(block + 2), values);
    }
};

struct Q5_0 {
    static constexpr int VALUES = 32, BYTES = 22;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        scale_bytes<false>(five_bits<2>(block + 2, block + 6, first), load_half(block), 16.0f, values);
    }
};

struct Q5_1 {
    static constexpr int VALUES = 32, BYTES = 24;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        scale_and_add(five_bits<8>(block + 4, block + 8, first), load_half(block), load_half(block + 2), values);
    }
};

struct Q8_0 {
    static constexpr int VALUES = 32, BYTES = 34;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        uint2 bytes = load_bytes<2>(block + 2 + first);
        // A signed byte with its highest bit turned is itself + 128.
        scale_bytes<true>(make_uint2(bytes.x ^ 0x80808080, bytes.y ^ 0x80808080), load_half(block), 128.0f, values);
    }
};

struct IQ4_NL {
    static constexpr int VALUES = 32, BYTES = 18;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        uint2 levels = half_bytes<2>(block + 2, first);
        scale_bytes<true>(make_uint2(look_up(levels.x), look_up(levels.y)), load_half(block), 128.0f, values);
    }

    // Each of four indices below 16 to its level + 128: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113.
    static __device__ __forceinline__ uint32_t look_up(uint32_t indices) {
        uint32_t pairs = (indices | indices >> 4) & 0x00ff00ff;
        uint32_t selector = (pairs | pairs >> 8) & 0x7777;
        uint32_t below = __byte_perm(0x3f2d1801, 0x766a5d4f, selector);
        uint32_t above = __byte_perm(0xa6998d81, 0xf1d9c5b5, selector);
        uint32_t is_above = (indices >> 3 & 0x01010101) * 0xff;
        return (below & ~is_above) | (above & is_above);
    }
};

template <class Stored, class T>
__device__ __forceinline__ void convert_matrix(T* out, long long out_stride, const uint8_t* blocks, int rows, int columns) {
    const Stored* stored = reinterpret_cast<const Stored*>(blocks) + size_t(blockIdx.x) * CHUNK;
    const unsigned count = unsigned(min(size_t(rows) * columns - size_t(blockIdx.x) * CHUNK, size_t(CHUNK)));
    if (columns % GROUP == 0) {
        unsigned first_row, first_column;
        chunk_start(blockIdx.x, columns, first_row, first_column);
#pragma unroll
        for (int i = 0; i < CHUNK / GROUP / THREADS; i++) {
            const unsigned at = (i * THREADS + threadIdx.x) * GROUP;
            if (at < count) {
                unsigned row = first_row, column = first_column;
                move_on(at, columns, row, column);
                float values[GROUP];
                unpack(load(stored + at), values);
                store(out + row * size_t(out_stride) + column, pack<T>(values));
            }
        }
    } else {
        for (unsigned at = threadIdx.x; at < count; at += THREADS) {
            const size_t index = size_t(blockIdx.x) * CHUNK + at, row = index / unsigned(columns);
            out[row * out_stride + (index - row * columns)] = from_f32<T>(to_f32(stored[at]));
        }
    }
}

template <class Stored, class T>
__device__ __forceinline__ void convert_rows(
    T* out, long long out_stride, const uint8_t* blocks, const int* row_index, int rows, int columns) {
    const Stored* stored = reinterpret_cast<const Stored*>(blocks) + size_t(row_index[blockIdx.x]) * columns;
    T* row = out + size_t(blockIdx.x) * out_stride;
    int end = min(columns, int(blockIdx.y + 1) * CHUNK);
    for (int at = blockIdx.y * CHUNK + threadIdx.x * GROUP; at < end; at += THREADS * GROUP) {
        float values[GROUP];
        load_part(stored + at, end - at, columns % GROUP == 0, values);
        store_part(row + at, end - at, true, values);
    }
}

}  // namespace

// ---------------------------------------------------------------- kernels

#define CONVERT_KERNELS(NAME, STORED, SUFFIX, T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_##NAME##_##SUFFIX(                                          \
        T* out, long long out_stride, const uint8_t* blocks, int rows, int columns) {                                            \
        convert_matrix<STORED>(out, out_stride, blocks, rows, columns);                                                          \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_rows_##NAME##_##SUFFIX(                                     \
        T* out, long long out_stride, const uint8_t* blocks, const int* row_index, int rows, int columns) {                      \
        convert_rows<STORED>(out, out_stride, blocks, row_index, rows, columns);                                                 \
    }

CONVERT_KERNELS(f32, float, bf16, bf16)
CONVERT_KERNELS(f32, float, f32, float)
CONVERT_KERNELS(f16, f16, bf16, bf16)
CONVERT_KERNELS(f16, f16, f32, float)
CONVERT_KERNELS(bf16, bf16, bf16, bf16)
CONVERT_KERNELS(bf16, bf16, f32, float)

DEQUANTIZE_KERNELS(q4_0, Q4_0)
DEQUANTIZE_KERNELS(q4_1, Q4_1)
DEQUANTIZE_KERNELS(q5_0, Q5_0)
DEQUANTIZE_KERNELS(q5_1, Q5_1)
DEQUANTIZE_KERNELS(q8_0, Q8_0)
DEQUANTIZE_KERNELS(iq4_nl, IQ4_NL)
