// Causal attention over packed sequences on the tensor cores of sm_80 and later (mma.sync), bf16, head sizes 64 and 128.
//
// s = scale · q kᵀ, lse_i = log Σ_j exp(s_ij) (natural log) over the keys j that row i sees, p = exp(s − lse), o = p v.
// Backward, with δ = Σ_d do · o from attention_delta_bf16 (attention.cu): dv = pᵀ do, dp = do vᵀ, ds = p ∘ (dp − δ),
// dq = scale · ds k, dk = scale · dsᵀ q. p is computed again from lse. p and ds enter their products rounded to bf16, sums are f32.
// Each sum is made by one block in one order: same input, same bits.
//
// Shapes: q, o, do, dq (T, H, D); k, v, dk, dv (T, KV, D), all bf16; lse, delta (H, T) f32. Head h reads kv head h / group,
// group = H / KV. Strides are elements from row to row; pointers are 16-byte aligned and strides multiples of 8, so the tensors may be
// columns of wider buffers. No output may alias an input.
//
// Work: tiles[i] = (start, end, seq_start, seq_end), at most TILE rows of one sequence; together they cover each row once. A row sees
// the keys seq_start..=itself. Only rows start..end of the outputs are written. The host sorts the tiles so that the longest work comes
// first: (end − seq_start) descending for forward and dq, (seq_end − start) descending for dkdv.
//
// Launch, dynamic shared memory (raise the kernel's limit first), TILE 128 for all:
//   attention_mma_forward_d{64,128}        grid tile_count · heads            block 128   shared D · 512
//   attention_mma_backward_dq_d{64,128}    grid tile_count · heads            block 256   shared D · 512
//   attention_mma_backward_dkdv_d{64,128}  grid tile_count · (heads / group)  block 256   shared D · 512 + 34816
//
// CPU twin: engine/src/ops/attention.rs. Source: Dao, "FlashAttention-2", 2023, with dq in a kernel of its own instead of atomics.

#include "mma.cuh"

typedef long long ll;

// ---------------------------------------------------------------------------------------------------- device helpers

#define TILE 128  // also in engine/src/ops/cuda/attention.rs
#define LOG2E 1.4426950408889634f

// 16 bytes, or zeros.
__device__ __forceinline__ void copy16(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy4(unsigned to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

// Rows lie in shared memory unpadded, their 16-byte words exchanged by word ^ (row & 7): the 8 rows of a matrix that ldmatrix reads are
// in different banks. This starts the copy of rows first..first + ROWS of a head, zeros from row end on.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(unsigned to, const bf16* head, ll stride, int first, int end) {
    constexpr int WORDS = D / 8, STEP = THREADS / WORDS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread's rows are equal mod 8");
    const int row = threadIdx.x / WORDS, word = threadIdx.x % WORDS;
    to += row * D * 2 + ((word ^ (row & 7)) << 4);
    const bf16* from = head + (size_t)(first + row) * stride + word * 8;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        const bool there = first + row + i * STEP < end;
        copy16(to + i * STEP * D * 2, there ? from : head, there);
        from += STEP * stride;
    }
}

// Where a lane's 16-byte word stands when ldmatrix reads 16 rows × 16 columns from `rows` on; the 16 columns of number c are at
// (place ^ c · 32). As operand a, and transposed as operand b, the four matrices are (rows 0–7, 8–15) of the left, then the right columns;
// untransposed as operand b (rows are its columns) they are the (left, right) columns of rows 0–7, then 8–15.
template <int D>
__device__ __forceinline__ unsigned place_a(unsigned rows) {
    const int lane = threadIdx.x % 32;
    return rows + (lane & 15) * D * 2 + (((lane >> 4) ^ (lane & 7)) << 4);
}
template <int D>
__device__ __forceinline__ unsigned place_b(unsigned rows) {
    const int lane = threadIdx.x % 32;
    return rows + ((lane & 7) + ((lane >> 4) << 3)) * D * 2 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
}

