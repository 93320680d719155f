// Causal attention over packed sequences, backward, for Hopper (sm_90a): TMA loads, wgmma products, no (T, T) matrix in
// memory, no atomics. The same input gives the same bits.
//
//   S = scale * q k^T,  P = exp(S - lse),  o = P v                      (forward; lse is the log-sum-exp of a row of S)
//   delta = rowsum(do * o),  dP = do v^T,  dS = P * (dP - delta)
//   dv = P^T do,  dk = scale * dS^T q,  dq = scale * dS k
//
// Shapes: q, o, do, dq (T, H, D); k, v, dk, dv (T, KV, D), all bf16 with a row stride; lse, delta (H, T) f32; q head h uses
// kv head h / group. D is 64 or 128 (delta: any multiple of 8). Products take bf16 operands (P and dS are rounded to bf16)
// and sum in f32. dq, dk and dv are overwritten; nothing outside the rows of `tiles` and the columns of the heads is.
// A token attends to the tokens of its own sequence up to itself; sequences may begin at any row.
//
// Three kernels, in this order: delta, then dkdv and dq in any order. Each of the two recomputes S and dP from lse, so that
// dk and dv are sums over q tiles and dq is a sum over kv tiles, both in a fixed order inside one block.
//
// Launch rule of attention_hopper_backward_{dkdv,dq}_d{64,128}:
//   q, k, v, d_o   tensor maps: 2D, bf16, columns heads * D (KV * D), rows T, row stride in bytes, box 64 columns x 64 rows,
//                  SWIZZLE_128B, no interleave, zeros out of bounds
//   tiles          (start, end, seq_start, seq_end): rows start..end, at most 128, of the sequence seq_start..seq_end; kv rows
//                  for dkdv, q rows for dq. Together they cover every row once. Heaviest first: most q rows from
//                  `start` on (dkdv), most kv rows up to `end` (dq)
//   grid           min(tile_count * KV, multiprocessors) for dkdv, min(tile_count * H, multiprocessors) for dq
//   block          384 threads (a warpgroup that loads, two that compute)
//   shared         dynamic: see the table at the kernels; above 48 KB, so the host raises the function's limit first
//   pointers       16-byte aligned, strides multiples of 8 elements
// Launch rule of attention_backward_delta_bf16: any grid of 256-thread blocks; T * H / 64 blocks fill the chip at D = 128.
//
// CPU twin: engine/src/ops/attention.rs
// Source: Dao, "FlashAttention-2" (2023), section 3.1.2; Shah et al., "FlashAttention-3" (2024), for the use of wgmma.

#include "hopper.cuh"

// ---------------------------------------------------------------------------------------------------- device helpers

constexpr float LOG2E = 1.4426950408889634f;
constexpr int THREADS = 384;
// Rows of a work item: 64 for each of the two computing warpgroups.
constexpr int BLOCK_ROWS = 128;
constexpr int CONSUMER_WARPS = 8;
// Rows of a TMA box; its columns are the 64 of a panel.
constexpr int BOX_ROWS = 64;
constexpr int PANEL_ROW_BYTES = 128;

// Shared bytes: the tile of the item (two tensors), STAGES tiles of what it loops over (two tensors), for dkdv lse and
// delta of each stage, the barriers, and room to align the tiles to the 1024 bytes that the swizzle wants.
template <int D, int STAGES, int ROWS, int TILES, bool STATISTICS>
struct Layout {
    static constexpr int TILE_BYTES = BLOCK_ROWS * D * 2;
    static constexpr int STREAM_BYTES = ROWS * D * 2;
    static constexpr int STREAM = TILES * TILE_BYTES;
    static constexpr int STATISTICS_AT = STREAM + STAGES * 2 * STREAM_BYTES;
    static constexpr int BARRIERS = STATISTICS_AT + (STATISTICS ? STAGES * 2 * ROWS * 4 : 0);
    static constexpr int BYTES = BARRIERS + (2 * STAGES + 2) * 8 + 1024;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float2 load_shared_2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// Tells the compiler that registers which an asynchronous product reads or writes are in use up to here.
template <int N>
__device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(x[i])::"memory");
    }
}

template <int N>
__device__ __forceinline__ void hold(uint32_t (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+r"(x[i])::"memory");
    }
}

