// Causal attention over packed sequences for any head size: o = softmax(scale · q kᵀ, masked) v, never a (T, T) matrix.
//
// s = scale · q kᵀ, lse_i = log Σ_j exp(s_ij) (natural log) over the keys j that row i sees, p = exp(s − lse), o = p v.
// Backward: δ_i = Σ_d do_id · o_id (attention_delta, first), dv = pᵀ do, dp = do vᵀ, ds = p ∘ (dp − δ),
// dq = scale · ds k, dk = scale · dsᵀ q. p is computed again from lse. Each sum is made by one block in one order: same input, same bits.
//
// Shapes: q, o, do, dq (T, H, D); k, v, dk, dv (T, KV, D); lse, delta (H, T) f32. Head h reads kv head h / group, group = H / KV.
// D is a multiple of 8, at most 256. Storage T (bf16 or f32), all arithmetic f32. Strides are elements from row to row; pointers are
// 16-byte aligned and strides multiples of 8, so the tensors may be columns of wider buffers. No output may alias an input.
//
// Work: tiles[i] = (start, end, seq_start, seq_end), at most TILE rows of one sequence; together they cover each row once. A row sees
// the keys seq_start..=itself. Only rows start..end of the outputs are written. The host sorts the tiles so that the longest work comes
// first: (end − seq_start) descending for forward and dq, (seq_end − start) descending for dkdv.
//
// Launch: block 256, shared 0 (48 KB static).
//   attention_forward, attention_backward_dq: grid tile_count · heads     attention_backward_dkdv: grid tile_count · (heads / group)
//   attention_delta:                          grid ceil(tokens · heads · lanes / 256), lanes = the power of two ≥ D / 8
//
// CPU twin: engine/src/ops/attention.rs. Source: Dao, "FlashAttention-2", 2023. The tensor-core paths (bf16, D 64 and 128) are
// attention_mma.cu and attention_hopper_*.cu; this one serves all other sizes, and f32.

#include <cuda_bf16.h>

typedef long long ll;

// ---------------------------------------------------------------------------------------------------- device helpers

#define TILE 64   // also in engine/src/ops/cuda/attention.rs
#define CHUNKS 4  // head columns are worked on in chunks of 64: D ≤ 256
#define THREADS 256

__device__ __forceinline__ void load8(float (&x)[8], const float* p) {
    const float4* from = reinterpret_cast<const float4*>(p);
    float4 a = from[0], b = from[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void load8(float (&x)[8], const __nv_bfloat16* p) {
    uint4 a = *reinterpret_cast<const uint4*>(p);
    const unsigned words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void store4(float* p, const float (&x)[4], float factor) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor);
}

__device__ __forceinline__ void store4(__nv_bfloat16* p, const float (&x)[4], float factor) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x[0] * factor, x[1] * factor),
                              __floats2bfloat162_rn(x[2] * factor, x[3] * factor)};
    *reinterpret_cast<uint2*>(p) = *reinterpret_cast<uint2*>(pair);
}

// A 64 × 64 f32 tile in shared memory, as float4. The xor spreads a column of 16-byte words over all banks.
__device__ __forceinline__ int at4(int row, int col4) { return row * 16 + (col4 ^ (row & 15)); }

// Columns col..col + 64 of rows first..first + 64 of a head; zeros from row end and column head_dim on.
template <typename T>
__device__ __forceinline__ void load_tile(float4* tile, const T* head, ll stride, int first, int end, int col, int head_dim) {
#pragma unroll
    for (int i = threadIdx.x; i < 64 * 8; i += THREADS) {
        int row = i / 8, col8 = i % 8;
        float x[8] = {};
        if (first + row < end && col + col8 * 8 < head_dim) load8(x, head + (size_t)(first + row) * stride + col + col8 * 8);
        tile[at4(row, col8 * 2)] = make_float4(x[0], x[1], x[2], x[3]);
        tile[at4(row, col8 * 2 + 1)] = make_float4(x[4], x[5], x[6], x[7]);
    }
}

// A thread owns rows ty · 4 + i; of a product a bᵀ its columns are tx + 16 · j, of a product p b they are tx · 4 + j.
struct Place {
    int tx, ty;
    __device__ Place() : tx(threadIdx.x % 16), ty(threadIdx.x / 16) {}
    __device__ int row(int i) const { return ty * 4 + i; }
    __device__ int column(int j) const { return tx + 16 * j; }
};