// Writes a warp's 16 rows × D from accumulators: through its own 16 rows of shared memory, then out in 16-byte words.
template <int D>
__device__ __forceinline__ void store_rows(bf16* head, ll stride, unsigned rows, const float (&acc)[D / 8][4], float low,
                                           float high, int first, int end) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    __syncwarp();  // other lanes may have read these rows as operands
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        const unsigned to = rows + g * D * 2 + ((n ^ (g & 7)) << 4) + (lane & 3) * 4;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(bf16_pair(acc[n][0] * low, acc[n][1] * low)) : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 8 * D * 2), "r"(bf16_pair(acc[n][2] * high, acc[n][3] * high)) : "memory");
    }
    __syncwarp();
    constexpr int WORDS = D / 8, STEP = 32 / WORDS;
#pragma unroll
    for (int i = 0; i < 16 / STEP; i++) {
        const int row = lane / WORDS + i * STEP, word = lane % WORDS;
        uint4 x;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(rows + row * D * 2 + ((word ^ (row & 7)) << 4))
                     : "memory");
        if (first + row < end) *reinterpret_cast<uint4*>(head + (size_t)(first + row) * stride + word * 8) = x;
    }
}

// sums (16, ROWS) += a b^T, over D: a in registers, b rows of shared memory from place_b on.
template <int D, int ROWS>
__device__ __forceinline__ void add_abt(float (&sums)[ROWS / 8][4], const unsigned (&a)[D / 16][4], unsigned place) {
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
#pragma unroll
        for (int n = 0; n < ROWS / 16; n++) {
            unsigned b[4];
            load_matrices(b, (place ^ (c * 32)) + n * 16 * D * 2);
            multiply(sums[2 * n], a[c], b[0], b[1]), multiply(sums[2 * n + 1], a[c], b[2], b[3]);
        }
    }
}

// sums (16, D) += a b, over ROWS: a rounded to bf16, b rows of shared memory from place_a on.
template <int D, int ROWS>
__device__ __forceinline__ void add_ab(float (&sums)[D / 8][4], const float (&a)[ROWS / 8][4], unsigned place) {
#pragma unroll
    for (int c = 0; c < ROWS / 16; c++) {
        const unsigned pairs[4] = {bf16_pair(a[2 * c][0], a[2 * c][1]), bf16_pair(a[2 * c][2], a[2 * c][3]),
                                   bf16_pair(a[2 * c + 1][0], a[2 * c + 1][1]), bf16_pair(a[2 * c + 1][2], a[2 * c + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            unsigned b[4];
            load_transposed(b, (place ^ (n * 32)) + c * 16 * D * 2);
            multiply(sums[2 * n], pairs, b[0], b[1]), multiply(sums[2 * n + 1], pairs, b[2], b[3]);
        }
    }
}

// Keys of a block of the forward.
constexpr int FORWARD_KEYS = 64;

// Keys behind a row become -infinity; `first_key` is the block's first, `first_row` the warp's.
__device__ __forceinline__ void mask(float (&s)[2][FORWARD_KEYS / 8][4], int first_key, int first_row, int lane) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < FORWARD_KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (first_key + n * 8 + (lane & 3) * 2 + (i & 1) > first_row + m * 16 + lane / 4 + (i >> 1) * 8)
                    s[m][n][i] = -INFINITY;
}

// Scores become probabilities of the rows' maxima so far; what was summed with other maxima shrinks to them.
template <int D>
__device__ __forceinline__ void softmax(float (&s)[2][FORWARD_KEYS / 8][4], float (&max)[2][2], float (&sum)[2][2],
                                        float (&acc)[2][D / 8][4], float factor) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            // Each row sees key seq_start: the maximum is finite from the first block on. A row is spread over 4 lanes.
            float top = max[m][h];
#pragma unroll
            for (int n = 0; n < FORWARD_KEYS / 8; n++) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float shrink = exp2_fast((max[m][h] - top) * factor), shift = top * factor;
            max[m][h] = top;
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < FORWARD_KEYS / 8; n++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    s[m][n][i] = exp2_fast(fmaf(s[m][n][i], factor, -shift));
                    total += s[m][n][i];
                }
            sum[m][h] = fmaf(sum[m][h], shrink, total);