// The result layout of a product is the A operand layout of the next: only the type changes.
template <int N>
__device__ __forceinline__ void to_operand(const float (&x)[N], uint32_t (&a)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        a[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    }
}

// c (64, N) = a (64, D) b (N, D)^T: 64 rows of a K-major tile of A_ROWS rows, all N rows of a K-major tile.
template <int D, int N, int A_ROWS>
__device__ __forceinline__ void product_abt(float (&c)[N / 2], uint64_t a, uint64_t b) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const int within = (k % 4) * 32;
        const int panel = k / 4;
        WgmmaShared<N, K_MAJOR, K_MAJOR>::run(c, a + ((panel * A_ROWS * PANEL_ROW_BYTES + within) >> 4),
                                              b + ((panel * N * PANEL_ROW_BYTES + within) >> 4), k != 0);
    }
}

// The same with the rows of a in registers.
template <int D, int N>
__device__ __forceinline__ void product_abt(float (&c)[N / 2], const uint32_t (&a)[D / 4], uint64_t b) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        WgmmaRegisters<N, K_MAJOR>::run(c, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                        b + ((k / 4 * N * PANEL_ROW_BYTES + k % 4 * 32) >> 4), k != 0);
    }
}

// Reads 64 rows of a tile, from `first_row` on, as the A operand of this warpgroup.
template <int D>
__device__ __forceinline__ void load_operand(uint32_t (&a)[D / 4], uint32_t tile, int first_row) {
    const int lane = threadIdx.x % 32;
    // Lanes 0-15 address the rows of the left 8 columns of a step, lanes 16-31 those of the right.
    const int row = first_row + threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const int chunk = (k % 4 * 2 + lane / 16) ^ (row % 8);
        ldmatrix_x4(tile + (k / 4 * BLOCK_ROWS + row) * PANEL_ROW_BYTES + chunk * 16, a[4 * k], a[4 * k + 1], a[4 * k + 2],
                    a[4 * k + 3]);
    }
}

// Sums over the columns of the products of an A operand with the same 64 rows of another tile: of the rows lane / 4 and 8 more.
template <int D>
__device__ __forceinline__ void row_dots(float (&sums)[2], const uint32_t (&a)[D / 4], uint32_t tile, int first_row) {
    uint32_t b[D / 4];
    load_operand<D>(b, tile, first_row);
    sums[0] = 0.0f;
    sums[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 4; i++) {
        const float low = __uint_as_float(a[i] << 16), high = __uint_as_float(a[i] & 0xffff0000u);
        sums[i % 2] = fmaf(low, __uint_as_float(b[i] << 16), sums[i % 2]);
        sums[i % 2] = fmaf(high, __uint_as_float(b[i] & 0xffff0000u), sums[i % 2]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2);
    }
}

// c (64, D) += a (64, K) b (K, D): a in registers, b a tile of K rows.
template <int D, int K>
__device__ __forceinline__ void product_ab(float (&c)[D / 2], const uint32_t (&a)[K / 4], uint64_t b) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
        WgmmaRegisters<D, MN_MAJOR>::run(c, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                         b + ((k * 16 * PANEL_ROW_BYTES) >> 4), 1);
    }
}

// Loads ROWS rows from `row` of the D columns from `column` into panels.
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column, int row) {
#pragma unroll
    for (int panel = 0; panel < D / 64; panel++) {
#pragma unroll
        for (int box = 0; box < ROWS / BOX_ROWS; box++) {
            tma_load_2d(destination + (panel * ROWS + box * BOX_ROWS) * PANEL_ROW_BYTES, map, barrier, column + panel * 64,
                        row + box * BOX_ROWS);
        }
    }
}

// The same for BOX_ROWS rows, into panels of BLOCK_ROWS rows.
template <int D>
__device__ __forceinline__ void load_boxes(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column, int row) {
#pragma unroll
    for (int panel = 0; panel < D / 64; panel++) {
        tma_load_2d(destination + panel * BLOCK_ROWS * PANEL_ROW_BYTES, map, barrier, column + panel * 64, row);
    }
}

