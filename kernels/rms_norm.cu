// RMSNorm: rstd = 1 / sqrt(mean(x^2) + eps), y = x * rstd * w, over the last dimension.
//
// Backward, w being frozen: with g = dy * w and n = x * rstd, dx = rstd * (g - n * mean(g * n)), added to the gradient of the
// residual stream. It can write y again in the same pass, since it reads x anyway.
// Shapes: x, y, dy, dresidual (rows, width), w (width) in f32, rstd (rows) in f32. Sums in f32.
// Launch rule: a block a row; threads = ceil(width / 16) rounded up to whole warps, at most 512. Then each thread has two groups
// of eight and keeps them in registers; of wider rows (above 8192) the rest is read twice.
// CPU twin: engine/src/ops/rms_norm.rs. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

// Groups of a row that a thread keeps in registers.
constexpr int HELD = 2;
constexpr int MOST_THREADS = 512;

// First column of a thread's group of that number.
__device__ __forceinline__ int column_of(int number) { return (number * int(blockDim.x) + int(threadIdx.x)) * GROUP; }

// A row and whether it can be read in 16-byte accesses.
template <typename T>
struct Row {
    T* values;
    int width;
    bool aligned;

    __device__ Row(T* matrix, long long stride, int width_)
        : values(matrix + size_t(blockIdx.x) * size_t(stride)), width(width_), aligned(is_aligned(values)) {}

    __device__ auto get(int column) const { return load_part(values + column, width - column, aligned); }
    __device__ void get(int column, float (&x)[GROUP]) const { load_part(values + column, width - column, aligned, x); }
    __device__ void set(int column, const float (&x)[GROUP]) const { store_part(values + column, width - column, aligned, x); }
};

__device__ __forceinline__ float add_squares(float sum, const float (&x)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        sum += x[i] * x[i];
    }
    return sum;
}

__device__ __forceinline__ void scale(float (&x)[GROUP], float rstd, const float (&w)[GROUP]) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        x[i] = x[i] * rstd * w[i];
    }
}

template <typename T>
__device__ __forceinline__ void forward(T* y_, long long y_stride, float* __restrict__ rstd, const T* __restrict__ x_,
                                        long long x_stride, const float* __restrict__ weight, int width, float eps) {
    const Row<const T> x(x_, x_stride, width);
    const Row<T> y(y_, y_stride, width);
    const bool w_aligned = is_aligned(weight);
    Eight<T> held[HELD];
    float values[GROUP], w[GROUP];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held[i] = x.get(column_of(i));
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        unpack(held[i], values);
        sum = add_squares(sum, values);
    }
    for (int i = HELD; column_of(i) < width; i++) {
        x.get(column_of(i), values);
        sum = add_squares(sum, values);
    }
    const float scale_of_row = 1.0f / sqrtf(block_sum(sum) / float(width) + eps);
    if (threadIdx.x == 0) {
        rstd[blockIdx.x] = scale_of_row;
    }
    const auto write = [&](int column) {
        load_part(weight + column, width - column, w_aligned, w);
        scale(values, scale_of_row, w);
        y.set(column, values);
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        unpack(held[i], values);
        write(column_of(i));
    }
    for (int i = HELD; column_of(i) < width; i++) {
        x.get(column_of(i), values);
        write(column_of(i));
    }
}

template <typename T>
__device__ __forceinline__ void recompute(T* y_, long long y_stride, const T* __restrict__ x_, long long x_stride,
                                          const float* __restrict__ weight, const float* __restrict__ rstd, int width) {
    const Row<const T> x(x_, x_stride, width);
    const Row<T> y(y_, y_stride, width);
    const bool w_aligned = is_aligned(weight);
    const float scale_of_row = rstd[blockIdx.x];
    for (int first = 0; column_of(first) < width; first += HELD) {
        Eight<T> held[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            held[i] = x.get(column_of(first + i));
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int column = column_of(first + i);
            float values[GROUP], w[GROUP];
            unpack(held[i], values);
            load_part(weight + column, width - column, w_aligned, w);
            scale(values, scale_of_row, w);
            y.set(column, values);
        }
    }
}