#pragma unroll
            for (int n = 0; n < D / 8; n++) acc[m][n][2 * h] *= shrink, acc[m][n][2 * h + 1] *= shrink;
        }
}

// 4 warps of 32 rows; keys come in blocks of 64. The copy of v runs under q kᵀ, that of the next k under softmax and p v.
template <int D>
__device__ __forceinline__ void forward(bf16* o, ll o_stride, float* lse, const bf16* q, ll q_stride, const bf16* k, ll k_stride,
                                        const bf16* v, ll v_stride, const int4* tiles, int tokens, int heads, int group,
                                        float scale) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int KEYS = FORWARD_KEYS, THREADS = 128;
    const int4 tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, start = tile.x, end = tile.y;
    q += (size_t)head * D, o += (size_t)head * D, k += (size_t)(head / group) * D, v += (size_t)(head / group) * D;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_first = start + warp * 32;
    const unsigned q_rows = shared_address(shared), k_rows = q_rows + TILE * D * 2, v_rows = k_rows + KEYS * D * 2;
    const unsigned own_rows = q_rows + warp * 32 * D * 2, q_place = place_a<D>(own_rows), k_place = place_b<D>(k_rows),
                   v_place = place_a<D>(v_rows);
    const float factor = scale * LOG2E;
    float acc[2][D / 8][4] = {}, max[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, sum[2][2] = {};

    copy_rows<D, TILE, THREADS>(q_rows, q, q_stride, start, end);
    copy_rows<D, KEYS, THREADS>(k_rows, k, k_stride, tile.z, end);
    commit_copies();
    for (int first = tile.z; first < end; first += KEYS) {
        const bool seen = first <= warp_first + 31;
        float s[2][KEYS / 8][4] = {};
        await_copies<0>();
        __syncthreads();
        copy_rows<D, KEYS, THREADS>(v_rows, v, v_stride, first, end);
        commit_copies();
        if (seen) {
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                unsigned a[2][4], b[4];
                load_matrices(a[0], q_place ^ (c * 32));
                load_matrices(a[1], (q_place ^ (c * 32)) + 16 * D * 2);
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    load_matrices(b, (k_place ^ (c * 32)) + n * 16 * D * 2);
#pragma unroll
                    for (int m = 0; m < 2; m++) multiply(s[m][2 * n], a[m], b[0], b[1]), multiply(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        await_copies<0>();
        __syncthreads();
        if (first + KEYS < end) copy_rows<D, KEYS, THREADS>(k_rows, k, k_stride, first + KEYS, end);
        commit_copies();
        if (seen) {
            if (first + KEYS - 1 > warp_first) {
                mask(s, first, warp_first, lane);
            }
            softmax<D>(s, max, sum, acc, factor);
#pragma unroll
            for (int c = 0; c < KEYS / 16; c++) {
                unsigned p[2][4], b[4];
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    p[m][0] = bf16_pair(s[m][2 * c][0], s[m][2 * c][1]), p[m][1] = bf16_pair(s[m][2 * c][2], s[m][2 * c][3]);
                    p[m][2] = bf16_pair(s[m][2 * c + 1][0], s[m][2 * c + 1][1]),
                    p[m][3] = bf16_pair(s[m][2 * c + 1][2], s[m][2 * c + 1][3]);
                }
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    load_transposed(b, (v_place ^ (n * 32)) + c * 16 * D * 2);
#pragma unroll
                    for (int m = 0; m < 2; m++) multiply(acc[m][2 * n], p[m], b[0], b[1]), multiply(acc[m][2 * n + 1], p[m], b[2], b[3]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
        float inverse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            inverse[h] = 1.0f / total;
            const int row = warp_first + m * 16 + h * 8 + lane / 4;
            if ((lane & 3) == 0 && row < end) lse[(size_t)head * tokens + row] = max[m][h] * scale + logf(total);
        }
        store_rows<D>(o, o_stride, own_rows + m * 16 * D * 2, acc[m], inverse[0], inverse[1], warp_first + m * 16, end);
    }
}

// p and ds of scores p and dp = ds, transposed; `stats`: lse and delta of the lane's first two queries. Queries before a key have p = 0.
template <int ROWS>
__device__ __forceinline__ void differentiate_transposed(float (&p)[ROWS / 8][4], float (&ds)[ROWS / 8][4], unsigned stats, float factor,
                                                         bool masked, int first, int warp_first, int lane) {
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++) {
        float row_lse[2], row_delta[2];
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(row_lse[0]), "=f"(row_lse[1])
                     : "r"(stats + n * 32)
                     : "memory");
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(row_delta[0]), "=f"(row_delta[1])
                     : "r"(stats + ROWS * 4 + n * 32)
                     : "memory");
#pragma unroll
        for (int x = 0; x < 4; x++) {
            p[n][x] = exp2_fast(fmaf(p[n][x], factor, row_lse[x & 1] * -LOG2E));
            if (masked && first + n * 8 + (lane & 3) * 2 + (x & 1) < warp_first + lane / 4 + (x >> 1) * 8) p[n][x] = 0.0f;
            ds[n][x] = p[n][x] * (ds[n][x] - row_delta[x & 1]);
        }
    }
}

