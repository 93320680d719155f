// bitsandbytes' NF4 to bf16 or f32.
//
// packed: two codes a byte, the first in the high half, along the flattened (rows, columns); a run of 64 codes shares an absmax.
// -> out (rows, columns), row stride out_stride: v = LEVELS[code] absmax.
// dequantize_nf4_*: absmax (ceil(rows columns / 64)) in f32.
// dequantize_nf4_double_*: absmax[i] = code_map[absmax_codes[i]] nested_absmax[i / 256] + offset; code_map (256).
// f32 results are the CPU's, bit for bit; bf16 ones are those rounded to nearest even.
//
// dequantize_nf4_group_*: up to three of the latter at once, as many blocks as they have chunks.
//
// Launch rule: see dequantize.cuh (whole matrices). `packed` is 16-byte aligned, out_stride a multiple of 8; columns need not be one.
// CPU twin: engine/src/quant/nf4.rs. Source: bitsandbytes, csrc/kernels.cu (kDequantizeBlockwise); QLoRA (2305.14314), appendix E.

#include "dequantize.cuh"

// ---------------------------------------------------------------- device helpers

namespace {

using namespace dequantization;

constexpr int LEVEL_COUNT = 16;
// Values that share an absmax, and absmax that share a nested one.
constexpr int BLOCK = 64, NESTED_BLOCK = 256;

// The same numbers stand in engine/src/quant/nf4.rs.
__constant__ float LEVELS[LEVEL_COUNT] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

struct Single {
    const float* absmax;
    __device__ __forceinline__ float operator()(unsigned block) const { return __ldg(absmax + block); }
};

struct Double {
    const uint8_t* codes;
    const float* code_map;
    const float* nested_absmax;
    float offset;
    __device__ __forceinline__ float operator()(unsigned block) const {
        float scaled = __fmul_rn(__ldg(code_map + __ldg(codes + block)), __ldg(nested_absmax + block / NESTED_BLOCK));
        return __fadd_rn(scaled, offset);
    }
};

template <class Absmax, class T>
__device__ __forceinline__ void dequantize_nf4(
    T* out, long long out_stride, const uint8_t* packed, Absmax absmax, unsigned chunk, int rows, int columns) {
    constexpr int GROUPS = CHUNK / GROUP / THREADS;
    // Sixteen words lie in sixteen banks: any two lanes read other banks or the same word.
    __shared__ float levels[LEVEL_COUNT];
    const size_t start = size_t(chunk) * CHUNK;
    const unsigned count = unsigned(min(size_t(rows) * columns - start, size_t(CHUNK)));
    packed += start / 2;
    const bool whole_groups = columns % GROUP == 0;
    uint32_t codes[GROUPS];
    float factors[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const unsigned at = (i * THREADS + threadIdx.x) * GROUP;
        if (whole_groups && at < count) {
            codes[i] = __ldcs(reinterpret_cast<const uint32_t*>(packed) + at / GROUP);
            factors[i] = absmax(chunk * (CHUNK / BLOCK) + at / BLOCK);
        }
    }
    if (threadIdx.x < LEVEL_COUNT) {
        levels[threadIdx.x] = LEVELS[threadIdx.x];
    }
    __syncthreads();
    if (whole_groups) {
        unsigned first_row, first_column;
        chunk_start(chunk, columns, first_row, first_column);
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            const unsigned at = (i * THREADS + threadIdx.x) * GROUP;
            if (at < count) {
                unsigned row = first_row, column = first_column;
                move_on(at, columns, row, column);
                float values[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; j++) {
                    values[j] = levels[codes[i] >> (4 * (j ^ 1)) & 15] * factors[i];
                }
                store(out + row * size_t(out_stride) + column, pack<T>(values));
            }
        }
    } else {
        for (unsigned at = threadIdx.x; at < count; at += THREADS) {
            const size_t row = (start + at) / unsigned(columns);
            const int code = packed[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15;
            const float value = levels[code] * absmax(chunk * (CHUNK / BLOCK) + at / BLOCK);
            out[row * out_stride + (start + at - row * columns)] = from_f32<T>(value);
        }
    }
}

}  // namespace

constexpr int MAX_MATRICES = 3;

// Matrices with double-quantized factors; engine/src/ops/cuda/dequantize.rs holds the same structs.
struct Nf4Matrix {
    void* out;
    long long out_stride;
    const uint8_t* packed;
    const uint8_t* absmax_codes;
    const float* code_map;
    const float* nested_absmax;
    float offset;
    int rows, columns;
    // Chunks of the matrices before this one.
    int first_chunk;
};

struct Nf4Group {
    Nf4Matrix matrices[MAX_MATRICES];
    int count;
};

// ---------------------------------------------------------------- kernels

#define NF4_KERNELS(SUFFIX, T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_nf4_##SUFFIX(                                                  \
        T* out, long long out_stride, const uint8_t* packed, const float* absmax, int rows, int columns) {                          \
        dequantize_nf4(out, out_stride, packed, Single{absmax}, blockIdx.x, rows, columns);                                         \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_nf4_double_##SUFFIX(                                           \
        T* out, long long out_stride, const uint8_t* packed, const uint8_t* absmax_codes, const float* code_map,                    \
        const float* nested_absmax, float offset, int rows, int columns) {                                                          \
        dequantize_nf4(out, out_stride, packed, Double{absmax_codes, code_map, nested_absmax, offset}, blockIdx.x, rows, columns);  \
    }                                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_nf4_group_##SUFFIX(const __grid_constant__ Nf4Group group) {   \
        int index = 0;                                                                                                              \
        while (index + 1 < group.count && int(blockIdx.x) >= group.matrices[index + 1].first_chunk) {                               \
            index++;                                                                                                                \
        }                                                                                                                           \
        const Nf4Matrix& matrix = group.matrices[index];                                                                            \
        const Double absmax = {matrix.absmax_codes, matrix.code_map, matrix.nested_absmax, matrix.offset};                          \
        dequantize_nf4(static_cast<T*>(matrix.out), matrix.out_stride, matrix.packed, absmax, blockIdx.x - matrix.first_chunk,      \
                       matrix.rows, matrix.columns);                                                                                \
    }

NF4_KERNELS(bf16, bf16)
NF4_KERNELS(f32, float)