template <typename T>
__device__ __forceinline__ void backward(T* __restrict__ dresidual_, long long dresidual_stride, T* __restrict__ y_,
                                         long long y_stride, const T* __restrict__ dy_, long long dy_stride,
                                         const T* __restrict__ x_, long long x_stride, const float* __restrict__ weight,
                                         const float* __restrict__ rstd, int width) {
    const Row<const T> x(x_, x_stride, width), dy(dy_, dy_stride, width);
    const Row<T> dresidual(dresidual_, dresidual_stride, width), y(y_, y_stride, width);
    const bool w_aligned = is_aligned(weight);
    const float scale_of_row = rstd[blockIdx.x];
    Eight<T> held_x[HELD], held_dy[HELD], held_dresidual[HELD];
    float values[GROUP], g[GROUP], dx[GROUP], w[GROUP];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held_x[i] = x.get(column_of(i));
        held_dy[i] = dy.get(column_of(i));
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held_dresidual[i] = dresidual.get(column_of(i));
    }
    float sum = 0;
    const auto add_products = [&](int column) {
        load_part(weight + column, width - column, w_aligned, w);
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            sum += g[i] * w[i] * values[i];
        }
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        unpack(held_x[i], values);
        unpack(held_dy[i], g);
        add_products(column_of(i));
    }
    for (int i = HELD; column_of(i) < width; i++) {
        x.get(column_of(i), values);
        dy.get(column_of(i), g);
        add_products(column_of(i));
    }
    // mean(g * n) * rstd, so that x itself is multiplied below.
    const float mean = block_sum(sum) * scale_of_row * scale_of_row / float(width);
    const auto write = [&](int column) {
        load_part(weight + column, width - column, w_aligned, w);
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            dx[i] += scale_of_row * (g[i] * w[i] - values[i] * mean);
        }
        dresidual.set(column, dx);
        if (y_ != nullptr) {
            scale(values, scale_of_row, w);
            y.set(column, values);
        }
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        unpack(held_x[i], values);
        unpack(held_dy[i], g);
        unpack(held_dresidual[i], dx);
        write(column_of(i));
    }
    for (int i = HELD; column_of(i) < width; i++) {
        x.get(column_of(i), values);
        dy.get(column_of(i), g);
        dresidual.get(column_of(i), dx);
        write(column_of(i));
    }
}

}  // namespace

// ---------------------------------------------------------------- kernels

#define RMS_NORM(T, NAME)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                                  \
        rms_norm_forward_##NAME(T* y, long long y_stride, float* rstd, const T* x, long long x_stride, const float* weight,     \
                                int rows, int width, float eps) {                                                               \
        forward(y, y_stride, rstd, x, x_stride, weight, width, eps);                                                            \
    }                                                                                                                           \
    /* y again from the rstd that forward gave. */                                                                              \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                                  \
        rms_norm_recompute_##NAME(T* y, long long y_stride, const T* x, long long x_stride, const float* weight,                \
                                  const float* rstd, int rows, int width) {                                                     \
        recompute(y, y_stride, x, x_stride, weight, rstd, width);                                                               \
    }                                                                                                                           \
    /* Adds dx to dresidual; writes y again where it is not null. */                                                            \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                                  \
        rms_norm_backward_##NAME(T* dresidual, long long dresidual_stride, T* y, long long y_stride, const T* dy,               \
                                 long long dy_stride, const T* x, long long x_stride, const float* weight,                      \
                                 const float* rstd, int rows, int width) {                                                      \
        backward(dresidual, dresidual_stride, y, y_stride, dy, dy_stride, x, x_stride, weight, rstd, width);                    \
    }

RMS_NORM(bf16, bf16)
RMS_NORM(float, f32)