// 8 warps of 16 keys: scores are made transposed, so that they are operand a of dv and dk straight from registers. The queries of the
// group's heads pass by in blocks of ROWS, double-buffered. Rows from seq_end on are zeros with lse = delta = 0: they add nothing.
template <int D>
__device__ __forceinline__ void backward_dkdv(bf16* dk, ll dk_stride, bf16* dv, ll dv_stride, const bf16* q, ll q_stride,
                                              const bf16* k, ll k_stride, const bf16* v, ll v_stride, const bf16* dout,
                                              ll dout_stride, const float* lse, const float* delta, const int4* tiles, int tokens,
                                              int heads, int group, float scale) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int ROWS = D == 64 ? 64 : 32, THREADS = 256, STAGE = ROWS * D * 4 + 1024;
    const int kv_heads = heads / group, kv_head = blockIdx.x % kv_heads;
    const int4 tile = tiles[blockIdx.x / kv_heads];
    const int start = tile.x, end = tile.y, seq_end = tile.w;
    k += (size_t)kv_head * D, v += (size_t)kv_head * D, dk += (size_t)kv_head * D, dv += (size_t)kv_head * D;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_first = start + warp * 16;
    // Each stage: q, dout, lse, delta.
    const unsigned k_rows = shared_address(shared), v_rows = k_rows + TILE * D * 2, stages = v_rows + TILE * D * 2;
    const unsigned k_own = k_rows + warp * 16 * D * 2, v_own = v_rows + warp * 16 * D * 2;
    const float factor = scale * LOG2E;
    float dk_acc[D / 8][4] = {}, dv_acc[D / 8][4] = {};

    int head = kv_head * group, first = start;
    auto copy_stage = [&](unsigned stage, int head, int first) {
        copy_rows<D, ROWS, THREADS>(stage, q + (size_t)head * D, q_stride, first, seq_end);
        copy_rows<D, ROWS, THREADS>(stage + ROWS * D * 2, dout + (size_t)head * D, dout_stride, first, seq_end);
        if (threadIdx.x < 2 * ROWS) {
            const int row = threadIdx.x % ROWS;
            const bool there = first + row < seq_end;
            const float* from = (threadIdx.x < ROWS ? lse : delta) + (size_t)head * tokens + first + row;
            copy4(stage + ROWS * D * 4 + threadIdx.x * 4, there ? from : lse, there);
        }
    };
    copy_rows<D, TILE, THREADS>(k_rows, k, k_stride, start, end);
    copy_rows<D, TILE, THREADS>(v_rows, v, v_stride, start, end);
    copy_stage(stages, head, first);
    commit_copies();
    const unsigned k_place = place_a<D>(k_own), v_place = place_a<D>(v_own);
    unsigned k_regs[D / 16][4], v_regs[D / 16][4];
    const int blocks = (seq_end - start + ROWS - 1) / ROWS * group;
    for (int i = 0; i < blocks; i++) {
        const unsigned stage = stages + (i & 1) * STAGE;
        int next_head = head, next_first = first + ROWS;
        if (next_first >= seq_end) next_head++, next_first = start;
        await_copies<0>();
        __syncthreads();
        if (i + 1 < blocks) copy_stage(stages + (~i & 1) * STAGE, next_head, next_first);
        commit_copies();
        if (i == 0) {
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                load_matrices(k_regs[c], k_place ^ (c * 32));
                load_matrices(v_regs[c], v_place ^ (c * 32));
            }
        }
        if (first + ROWS - 1 >= warp_first) {
            const unsigned q_place = place_b<D>(stage), dout_place = place_b<D>(stage + ROWS * D * 2);
            const unsigned q_turned = place_a<D>(stage), dout_turned = place_a<D>(stage + ROWS * D * 2);
            const unsigned stats = stage + ROWS * D * 4 + (lane & 3) * 8;
            float p[ROWS / 8][4] = {}, ds[ROWS / 8][4] = {};
            add_abt<D, ROWS>(p, k_regs, q_place);
            add_abt<D, ROWS>(ds, v_regs, dout_place);
            const bool masked = first < warp_first + 15;
            differentiate_transposed<ROWS>(p, ds, stats, factor, masked, first, warp_first, lane);
            add_ab<D, ROWS>(dv_acc, p, dout_turned);
            add_ab<D, ROWS>(dk_acc, ds, q_turned);
        }
        head = next_head, first = next_first;
    }
    store_rows<D>(dk, dk_stride, k_own, dk_acc, scale, scale, warp_first, end);
    store_rows<D>(dv, dv_stride, v_own, dv_acc, 1.0f, 1.0f, warp_first, end);
}