// The item of a block in a round, back and forth, so that with the heaviest items first all blocks get about the same work.
__device__ __forceinline__ int item_of_round(int round) {
    const int blocks = gridDim.x, block = blockIdx.x;
    return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

// Writes the 64 x D result of a warpgroup times `scale` to rows first_row.. of `out`, only those below `end`.
// The four lanes of a quad exchange their column pairs so that each writes 16 bytes.
template <int D>
__device__ __forceinline__ void store_result(const float (&x)[D / 2], float scale, __nv_bfloat16* out, long long stride,
                                             int first_row, int end) {
    const int lane = threadIdx.x % 32, part = lane % 4;
    const int row = first_row + (threadIdx.x % 128 / 32) * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        __nv_bfloat16* to = out + static_cast<size_t>(row + 8 * half) * stride + 8 * part;
#pragma unroll
        for (int block = 0; block < D / 32; block++) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = 4 * (4 * block + i) + 2 * half;
                words[i] = pack_bf16(x[at] * scale, x[at + 1] * scale);
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const uint32_t received = __shfl_xor_sync(0xffffffffu, part & 1 ? words[i] : words[i + 1], 1);
                (part & 1 ? words[i] : words[i + 1]) = received;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t received = __shfl_xor_sync(0xffffffffu, part & 2 ? words[i] : words[i + 2], 2);
                (part & 2 ? words[i] : words[i + 2]) = received;
            }
            if (row + 8 * half < end) {
                *reinterpret_cast<uint4*>(to + 32 * block) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

template <bool VALUE>
struct Flag {
    static constexpr bool value = VALUE;
};

// A ring of STAGES slots, with the parity that a full slot has in this turn.
template <int STAGES>
struct Ring {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }
};

struct Barriers {
    uint32_t tile_full, tile_empty, full, empty;
    __device__ __forceinline__ uint32_t full_at(int slot) const { return full + 8 * slot; }
    __device__ __forceinline__ uint32_t empty_at(int slot) const { return empty + 8 * slot; }
};

template <int STAGES>
__device__ __forceinline__ Barriers make_barriers(uint32_t at, int arrivals_full) {
    const Barriers barriers = {at, at + 8, at + 16, at + 16 + 8 * STAGES};
    if (threadIdx.x == 0) {
        mbarrier_init(barriers.tile_full, 1);
        mbarrier_init(barriers.tile_empty, CONSUMER_WARPS);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(barriers.full_at(i), arrivals_full);
            mbarrier_init(barriers.empty_at(i), CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    return barriers;
}

__device__ __forceinline__ void arrive_of_warp(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) {
        mbarrier_arrive(barrier);
    }
}

// ------------------------------------------------------------------------------------------------------------- dkdv

// The first row of the last q tile of an item.
template <int BLOCK_Q>
__device__ __forceinline__ int last_tile(int4 tile) {
    return tile.x + (tile.w - 1 - tile.x) / BLOCK_Q * BLOCK_Q;
}

// Work item: (kv tile, kv head); loops over the q tiles from the end of the sequence back to the kv tile, and over the q heads
// of the group in each: blocks that run at the same time read the same q tiles at about the same time, out of the L2 cache.
// S and dP are computed transposed (rows kv, columns q): so P^T and dS^T come out in registers as the A operands of dv and dk.
template <int D, int BLOCK_Q, int STAGES>
__device__ __forceinline__ void backward_dkdv(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                              const CUtensorMap* map_do, __nv_bfloat16* dk_out, long long dk_stride,
                                              __nv_bfloat16* dv_out, long long dv_stride, const float* lse,
                                              const float* delta, const int4* tiles, int tile_count, int tokens, int heads,
                                              int group, float scale) {
    using Shared = Layout<D, STAGES, BLOCK_Q, 2, true>;
    extern __shared__ uint8_t shared_bytes[];
    const uint32_t shared = (shared_address(shared_bytes) + 1023) & ~1023u;
    const uint32_t shared_k = shared, shared_v = shared + Shared::TILE_BYTES;
    const uint32_t stream = shared + Shared::STREAM, statistics = shared + Shared::STATISTICS_AT;
    const Barriers barriers = make_barriers<STAGES>(shared + Shared::BARRIERS, 1 + 32);
    const int kv_heads = heads / group, items = tile_count * kv_heads;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    Ring<STAGES> ring;

    if (warp < 4) {
        registers_decrease<24>();
        if (warp == 0 && lane == 0) {
            uint32_t tile_parity = 1;
            for (int round = 0; item_of_round(round) < items; round++) {
                const int item = item_of_round(round), kv_head = item % kv_heads;
                const int4 tile = tiles[item / kv_heads];
                mbarrier_wait(barriers.tile_empty, tile_parity);
                tile_parity ^= 1;
                mbarrier_arrive_expect(barriers.tile_full, 2 * Shared::TILE_BYTES);
                load_tile<D, BLOCK_ROWS>(shared_k, map_k, barriers.tile_full, kv_head * D, tile.x);
                load_tile<D, BLOCK_ROWS>(shared_v, map_v, barriers.tile_full, kv_head * D, tile.x);
                for (int q0 = last_tile<BLOCK_Q>(tile); q0 >= tile.x; q0 -= BLOCK_Q) {
                    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                        const uint32_t at = stream + ring.slot * 2 * Shared::STREAM_BYTES, full = barriers.full_at(ring.slot);
                        mbarrier_wait(barriers.empty_at(ring.slot), ring.parity ^ 1);
                        mbarrier_arrive_expect(full, 2 * Shared::STREAM_BYTES);
                        load_tile<D, BLOCK_Q>(at, map_q, full, head * D, q0);
                        load_tile<D, BLOCK_Q>(at + Shared::STREAM_BYTES, map_do, full, head * D, q0);
                        ring.next();
                    }
                }
            }
        } else if (warp == 1) {
            // lse in units of log2, infinite for rows behind the sequence: their P is exp2(-inf) = 0.
            for (int round = 0; item_of_round(round) < items; round++) {
                const int item = item_of_round(round), kv_head = item % kv_heads;
                const int4 tile = tiles[item / kv_heads];
                for (int q0 = last_tile<BLOCK_Q>(tile); q0 >= tile.x; q0 -= BLOCK_Q) {
                    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                        const size_t at_head = static_cast<size_t>(head) * tokens;
                        float row_lse[BLOCK_Q / 32], row_delta[BLOCK_Q / 32];
#pragma unroll
                        for (int i = 0; i < BLOCK_Q / 32; i++) {
                            const int row = q0 + lane + 32 * i;
                            row_lse[i] = row < tile.w ? lse[at_head + row] * LOG2E : __int_as_float(0x7f800000);
                            row_delta[i] = row < tile.w ? delta[at_head + row] : 0.0f;
                        }
                        const uint32_t at = statistics + ring.slot * 2 * BLOCK_Q * 4 + lane * 4;
                        mbarrier_wait(barriers.empty_at(ring.slot), ring.parity ^ 1);
#pragma unroll
                        for (int i = 0; i < BLOCK_Q / 32; i++) {
                            store_shared(at + 128 * i, row_lse[i]);
                            store_shared(at + 128 * i + BLOCK_Q * 4, row_delta[i]);
                        }
                        mbarrier_arrive(barriers.full_at(ring.slot));
                        ring.next();
                    }
                }
            }
        }
        return;
    }

    registers_increase<240>();
    const int warpgroup = warp / 4 - 1;
    const float scale_log2 = scale * LOG2E;
    const uint64_t a_k = descriptor_k_major(shared_k + warpgroup * 64 * PANEL_ROW_BYTES);
    const uint64_t a_v = descriptor_k_major(shared_v + warpgroup * 64 * PANEL_ROW_BYTES);
    // Offsets of this thread in a 64-row result: its first row, its first column.
    const int my_row = (warp % 4) * 16 + lane / 4, my_column = 2 * (lane % 4);
    uint32_t tile_parity = 0;
    float dk[D / 2], dv[D / 2], s[BLOCK_Q / 2], dp[BLOCK_Q / 2];
    uint32_t p_operand[BLOCK_Q / 4], ds_operand[BLOCK_Q / 4];

    const auto start_s = [&](int slot) {
        hold(s);
        wgmma_fence();
        product_abt<D, BLOCK_Q, BLOCK_ROWS>(s, a_k, descriptor_k_major(stream + slot * 2 * Shared::STREAM_BYTES));
        wgmma_commit();
    };
    const auto start_dp = [&](int slot) {
        hold(dp);
        wgmma_fence();
        product_abt<D, BLOCK_Q, BLOCK_ROWS>(dp, a_v, descriptor_k_major(stream + (slot * 2 + 1) * Shared::STREAM_BYTES));
        wgmma_commit();
    };

    for (int round = 0; item_of_round(round) < items; round++) {
        const int item = item_of_round(round), kv_head = item % kv_heads;
        const int4 tile = tiles[item / kv_heads];
        const int first_row = tile.x + 64 * warpgroup;
        // The first q tile that the rows of this warpgroup see, and how many pairs of q tile and head they see of all.
        const int first_q = 64 * warpgroup / BLOCK_Q;
        const int q_tiles = (tile.w - tile.x + BLOCK_Q - 1) / BLOCK_Q, steps = q_tiles * group;
        const int seen_steps = first_row < tile.y ? (q_tiles - first_q) * group : 0;
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            dk[i] = 0.0f;
            dv[i] = 0.0f;
        }
        mbarrier_wait(barriers.tile_full, tile_parity);
        tile_parity ^= 1;

        // One step. At its start S of this step is there and dk of the step before under way (held: its slot). The tensor cores
        // have work while this warpgroup computes: dP during P, dv and the next S during dS.
        int held = -1;
        const auto step = [&](auto more, bool masked) {
            const int slot = ring.slot;
            const uint32_t at_q = stream + slot * 2 * Shared::STREAM_BYTES, at_do = at_q + Shared::STREAM_BYTES;
            const uint32_t at_lse = statistics + slot * 2 * BLOCK_Q * 4 + my_column * 4;
            const uint32_t at_delta = at_lse + BLOCK_Q * 4;
            ring.next();
            if (masked) {
                const int q0 = tile.x + first_q * BLOCK_Q;
#pragma unroll
                for (int i = 0; i < BLOCK_Q / 2; i++) {
                    const int q = q0 + my_column + 8 * (i / 4) + i % 2, kv = first_row + my_row + 8 * (i % 4 / 2);
                    s[i] = q >= kv ? s[i] : -__int_as_float(0x7f800000);
                }
            }
#pragma unroll
            for (int i = 0; i < BLOCK_Q / 2; i += 4) {
                const float2 lse_log2 = load_shared_2(at_lse + 8 * i);
                s[i] = exp2_fast(fmaf(s[i], scale_log2, -lse_log2.x));
                s[i + 1] = exp2_fast(fmaf(s[i + 1], scale_log2, -lse_log2.y));
                s[i + 2] = exp2_fast(fmaf(s[i + 2], scale_log2, -lse_log2.x));
                s[i + 3] = exp2_fast(fmaf(s[i + 3], scale_log2, -lse_log2.y));
                p_operand[i / 2] = pack_bf16(s[i], s[i + 1]);
                p_operand[i / 2 + 1] = pack_bf16(s[i + 2], s[i + 3]);
            }
            hold(p_operand);
            if constexpr (decltype(more)::value) {
                mbarrier_wait(barriers.full_at(ring.slot), ring.parity);
            }
            wgmma_wait<0>();
            hold(dk);
            hold(ds_operand);
            if (held >= 0) {
                arrive_of_warp(barriers.empty_at(held));
            }
            held = slot;
            start_dp(slot);
            hold(dv);
            wgmma_fence();
            product_ab<D, BLOCK_Q>(dv, p_operand, descriptor_mn_major(at_do, BLOCK_Q * PANEL_ROW_BYTES));
            wgmma_commit();
            if constexpr (decltype(more)::value) {
                start_s(ring.slot);
                wgmma_wait<2>();
            } else {
                wgmma_wait<1>();
            }
            hold(dp);
#pragma unroll
            for (int i = 0; i < BLOCK_Q / 2; i += 4) {
                const float2 row_delta = load_shared_2(at_delta + 8 * i);
                const uint32_t upper = p_operand[i / 2], lower = p_operand[i / 2 + 1];
                ds_operand[i / 2] = pack_bf16(__uint_as_float(upper << 16) * (dp[i] - row_delta.x),
                                              __uint_as_float(upper & 0xffff0000u) * (dp[i + 1] - row_delta.y));
                ds_operand[i / 2 + 1] = pack_bf16(__uint_as_float(lower << 16) * (dp[i + 2] - row_delta.x),
                                                  __uint_as_float(lower & 0xffff0000u) * (dp[i + 3] - row_delta.y));
            }
            hold(ds_operand);
            hold(dk);
            wgmma_fence();
            product_ab<D, BLOCK_Q>(dk, ds_operand, descriptor_mn_major(at_q, BLOCK_Q * PANEL_ROW_BYTES));
            wgmma_commit();
            if constexpr (decltype(more)::value) {
                wgmma_wait<1>();
                hold(s);
                hold(p_operand);
            }
        };
        if (seen_steps > 0) {
#pragma unroll
            for (int i = 0; i < BLOCK_Q / 4; i++) {
                p_operand[i] = 0;
                ds_operand[i] = 0;
            }
            mbarrier_wait(barriers.full_at(ring.slot), ring.parity);
            start_s(ring.slot);
            wgmma_wait<0>();
            hold(s);
            for (int i = 0; i < seen_steps - 1; i++) {
                step(Flag<true>(), i >= seen_steps - group);
            }
            step(Flag<false>(), true);
            wgmma_wait<0>();
            hold(dk);
            hold(dv);
            hold(p_operand);
            hold(ds_operand);
            arrive_of_warp(barriers.empty_at(held));
        }
        for (int i = seen_steps; i < steps; i++) {
            mbarrier_wait(barriers.full_at(ring.slot), ring.parity);
            arrive_of_warp(barriers.empty_at(ring.slot));
            ring.next();
        }
        arrive_of_warp(barriers.tile_empty);
        store_result<D>(dk, scale, dk_out + kv_head * D, dk_stride, first_row, tile.y);
        store_result<D>(dv, 1.0f, dv_out + kv_head * D, dv_stride, first_row, tile.y);
    }
}