// acc += a bᵀ
__device__ __forceinline__ void multiply_transposed(float (&acc)[4][4], const float4* a, const float4* b, Place at) {
#pragma unroll 4
    for (int c = 0; c < 16; c++) {
        float4 x[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = a[at4(at.row(i), c)], y[i] = b[at4(at.column(i), c)];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                acc[i][j] = fmaf(x[i].x, y[j].x, acc[i][j]);
                acc[i][j] = fmaf(x[i].y, y[j].y, acc[i][j]);
                acc[i][j] = fmaf(x[i].z, y[j].z, acc[i][j]);
                acc[i][j] = fmaf(x[i].w, y[j].w, acc[i][j]);
            }
    }
}

// acc += p b
__device__ __forceinline__ void multiply(float (&acc)[4][4], const float4* p, const float4* b, Place at) {
#pragma unroll 4
    for (int k = 0; k < 16; k++) {
        float4 x[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = p[at4(at.row(i), k)], y[i] = b[at4(k * 4 + i, at.tx)];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float f[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
            for (int l = 0; l < 4; l++) {
                acc[i][0] = fmaf(f[l], y[l].x, acc[i][0]);
                acc[i][1] = fmaf(f[l], y[l].y, acc[i][1]);
                acc[i][2] = fmaf(f[l], y[l].z, acc[i][2]);
                acc[i][3] = fmaf(f[l], y[l].w, acc[i][3]);
            }
        }
    }
}

// Keeps a thread's 4 × 4 values of a product a bᵀ as a tile.
__device__ __forceinline__ void keep(float4* tile, const float (&x)[4][4], Place at) {
    float* values = reinterpret_cast<float*>(tile);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) values[at4(at.row(i), at.column(j) / 4) * 4 + at.column(j) % 4] = x[i][j];
}

// acc += a bᵀ over all head columns, a and b being 64 rows of two heads, from rows a_first and b_first on.
template <typename T>
__device__ __forceinline__ void scores(float (&acc)[4][4], float4* a_tile, float4* b_tile, const T* a, ll a_stride, int a_first,
                                       int a_end, const T* b, ll b_stride, int b_first, int b_end, int head_dim, Place at) {
    for (int col = 0; col < head_dim; col += 64) {
        __syncthreads();
        load_tile(a_tile, a, a_stride, a_first, a_end, col, head_dim);
        load_tile(b_tile, b, b_stride, b_first, b_end, col, head_dim);
        __syncthreads();
        multiply_transposed(acc, a_tile, b_tile, at);
    }
}

// acc += p x for all head columns, x being 64 rows of a head from row first on; p was written by keep().
template <typename T>
__device__ __forceinline__ void accumulate(float (&acc)[CHUNKS][4][4], const float4* p, float4* x_tile, const T* x, ll stride,
                                           int first, int end, int head_dim, Place at) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
        if (chunk * 64 < head_dim) {
            __syncthreads();
            load_tile(x_tile, x, stride, first, end, chunk * 64, head_dim);
            __syncthreads();
            multiply(acc[chunk], p, x_tile, at);
        }
}

template <typename T>
__device__ __forceinline__ void store(T* head, ll stride, const float (&acc)[CHUNKS][4][4], const float (&factor)[4], int start,
                                      int end, int head_dim, Place at) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            int row = start + at.row(i), col = chunk * 64 + at.tx * 4;
            if (row < end && col < head_dim) store4(head + (size_t)row * stride + col, acc[chunk][i], factor[i]);
        }
}