// p and ds of scores p and dp = ds. Keys behind a row have p = 0.
template <int KEYS>
__device__ __forceinline__ void differentiate(float (&p)[KEYS / 8][4], float (&ds)[KEYS / 8][4], const float (&row_lse)[2],
                                              const float (&row_delta)[2], float factor, bool masked, int first, int warp_first,
                                              int lane) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            p[n][x] = exp2_fast(fmaf(p[n][x], factor, -row_lse[x >> 1]));
            if (masked && first + n * 8 + (lane & 3) * 2 + (x & 1) > warp_first + lane / 4 + (x >> 1) * 8) p[n][x] = 0.0f;
            ds[n][x] = p[n][x] * (ds[n][x] - row_delta[x >> 1]);
        }
}

// 8 warps of 16 rows with q and dout in registers; keys and values come in blocks, double-buffered where q and dout were at first.
// Blocks are of 32 keys for D 64, so that two of these blocks fit a multiprocessor's registers.
template <int D>
__device__ __forceinline__ void backward_dq(bf16* dq, ll dq_stride, const bf16* q, ll q_stride, const bf16* k, ll k_stride,
                                            const bf16* v, ll v_stride, const bf16* dout, ll dout_stride, const float* lse,
                                            const float* delta, const int4* tiles, int tokens, int heads, int group,
                                            float scale) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int KEYS = D == 64 ? 32 : 64, THREADS = 256, STAGE = KEYS * D * 4;
    const int4 tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, start = tile.x, end = tile.y;
    q += (size_t)head * D, dout += (size_t)head * D, dq += (size_t)head * D, k += (size_t)(head / group) * D,
        v += (size_t)(head / group) * D;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_first = start + warp * 16;
    const unsigned base = shared_address(shared);
    const float factor = scale * LOG2E;
    float acc[D / 8][4] = {}, row_lse[2], row_delta[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = warp_first + h * 8 + lane / 4;
        row_lse[h] = row < end ? lse[(size_t)head * tokens + row] * LOG2E : 0.0f;
        row_delta[h] = row < end ? delta[(size_t)head * tokens + row] : 0.0f;
    }
    unsigned q_regs[D / 16][4], dout_regs[D / 16][4];
    copy_rows<D, TILE, THREADS>(base, q, q_stride, start, end);
    copy_rows<D, TILE, THREADS>(base + TILE * D * 2, dout, dout_stride, start, end);
    commit_copies();
    await_copies<0>();
    __syncthreads();
    const unsigned q_place = place_a<D>(base + warp * 16 * D * 2), dout_place = place_a<D>(base + (TILE + warp * 16) * D * 2);
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        load_matrices(q_regs[c], q_place ^ (c * 32));
        load_matrices(dout_regs[c], dout_place ^ (c * 32));
    }
    __syncthreads();
    copy_rows<D, KEYS, THREADS>(base, k, k_stride, tile.z, end);
    copy_rows<D, KEYS, THREADS>(base + KEYS * D * 2, v, v_stride, tile.z, end);
    commit_copies();
    unsigned stage = 0;
    for (int first = tile.z; first < end; first += KEYS) {
        await_copies<0>();
        __syncthreads();
        if (first + KEYS < end) {
            copy_rows<D, KEYS, THREADS>(base + (stage ^ STAGE), k, k_stride, first + KEYS, end);
            copy_rows<D, KEYS, THREADS>(base + (stage ^ STAGE) + KEYS * D * 2, v, v_stride, first + KEYS, end);
        }
        commit_copies();
        if (first <= warp_first + 15) {
            const unsigned k_place = place_b<D>(base + stage), v_place = place_b<D>(base + stage + KEYS * D * 2),
                           k_turned = place_a<D>(base + stage);
            float p[KEYS / 8][4] = {}, ds[KEYS / 8][4] = {};
            add_abt<D, KEYS>(p, q_regs, k_place);
            add_abt<D, KEYS>(ds, dout_regs, v_place);
            const bool masked = first + KEYS - 1 > warp_first;
            differentiate<KEYS>(p, ds, row_lse, row_delta, factor, masked, first, warp_first, lane);
            add_ab<D, KEYS>(acc, ds, k_turned);
        }
        stage ^= STAGE;
    }
    __syncthreads();
    store_rows<D>(dq, dq_stride, base + warp * 16 * D * 2, acc, scale, scale, warp_first, end);
}

