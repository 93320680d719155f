// Dropout by a counter: whether an element is dropped depends on its place and a key alone, so backward computes the mask again.
//
// y = mask * x / (1 - p), forward and backward alike; mask(row, column) is 0 with probability p.
// Bits: h = mix(mix(key + (row + 1) gamma) + (floor(column / 2) + 1) gamma), of which an even column takes the low 32 bits and an odd
// one the high; the element is dropped where they are below `threshold`. gamma and mix are SplitMix64's: the same bits as on the CPU.
// Shapes: x, y (rows, width). `scale` is 1 / (1 - p). y may be x itself in `dropout`.
// Launch rule: flat (common.cuh).
// CPU twin: engine/src/ops/dropout.rs. Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

// The same as in engine/src/ops/dropout.rs.
constexpr uint64_t GAMMA = 0x9e3779b97f4a7c15;

__device__ __forceinline__ uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
    return bits ^ (bits >> 31);
}

template <typename T, bool ADD>
__device__ __forceinline__ void dropout(T* y, long long y_stride, const T* x, long long x_stride, int rows, int width,
                                        uint64_t key, uint32_t threshold, float scale) {
    const Place place = flat_place(width);
    if (place.row >= unsigned(rows)) {
        return;
    }
    const int left = width - place.column;
    const T* x_at = x + place.row * size_t(x_stride) + place.column;
    T* y_at = y + place.row * size_t(y_stride) + place.column;
    float values[GROUP], sum[GROUP];
    const auto x_group = load_part(x_at, left, is_aligned(x_at));
    if (ADD) {
        load_part(y_at, left, is_aligned(y_at), sum);
    }
    uint64_t counter = mix(key + (uint64_t(place.row) + 1) * GAMMA) + uint64_t(unsigned(place.column) / 2) * GAMMA;
    unpack(x_group, values);
#pragma unroll
    for (int i = 0; i < GROUP; i += 2) {
        counter += GAMMA;
        const uint64_t bits = mix(counter);
        // Multiplied with 0 and not replaced by it, as on the CPU: a NaN stays one.
        values[i] *= uint32_t(bits) < threshold ? 0.0f : scale;
        values[i + 1] *= uint32_t(bits >> 32) < threshold ? 0.0f : scale;
    }
    if (ADD) {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            values[i] += sum[i];
        }
    }
    store_part(y_at, left, is_aligned(y_at), values);
}

}  // namespace

// ---------------------------------------------------------------- kernels

#define DROPOUT(T, NAME)                                                                                                        \
    extern "C" __global__ void dropout_##NAME(T* y, long long y_stride, const T* x, long long x_stride, int rows, int width,    \
                                              uint64_t key, uint32_t threshold, float scale) {                                  \
        dropout<T, false>(y, y_stride, x, x_stride, rows, width, key, threshold, scale);                                        \
    }                                                                                                                           \
    /* y += mask * x / (1 - p). */                                                                                              \
    extern "C" __global__ void dropout_add_##NAME(T* y, long long y_stride, const T* x, long long x_stride, int rows,           \
                                                  int width, uint64_t key, uint32_t threshold, float scale) {                   \
        dropout<T, true>(y, y_stride, x, x_stride, rows, width, key, threshold, scale);                                         \
    }

DROPOUT(bf16, bf16)
DROPOUT(float, f32)
