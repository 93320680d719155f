// Embedding rows of tokens from a table in bf16, f16 or f32. The table is frozen and nothing stands below it: no backward.
//
// Shapes: table (V, width) contiguous, tokens (rows), y (rows, width). Every token must be a row of the table.
// Launch rule: flat (common.cuh).
// CPU twin: engine/src/ops/embedding.rs.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

template <typename S, typename T>
__device__ __forceinline__ void embedding(T* __restrict__ y, long long y_stride, const S* __restrict__ table,
                                          const int* __restrict__ tokens, int rows, int width) {
    const Place place = flat_place(width);
    if (place.row >= unsigned(rows)) {
        return;
    }
    const int left = width - place.column;
    const S* from = table + size_t(tokens[place.row]) * unsigned(width) + place.column;
    T* to = y + place.row * size_t(y_stride) + place.column;
    float values[GROUP];
    load_part(from, left, is_aligned(from), values);
    store_part(to, left, is_aligned(to), values);
}

}  // namespace

// ---------------------------------------------------------------- kernels

#define EMBEDDING(S, TABLE, T, NAME)                                                                                            \
    extern "C" __global__ void embedding_##TABLE##_##NAME(T* y, long long y_stride, const S* table, const int* tokens,          \
                                                          int rows, int width) {                                                \
        embedding(y, y_stride, table, tokens, rows, width);                                                                     \
    }

EMBEDDING(bf16, bf16, bf16, bf16)
EMBEDDING(f16, f16, bf16, bf16)
EMBEDDING(float, f32, bf16, bf16)
EMBEDDING(bf16, bf16, float, f32)
EMBEDDING(f16, f16, float, f32)
EMBEDDING(float, f32, float, f32)