// --------------------------------------------------------------------------------------------------------------- dq

// Work item: (q tile, q head); loops over the kv tiles of the sequence up to the q tile.
template <int D, int BLOCK_KV, int STAGES>
__device__ __forceinline__ void backward_dq(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                            const CUtensorMap* map_o, const CUtensorMap* map_do, __nv_bfloat16* dq_out,
                                            long long dq_stride, const float* lse, float* delta, const int4* tiles, int tile_count,
                                            int tokens, int heads, int group, float scale) {
    using Shared = Layout<D, STAGES, BLOCK_KV, 3, false>;
    extern __shared__ uint8_t shared_bytes[];
    const uint32_t shared = (shared_address(shared_bytes) + 1023) & ~1023u;
    const uint32_t shared_q = shared, shared_do = shared + Shared::TILE_BYTES;
    const uint32_t shared_o = shared + 2 * Shared::TILE_BYTES, stream = shared + Shared::STREAM;
    const Barriers barriers = make_barriers<STAGES>(shared + Shared::BARRIERS, 1);
    // Heads of a work item, and how far the rows of the second warpgroup are from those of the first.
    const int item_heads = group % 2 == 0 ? 2 : 1, second_rows = item_heads == 2 ? 0 : 64;
    const int head_groups = heads / item_heads, items = tile_count * head_groups;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    Ring<STAGES> ring;

    if (warp < 4) {
        registers_decrease<24>();
        if (warp == 0 && lane == 0) {
            uint32_t tile_parity = 1;
            for (int round = 0; item_of_round(round) < items; round++) {
                const int item = item_of_round(round), head = item % head_groups * item_heads, kv_head = head / group;
                const int4 tile = tiles[item / head_groups];
                mbarrier_wait(barriers.tile_empty, tile_parity);
                tile_parity ^= 1;
                mbarrier_arrive_expect(barriers.tile_full, 3 * Shared::TILE_BYTES);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int column = (head + half * (item_heads - 1)) * D, row = tile.x + half * second_rows;
                    const uint32_t offset = half * BOX_ROWS * PANEL_ROW_BYTES;
                    load_boxes<D>(shared_q + offset, map_q, barriers.tile_full, column, row);
                    load_boxes<D>(shared_do + offset, map_do, barriers.tile_full, column, row);
                    load_boxes<D>(shared_o + offset, map_o, barriers.tile_full, column, row);
                }
                for (int kv0 = tile.z; kv0 < tile.y; kv0 += BLOCK_KV) {
                    const uint32_t at = stream + ring.slot * 2 * Shared::STREAM_BYTES, full = barriers.full_at(ring.slot);
                    mbarrier_wait(barriers.empty_at(ring.slot), ring.parity ^ 1);
                    mbarrier_arrive_expect(full, 2 * Shared::STREAM_BYTES);
                    load_tile<D, BLOCK_KV>(at, map_k, full, kv_head * D, kv0);
                    load_tile<D, BLOCK_KV>(at + Shared::STREAM_BYTES, map_v, full, kv_head * D, kv0);
                    ring.next();
                }
            }
        }
        return;
    }

    registers_increase<240>();
    const int warpgroup = warp / 4 - 1;
    const float scale_log2 = scale * LOG2E;
    const int my_row = (warp % 4) * 16 + lane / 4, my_column = 2 * (lane % 4);
    uint32_t tile_parity = 0;
    float dq[D / 2], s[BLOCK_KV / 2], dp[BLOCK_KV / 2];
    uint32_t q_operand[D / 4], do_operand[D / 4], p_packed[BLOCK_KV / 4], ds_operand[BLOCK_KV / 4];

    const auto start_s = [&](int slot) {
        hold(s);
        wgmma_fence();
        product_abt<D, BLOCK_KV>(s, q_operand, descriptor_k_major(stream + slot * 2 * Shared::STREAM_BYTES));
        wgmma_commit();
    };
    const auto start_dp = [&](int slot) {
        hold(dp);
        wgmma_fence();
        product_abt<D, BLOCK_KV>(dp, do_operand, descriptor_k_major(stream + (slot * 2 + 1) * Shared::STREAM_BYTES));
        wgmma_commit();
    };

    for (int round = 0; item_of_round(round) < items; round++) {
        const int item = item_of_round(round), head = item % head_groups * item_heads + warpgroup * (item_heads - 1);
        const int4 tile = tiles[item / head_groups];
        const int first_row = tile.x + warpgroup * second_rows;
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            dq[i] = 0.0f;
        }
        mbarrier_wait(barriers.tile_full, tile_parity);
        tile_parity ^= 1;
        load_operand<D>(q_operand, shared_q, 64 * warpgroup);
        load_operand<D>(do_operand, shared_do, 64 * warpgroup);
        hold(q_operand);
        hold(do_operand);
        // Of the two rows of this thread; rows behind the tile are computed with any finite values and not stored.
        float row_lse[2], row_delta[2];
        row_dots<D>(row_delta, do_operand, shared_o, 64 * warpgroup);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first_row + my_row + 8 * i;
            const size_t at = static_cast<size_t>(head) * tokens + row;
            row_lse[i] = row < tile.y ? lse[at] * LOG2E : 0.0f;
            if (lane % 4 == 0 && row < tile.y) {
                delta[at] = row_delta[i];
            }
        }
        __syncwarp();
        // The next tile may come in while this one is worked on.
        arrive_of_warp(barriers.tile_empty);
        // kv tiles that the rows of this warpgroup see, of all that are loaded.
        const int steps = (tile.y - tile.z + BLOCK_KV - 1) / BLOCK_KV;
        const int seen_steps = first_row < tile.y ? min(steps, (first_row + 63 - tile.z) / BLOCK_KV + 1) : 0;

        // One step. At its start S is there and dq of the step before under way (held: its slot).
        int held = -1, kv0 = tile.z;
        const auto step = [&](auto more) {
            const int slot = ring.slot;
            ring.next();
            if (kv0 + BLOCK_KV - 1 > first_row) {
#pragma unroll
                for (int i = 0; i < BLOCK_KV / 2; i++) {
                    const int kv = kv0 + my_column + 8 * (i / 4) + i % 2, q = first_row + my_row + 8 * (i % 4 / 2);
                    s[i] = q >= kv ? s[i] : -__int_as_float(0x7f800000);
                }
            }
            kv0 += BLOCK_KV;
#pragma unroll
            for (int i = 0; i < BLOCK_KV / 2; i++) {
                s[i] = exp2_fast(fmaf(s[i], scale_log2, -row_lse[i % 4 / 2]));
            }
            to_operand(s, p_packed);
            hold(p_packed);
            if constexpr (decltype(more)::value) {
                mbarrier_wait(barriers.full_at(ring.slot), ring.parity);
            }
            wgmma_wait<0>();
            hold(dq);
            if (held >= 0) {
                arrive_of_warp(barriers.empty_at(held));
            }
            held = slot;
            start_dp(slot);
            if constexpr (decltype(more)::value) {
                start_s(ring.slot);
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            hold(dp);
#pragma unroll
            for (int i = 0; i < BLOCK_KV / 4; i++) {
                const float change = row_delta[i % 2];
                ds_operand[i] = pack_bf16(__uint_as_float(p_packed[i] << 16) * (dp[2 * i] - change),
                                          __uint_as_float(p_packed[i] & 0xffff0000u) * (dp[2 * i + 1] - change));
            }
            hold(ds_operand);
            hold(dq);
            wgmma_fence();
            product_ab<D, BLOCK_KV>(dq, ds_operand,
                                    descriptor_mn_major(stream + slot * 2 * Shared::STREAM_BYTES, BLOCK_KV * PANEL_ROW_BYTES));
            wgmma_commit();
            if constexpr (decltype(more)::value) {
                wgmma_wait<1>();
                hold(s);
            }
        };
        if (seen_steps > 0) {
            mbarrier_wait(barriers.full_at(ring.slot), ring.parity);
            start_s(ring.slot);
            wgmma_wait<0>();
            hold(s);
            for (int i = 0; i < seen_steps - 1; i++) {
                step(Flag<true>());
            }
            step(Flag<false>());
            wgmma_wait<0>();
            hold(dq);
            arrive_of_warp(barriers.empty_at(held));
        }
        for (int i = seen_steps; i < steps; i++) {
            mbarrier_wait(barriers.full_at(ring.slot), ring.parity);
            arrive_of_warp(barriers.empty_at(ring.slot));
            ring.next();
        }
        store_result<D>(dq, scale, dq_out + head * D, dq_stride, first_row, tile.y);
    }
}