template <typename T>
__device__ __forceinline__ void forward(T* o, ll o_stride, float* lse, const T* q, ll q_stride, const T* k, ll k_stride,
                                        const T* v, ll v_stride, const int4* tiles, int tokens, int heads, int group,
                                        int head_dim, float scale) {
    __shared__ float4 a_tile[1024], b_tile[1024], p_tile[1024];
    const int4 tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, start = tile.x, end = tile.y;
    const size_t column = (size_t)head * head_dim, kv_column = (size_t)(head / group) * head_dim;
    const Place at;
    float acc[CHUNKS][4][4] = {}, max[4], sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) max[i] = -INFINITY;
    for (int first = tile.z; first < end; first += 64) {
        float s[4][4] = {};
        scores(s, a_tile, b_tile, q + column, q_stride, start, end, k + kv_column, k_stride, first, end, head_dim, at);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = start + at.row(i);
            float seen = max[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = first + at.column(j) <= row ? s[i][j] * scale : -INFINITY;
                seen = fmaxf(seen, s[i][j]);
            }
            // The 16 threads of a row are one half of a warp. Each row sees key seq_start, so the maximum is finite from the first round on.
#pragma unroll
            for (int step = 8; step > 0; step /= 2) seen = fmaxf(seen, __shfl_xor_sync(~0u, seen, step));
            const float shrink = expf(max[i] - seen);
            max[i] = seen;
            sum[i] *= shrink;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = expf(s[i][j] - seen);
                sum[i] += s[i][j];
            }
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[chunk][i][j] *= shrink;
        }
        keep(p_tile, s, at);
        accumulate(acc, p_tile, b_tile, v + kv_column, v_stride, first, end, head_dim, at);
    }
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int step = 8; step > 0; step /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
        inverse[i] = 1.0f / sum[i];
        const int row = start + at.row(i);
        if (at.tx == 0 && row < end) lse[(size_t)head * tokens + row] = max[i] + logf(sum[i]);
    }
    store(o + column, o_stride, acc, inverse, start, end, head_dim, at);
}

template <typename T>
__device__ __forceinline__ void delta_rows(float* delta, const T* dout, ll dout_stride, const T* o, ll o_stride, int tokens,
                                           int heads, int head_dim) {
    int lanes = 1;  // per head of a row, each 8 columns
    while (lanes * 8 < head_dim) lanes *= 2;
    const size_t thread = (size_t)blockIdx.x * THREADS + threadIdx.x, item = thread / lanes;
    const size_t row = item / heads, head = item % heads;
    const int col = (int)(thread % lanes) * 8;
    float sum = 0.0f;
    if (row < tokens && col < head_dim) {
        float x[8], y[8];
        load8(x, dout + row * dout_stride + head * head_dim + col);
        load8(y, o + row * o_stride + head * head_dim + col);
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(x[i], y[i], sum);
    }
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (row < tokens && col == 0) delta[head * tokens + row] = sum;
}

// Rows are keys here, columns queries: p and ds are made transposed, as dv and dk need them.
template <typename T>
__device__ __forceinline__ void backward_dkdv(T* dk, ll dk_stride, T* dv, ll dv_stride, const T* q, ll q_stride, const T* k,
                                              ll k_stride, const T* v, ll v_stride, const T* dout, ll dout_stride,
                                              const float* lse, const float* delta, const int4* tiles, int tokens, int heads,
                                              int group, int head_dim, float scale) {
    __shared__ float4 a_tile[1024], b_tile[1024], p_tile[1024];
    const int kv_heads = heads / group, kv_head = blockIdx.x % kv_heads;
    const int4 tile = tiles[blockIdx.x / kv_heads];
    const int start = tile.x, end = tile.y, seq_end = tile.w;
    const size_t kv_column = (size_t)kv_head * head_dim;
    const Place at;
    float dk_acc[CHUNKS][4][4] = {}, dv_acc[CHUNKS][4][4] = {};
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const size_t column = (size_t)head * head_dim, stats = (size_t)head * tokens;
        for (int first = start; first < seq_end; first += 64) {
            float p[4][4] = {}, ds[4][4] = {};
            scores(p, a_tile, b_tile, k + kv_column, k_stride, start, end, q + column, q_stride, first, seq_end, head_dim, at);
            scores(ds, a_tile, b_tile, v + kv_column, v_stride, start, end, dout + column, dout_stride, first, seq_end, head_dim,
                   at);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = first + at.column(j);
                const float row_lse = row < seq_end ? lse[stats + row] : 0.0f,
                            row_delta = row < seq_end ? delta[stats + row] : 0.0f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const bool seen = start + at.row(i) <= row && row < seq_end;
                    p[i][j] = seen ? expf(p[i][j] * scale - row_lse) : 0.0f;
                    ds[i][j] = p[i][j] * (ds[i][j] - row_delta);
                }
            }
            keep(p_tile, p, at);
            accumulate(dv_acc, p_tile, b_tile, dout + column, dout_stride, first, seq_end, head_dim, at);
            __syncthreads();
            keep(p_tile, ds, at);
            accumulate(dk_acc, p_tile, b_tile, q + column, q_stride, first, seq_end, head_dim, at);
        }
    }
    const float scales[4] = {scale, scale, scale, scale}, ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    store(dk + kv_column, dk_stride, dk_acc, scales, start, end, head_dim, at);
    store(dv + kv_column, dv_stride, dv_acc, ones, start, end, head_dim, at);
}