// ----------------------------------------------------------------------------------------------------------- kernels

// tile_count is part of the launch rule and checked by the host; the kernels find their tile from blockIdx.
#define KERNELS(D)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(128, D == 64 ? 3 : 2) attention_mma_forward_d##D(                              \
        bf16* o, ll o_stride, float* lse, const bf16* q, ll q_stride, const bf16* k, ll k_stride, const bf16* v, ll v_stride,   \
        const int4* tiles, int tile_count, int tokens, int heads, int group, float scale) {                                     \
        forward<D>(o, o_stride, lse, q, q_stride, k, k_stride, v, v_stride, tiles, tokens, heads, group, scale);                \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_mma_backward_dkdv_d##D(                                      \
        bf16* dk, ll dk_stride, bf16* dv, ll dv_stride, const bf16* q, ll q_stride, const bf16* k, ll k_stride, const bf16* v,  \
        ll v_stride, const bf16* dout, ll dout_stride, const float* lse, const float* delta, const int4* tiles, int tile_count, \
        int tokens, int heads, int group, float scale) {                                                                        \
        backward_dkdv<D>(dk, dk_stride, dv, dv_stride, q, q_stride, k, k_stride, v, v_stride, dout, dout_stride, lse, delta,    \
                         tiles, tokens, heads, group, scale);                                                                   \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, D == 64 ? 2 : 1) attention_mma_backward_dq_d##D(                          \
        bf16* dq, ll dq_stride, const bf16* q, ll q_stride, const bf16* k, ll k_stride, const bf16* v, ll v_stride,             \
        const bf16* dout, ll dout_stride, const float* lse, const float* delta, const int4* tiles, int tile_count, int tokens,  \
        int heads, int group, float scale) {                                                                                    \
        backward_dq<D>(dq, dq_stride, q, q_stride, k, k_stride, v, v_stride, dout, dout_stride, lse, delta, tiles, tokens,      \
                       heads, group, scale);                                                                                    \
    }

KERNELS(64)
KERNELS(128)
