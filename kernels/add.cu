// Adds into the residual stream: y += x.
//
// Shapes: y and x (rows, width). Added in f32.
// Launch rule: flat (common.cuh).
// CPU twin: engine/src/ops/add.rs.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

template <typename T>
__device__ __forceinline__ void add(T* __restrict__ y, long long y_stride, const T* __restrict__ x, long long x_stride, int rows,
                                    int width) {
    const Place place = flat_place(width);
    if (place.row >= unsigned(rows)) {
        return;
    }
    const int left = width - place.column;
    const T* x_at = x + place.row * size_t(x_stride) + place.column;
    T* y_at = y + place.row * size_t(y_stride) + place.column;
    const auto x_group = load_part(x_at, left, is_aligned(x_at));
    const auto y_group = load_part(static_cast<const T*>(y_at), left, is_aligned(y_at));
    float values[GROUP], sum[GROUP];
    unpack(x_group, values);
    unpack(y_group, sum);
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        sum[i] += values[i];
    }
    store_part(y_at, left, is_aligned(y_at), sum);
}

}  // namespace

// ---------------------------------------------------------------- kernels

extern "C" __global__ void add_bf16(bf16* y, long long y_stride, const bf16* x, long long x_stride, int rows, int width) {
    add(y, y_stride, x, x_stride, rows, width);
}

extern "C" __global__ void add_f32(float* y, long long y_stride, const float* x, long long x_stride, int rows, int width) {
    add(y, y_stride, x, x_stride, rows, width);
}