template <typename T>
__device__ __forceinline__ void backward_dq(T* dq, ll dq_stride, const T* q, ll q_stride, const T* k, ll k_stride, const T* v,
                                            ll v_stride, const T* dout, ll dout_stride, const float* lse, const float* delta,
                                            const int4* tiles, int tokens, int heads, int group, int head_dim, float scale) {
    __shared__ float4 a_tile[1024], b_tile[1024], p_tile[1024];
    const int4 tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, start = tile.x, end = tile.y;
    const size_t column = (size_t)head * head_dim, kv_column = (size_t)(head / group) * head_dim, stats = (size_t)head * tokens;
    const Place at;
    float acc[CHUNKS][4][4] = {}, row_lse[4], row_delta[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = start + at.row(i);
        row_lse[i] = row < end ? lse[stats + row] : 0.0f, row_delta[i] = row < end ? delta[stats + row] : 0.0f;
    }
    for (int first = tile.z; first < end; first += 64) {
        float p[4][4] = {}, ds[4][4] = {};
        scores(p, a_tile, b_tile, q + column, q_stride, start, end, k + kv_column, k_stride, first, end, head_dim, at);
        scores(ds, a_tile, b_tile, dout + column, dout_stride, start, end, v + kv_column, v_stride, first, end, head_dim, at);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const bool seen = first + at.column(j) <= start + at.row(i);
                ds[i][j] = seen ? expf(p[i][j] * scale - row_lse[i]) * (ds[i][j] - row_delta[i]) : 0.0f;
            }
        keep(p_tile, ds, at);
        accumulate(acc, p_tile, b_tile, k + kv_column, k_stride, first, end, head_dim, at);
    }
    const float scales[4] = {scale, scale, scale, scale};
    store(dq + column, dq_stride, acc, scales, start, end, head_dim, at);
}

// ----------------------------------------------------------------------------------------------------------- kernels

// tile_count is part of the launch rule and checked by the host; the kernels find their tile from blockIdx.
#define KERNELS(dtype, T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_forward_##dtype(                                             \
        T* o, ll o_stride, float* lse, const T* q, ll q_stride, const T* k, ll k_stride, const T* v, ll v_stride,                \
        const int4* tiles, int tile_count, int tokens, int heads, int group, int head_dim, float scale) {                        \
        forward(o, o_stride, lse, q, q_stride, k, k_stride, v, v_stride, tiles, tokens, heads, group, head_dim, scale);          \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_delta_##dtype(                                               \
        float* delta, const T* dout, ll dout_stride, const T* o, ll o_stride, int tokens, int heads, int head_dim) {             \
        delta_rows(delta, dout, dout_stride, o, o_stride, tokens, heads, head_dim);                                              \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_dkdv_##dtype(                                       \
        T* dk, ll dk_stride, T* dv, ll dv_stride, const T* q, ll q_stride, const T* k, ll k_stride, const T* v, ll v_stride,     \
        const T* dout, ll dout_stride, const float* lse, const float* delta, const int4* tiles, int tile_count, int tokens,      \
        int heads, int group, int head_dim, float scale) {                                                                       \
        backward_dkdv(dk, dk_stride, dv, dv_stride, q, q_stride, k, k_stride, v, v_stride, dout, dout_stride, lse, delta, tiles, \
                      tokens, heads, group, head_dim, scale);                                                                    \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_dq_##dtype(                                         \
        T* dq, ll dq_stride, const T* q, ll q_stride, const T* k, ll k_stride, const T* v, ll v_stride, const T* dout,           \
        ll dout_stride, const float* lse, const float* delta, const int4* tiles, int tile_count, int tokens, int heads,          \
        int group, int head_dim, float scale) {                                                                                  \
        backward_dq(dq, dq_stride, q, q_stride, k, k_stride, v, v_stride, dout, dout_stride, lse, delta, tiles, tokens, heads,   \
                    group, head_dim, scale);                                                                                     \
    }

KERNELS(bf16, __nv_bfloat16)
KERNELS(f32, float)