#endif

// ------------------------------------------------------------------------------------------------------------ kernels

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DKDV_BODY(D, BLOCK_Q, STAGES)                                                                                       \
    backward_dkdv<D, BLOCK_Q, STAGES>(&q, &k, &v, &d_o, dk, dk_stride, dv, dv_stride, lse, delta, tiles, tile_count, tokens, \
                                      heads, group, scale)
#define DQ_BODY(D, BLOCK_KV, STAGES)                                                                                         \
    backward_dq<D, BLOCK_KV, STAGES>(&q, &k, &v, &o, &d_o, dq, dq_stride, lse, delta, tiles, tile_count, tokens, heads, group, scale)
#else
#define DKDV_BODY(D, BLOCK_Q, STAGES) __trap()
#define DQ_BODY(D, BLOCK_KV, STAGES) __trap()
#endif

#define DKDV_KERNEL(D, BLOCK_Q, STAGES)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_dkdv_d##D(                           \
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v, \
        const __grid_constant__ CUtensorMap d_o, __nv_bfloat16* dk, long long dk_stride, __nv_bfloat16* dv,                 \
        long long dv_stride, const float* lse, const float* delta, const int4* tiles, int tile_count, int tokens, int heads, \
        int group, float scale) {                                                                                          \
        DKDV_BODY(D, BLOCK_Q, STAGES);                                                                                     \
    }

#define DQ_KERNEL(D, BLOCK_KV, STAGES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_dq_d##D(                             \
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v, \
        const __grid_constant__ CUtensorMap o, const __grid_constant__ CUtensorMap d_o, __nv_bfloat16* dq,                  \
        long long dq_stride, const float* lse, float* delta, const int4* tiles, int tile_count, int tokens, int heads,      \
        int group, float scale) {                                                                                          \
        DQ_BODY(D, BLOCK_KV, STAGES);                                                                                      \
    }

#ifndef DQ_KV
#define DQ_KV 64
#define DQ_STAGES 3
#endif
DKDV_KERNEL(64, 64, 4)
#ifndef DKDV_STAGES
#define DKDV_STAGES 4
#endif
DKDV_KERNEL(128, 64, DKDV_STAGES)
DQ_KERNEL(64, 64, 4)
DQ_KERNEL(128, DQ_KV, DQ_STAGES)
