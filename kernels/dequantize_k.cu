// Stored weights of super-blocks of 256 values ("K-quants") to bf16 or f32.
//
// blocks (rows, columns) in the stored type, row after row -> out (rows, columns), row stride out_stride.
// dequantize_rows_*: row i of out is row row_index[i] of blocks (an embedding looked up).
// Layouts (d and dmin are f16; 2-bit levels: value 128 h + 32 j + l in bits 2j of byte 32 h + l; 4-bit levels: value 64 j + l in the
// low and 64 j + 32 + l in the high half of byte 32 j + l, for l < 32):
//   Q2_K  16 scales (low half) and minima (high half), 64 bytes of levels, d, dmin    v = (d s) q - dmin m, runs of 16
//   Q3_K  32 bytes of third bits, 64 bytes of levels, 12 of 6-bit scales, d           v = (d (s - 32)) (q - 4), runs of 16
//   Q4_K  d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of levels           v = (d s) q - dmin m, runs of 32
//   Q5_K  as Q4_K, with 32 bytes of fifth bits before the levels
//   Q6_K  128 bytes of low and 64 of high bits, 16 signed scales, d                   v = (d s) (q - 32), runs of 16
// f32 results are the CPU's, bit for bit but for the sign of a zero; bf16 ones are those rounded to nearest even.
//
// Launch rule: see dequantize.cuh. `blocks` is 16-byte aligned; columns are a multiple of 256, out_stride of 8.
// CPU twin: engine/src/model/weights.rs. Source: the block structs of llama.cpp's ggml-common.h.

#include "dequantize.cuh"

// ---------------------------------------------------------------- device helpers

namespace {

using namespace dequantization;

// v = (d s) q - (dmin m) for the scales at `d`.
__device__ __forceinline__ void scale_and_lower(uint2 levels, const uint8_t* d, int scale, int minimum, float (&values)[GROUP]) {
    scale_and_add(levels, load_half(d) * float(scale), -(load_half(d + 2) * float(minimum)), values);
}

// Scale and minimum of run `run` of 8: six bits each; those of runs 4 to 7 are in the unused bits of the others.
__device__ __forceinline__ void scale_and_minimum(const uint8_t* packed, unsigned run, int& scale, int& minimum) {
    int first = packed[run & 3], second = packed[4 + (run & 3)], third = packed[8 + (run & 3)];
    scale = run < 4 ? first & 63 : (third & 15) | first >> 6 << 4;
    minimum = run < 4 ? second & 63 : third >> 4 | second >> 6 << 4;
}

struct Q2_K {
    static constexpr int VALUES = 256, BYTES = 84;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        uint2 levels = load_bytes<4>(block + 16 + first / 128 * 32 + first % 32);
        levels = shift_and_mask(levels, first % 128 / 32 * 2, 0x03030303);
        const int scales = block[first / 16];
        scale_and_lower(levels, block + 80, scales & 15, scales >> 4, values);
    }
};

struct Q3_K {
    static constexpr int VALUES = 256, BYTES = 110;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        uint2 low = load_bytes<2>(block + 32 + first / 128 * 32 + first % 32);
        uint2 high = load_bytes<2>(block + first % 32);
        low = shift_and_mask(low, first % 128 / 32 * 2, 0x03030303);
        high = shift_and_mask(high, first / 32, 0x01010101);
        const uint2 levels = make_uint2(low.x | high.x << 2, low.y | high.y << 2);
        const unsigned run = first / 16;
        const int scale = (block[96 + run % 8] >> (run < 8 ? 0 : 4) & 15) | (block[104 + run % 4] >> run / 4 * 2 & 3) << 4;
        scale_bytes<false>(levels, load_half(block + 108) * float(scale - 32), 4.0f, values);
    }
};

struct Q4_K {
    static constexpr int VALUES = 256, BYTES = 144;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        const unsigned run = first / 32;
        int scale, minimum;
        scale_and_minimum(block + 4, run, scale, minimum);
        const uint2 levels = load_bytes<8>(block + 16 + run / 2 * 32 + first % 32);
        scale_and_lower(shift_and_mask(levels, run % 2 * 4, 0x0f0f0f0f), block, scale, minimum, values);
    }
};

struct Q5_K {
    static constexpr int VALUES = 256, BYTES = 176;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        const unsigned run = first / 32;
        int scale, minimum;
        scale_and_minimum(block + 4, run, scale, minimum);
        uint2 low = load_bytes<8>(block + 48 + run / 2 * 32 + first % 32);
        uint2 high = load_bytes<8>(block + 16 + first % 32);
        low = shift_and_mask(low, run % 2 * 4, 0x0f0f0f0f);
        high = shift_and_mask(high, run, 0x01010101);
        scale_and_lower(make_uint2(low.x | high.x << 4, low.y | high.y << 4), block, scale, minimum, values);
    }
};

struct Q6_K {
    static constexpr int VALUES = 256, BYTES = 210;
    static __device__ __forceinline__ void decode(const uint8_t* block, unsigned first, float (&values)[GROUP]) {
        // Of 128 values, the four runs of 32 are the low halves of 64 bytes, then their high halves.
        const unsigned half = first / 128, run = first % 128 / 32;
        uint2 low = load_bytes<2>(block + half * 64 + run % 2 * 32 + first % 32);
        uint2 high = load_bytes<2>(block + 128 + half * 32 + first % 32);
        low = shift_and_mask(low, run / 2 * 4, 0x0f0f0f0f);
        high = shift_and_mask(high, run * 2, 0x03030303);
        const int scale = int8_t(block[192 + first / 16]);
        scale_bytes<false>(make_uint2(low.x | high.x << 4, low.y | high.y << 4), load_half(block + 208) * float(scale), 32.0f, values);
    }
};

}  // namespace

// ---------------------------------------------------------------- kernels

DEQUANTIZE_KERNELS(q2_k, Q2_K)
DEQUANTIZE_KERNELS(q3_k, Q3_K)
DEQUANTIZE_KERNELS(q4_k, Q4_K)
DEQUANTIZE_KERNELS(q5_k, Q5_K)
DEQUANTIZE_KERNELS(q6_k, Q6_K)
