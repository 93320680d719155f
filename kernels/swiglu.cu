// SwiGLU: h = silu(gate) * up, silu(x) = x * sigmoid(x).
//
// Backward: with s = sigmoid(gate), dup = dh * gate * s and dgate = dh * up * s * (1 + gate * (1 - s)). It can write h again in the
// same pass, since it reads gate and up anyway.
// Shapes: h, dh (rows, width); gate_up, dgate_up (rows, 2 width): gate is columns 0..width, up is width..2 width. Computed in f32.
// In place is right: dgate_up may be gate_up, and h may be dh.
// Launch rule: flat (common.cuh).
// CPU twin: engine/src/ops/swiglu.rs. Source: Shazeer, "GLU Variants Improve Transformer", 2020.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

// 0 where exp overflows.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

template <typename T>
__device__ __forceinline__ void forward(T* __restrict__ h, long long h_stride, const T* __restrict__ gate_up,
                                        long long gate_up_stride, int rows, int width) {
    const Place place = flat_place(width);
    if (place.row >= unsigned(rows)) {
        return;
    }
    const int left = width - place.column;
    const T* gate_at = gate_up + place.row * size_t(gate_up_stride) + place.column;
    float gate[GROUP], up[GROUP];
    const auto gate_group = load_part(gate_at, left, is_aligned(gate_at));
    const auto up_group = load_part(gate_at + width, left, is_aligned(gate_at + width));
    unpack(gate_group, gate);
    unpack(up_group, up);
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        up[i] *= gate[i] * sigmoid(gate[i]);
    }
    T* h_at = h + place.row * size_t(h_stride) + place.column;
    store_part(h_at, left, is_aligned(h_at), up);
}

template <typename T>
__device__ __forceinline__ void backward(T* dgate_up, long long dgate_up_stride, T* h, long long h_stride, const T* dh,
                                         long long dh_stride, const T* gate_up, long long gate_up_stride, int rows, int width) {
    const Place place = flat_place(width);
    if (place.row >= unsigned(rows)) {
        return;
    }
    const int left = width - place.column;
    const T* gate_at = gate_up + place.row * size_t(gate_up_stride) + place.column;
    const T* dh_at = dh + place.row * size_t(dh_stride) + place.column;
    const auto gate_group = load_part(gate_at, left, is_aligned(gate_at));
    const auto up_group = load_part(gate_at + width, left, is_aligned(gate_at + width));
    const auto dh_group = load_part(dh_at, left, is_aligned(dh_at));
    float gate[GROUP], up[GROUP], d[GROUP], h_again[GROUP], dgate[GROUP];
    unpack(gate_group, gate);
    unpack(up_group, up);
    unpack(dh_group, d);
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        const float s = sigmoid(gate[i]), silu = gate[i] * s;
        h_again[i] = silu * up[i];
        dgate[i] = d[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
        d[i] *= silu;
    }
    T* dgate_at = dgate_up + place.row * size_t(dgate_up_stride) + place.column;
    store_part(dgate_at, left, is_aligned(dgate_at), dgate);
    store_part(dgate_at + width, left, is_aligned(dgate_at + width), d);
    if (h != nullptr) {
        T* h_at = h + place.row * size_t(h_stride) + place.column;
        store_part(h_at, left, is_aligned(h_at), h_again);
    }
}

}  // namespace

// ---------------------------------------------------------------- kernels

#define SWIGLU(T, NAME)                                                                                                         \
    extern "C" __global__ void swiglu_forward_##NAME(T* h, long long h_stride, const T* gate_up, long long gate_up_stride,      \
                                                     int rows, int width) {                                                     \
        forward(h, h_stride, gate_up, gate_up_stride, rows, width);                                                             \
    }                                                                                                                           \
    /* Writes h again where it is not null. */                                                                                  \
    extern "C" __global__ void swiglu_backward_##NAME(T* dgate_up, long long dgate_up_stride, T* h, long long h_stride,         \
                                                      const T* dh, long long dh_stride, const T* gate_up,                       \
                                                      long long gate_up_stride, int rows, int width) {                          \
        backward(dgate_up, dgate_up_stride, h, h_stride, dh, dh_stride, gate_up, gate_up_stride, rows, width);                  \
    }

SWIGLU(bf16, bf16)
SWIGLU(float, f32)
