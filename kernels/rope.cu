// Rotary position embedding: each pair (a, b) of a head is turned by the angle position * frequency of that pair,
// a' = a cos - b sin, b' = a sin + b cos. Backward is the rotation by the opposite angle: direction -1.
//
// A pair is (2i, 2i + 1) where `interleaved` is not 0, else (i, i + D/2).
// Shapes: x (rows, heads, D) in place, the first heads * D columns of rows that may be longer; cos_sin (rows, D/2) of (cos, sin)
// in f32, from angles in f64.
// Launch rules: rope: ceil(rows * heads * (D/2) / 8 / 256) blocks of 256 threads; any other grid is right as well.
// rope_table: ceil(rows * pairs / 256) blocks of 256 threads.
// CPU twin: engine/src/ops/rope.rs. Source: Su et al., "RoFormer", 2021.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

__device__ __forceinline__ void turn(float& a, float& b, float2 cos_sin, float direction) {
    const float sin = cos_sin.y * direction, before = a;
    a = before * cos_sin.x - b * sin;
    b = before * sin + b * cos_sin.x;
}

// Eight pairs a thread, in two groups of eight values. Every head must begin at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void turn_groups(T* x, long long stride, const float2* __restrict__ cos_sin, int rows, int heads,
                                            int head_dim, bool interleaved, float direction) {
    const unsigned pairs = unsigned(head_dim) / 2, chunks = pairs / GROUP, items = unsigned(heads) * chunks;
    const size_t count = size_t(rows) * items, step = size_t(gridDim.x) * blockDim.x;
    for (size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x; index < count; index += step) {
        const unsigned row = unsigned(index) / items, item = unsigned(index) - row * items;
        const unsigned head = item / chunks, chunk = item - head * chunks;
        T* low = x + size_t(row) * size_t(stride) + size_t(head) * unsigned(head_dim) + chunk * (interleaved ? 2 * GROUP : GROUP);
        T* high = low + (interleaved ? GROUP : pairs);
        float a[GROUP], b[GROUP];
        unpack(load(low), a);
        unpack(load(high), b);
        float4 table[GROUP / 2];
#pragma unroll
        for (int i = 0; i < GROUP / 2; i++) {
            table[i] = reinterpret_cast<const float4*>(cos_sin + size_t(row) * pairs + chunk * GROUP)[i];
        }
        if (interleaved) {
#pragma unroll
            for (int i = 0; i < GROUP / 2; i++) {
                float(&values)[GROUP] = i < GROUP / 4 ? a : b;
                const int at = 4 * i % GROUP;
                turn(values[at], values[at + 1], make_float2(table[i].x, table[i].y), direction);
                turn(values[at + 2], values[at + 3], make_float2(table[i].z, table[i].w), direction);
            }
        } else {
#pragma unroll
            for (int i = 0; i < GROUP / 2; i++) {
                turn(a[2 * i], b[2 * i], make_float2(table[i].x, table[i].y), direction);
                turn(a[2 * i + 1], b[2 * i + 1], make_float2(table[i].z, table[i].w), direction);
            }
        }
        store(low, pack<T>(a));
        store(high, pack<T>(b));
    }
}

template <typename T>
__device__ __forceinline__ void turn_pairs(T* x, long long stride, const float2* __restrict__ cos_sin, int rows, int heads,
                                           int head_dim, bool interleaved, float direction) {
    const unsigned pairs = unsigned(head_dim) / 2, items = unsigned(heads) * pairs;
    const size_t count = size_t(rows) * items, step = size_t(gridDim.x) * blockDim.x;
    for (size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x; index < count; index += step) {
        const size_t row = index / items;
        const unsigned item = unsigned(index - row * items), head = item / pairs, pair = item - head * pairs;
        T* start = x + row * size_t(stride) + size_t(head) * unsigned(head_dim);
        T* low = start + (interleaved ? 2 * pair : pair);
        T* high = interleaved ? low + 1 : low + pairs;
        float a = to_f32(*low), b = to_f32(*high);
        turn(a, b, cos_sin[row * pairs + pair], direction);
        *low = from_f32<T>(a);
        *high = from_f32<T>(b);
    }
}

template <typename T>
__device__ __forceinline__ void rope(T* x, long long stride, const float2* cos_sin, int rows, int heads, int head_dim,
                                     bool interleaved, float direction) {
    const bool few = size_t(rows) * unsigned(heads) * unsigned(head_dim) / (2 * GROUP) <= 0xffffffffu;
    if (few && head_dim % (2 * GROUP) == 0 && is_aligned(x) && stride * sizeof(T) % 16 == 0 && is_aligned(cos_sin)) {
        turn_groups(x, stride, cos_sin, rows, heads, head_dim, interleaved, direction);
    } else {
        turn_pairs(x, stride, cos_sin, rows, heads, head_dim, interleaved, direction);
    }
}

}  // namespace

// ---------------------------------------------------------------- kernels

extern "C" __global__ void rope_bf16(bf16* x, long long x_stride, const float2* cos_sin, int rows, int heads, int head_dim,
                                     int interleaved, float direction) {
    rope(x, x_stride, cos_sin, rows, heads, head_dim, interleaved != 0, direction);
}

extern "C" __global__ void rope_f32(float* x, long long x_stride, const float2* cos_sin, int rows, int heads, int head_dim,
                                    int interleaved, float direction) {
    rope(x, x_stride, cos_sin, rows, heads, head_dim, interleaved != 0, direction);
}

// frequencies (pairs) in radians a position.
extern "C" __global__ void rope_table(float2* __restrict__ cos_sin, const int* __restrict__ positions,
                                      const double* __restrict__ frequencies, int rows, int pairs) {
    const size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = index / unsigned(pairs);
    if (row < size_t(rows)) {
        double sin, cos;
        sincos(double(positions[row]) * frequencies[index - row * unsigned(pairs)], &sin, &cos);
        cos_sin[index] = make_float2(float(cos), float(sin));
    }
}
