// Causal attention over packed sequences, backward, for Hopper (sm_90a): dk and dv, after attention_hopper_dq.cu, which
// computes delta. TMA loads, wgmma products, no (T, T) matrix in memory, no atomics. The same input gives the same bits.
//
//   S = scale * q k^T,  P = exp(S - lse),  o = P v                      (forward; lse: log-sum-exp of a row of S)
//   delta = rowsum(do * o),  dP = do v^T,  dS = P * (dP - delta),  dv = P^T do,  dk = scale * dS^T q
//
// Shapes: q, do (T, H, D); k, v, dk, dv (T, KV, D), all bf16 with a row stride; lse, delta (H, T) f32. q head h uses kv head
// h / group, group = H / KV. D is 64 or 128. Products take bf16 operands (P and dS are rounded) and sum in f32.
// dk and dv are overwritten; rows outside of all tiles and columns outside of the heads are not touched.
// A token attends to the tokens of its own sequence up to itself; sequences may begin at any row.
//
// Launch rule of attention_hopper_backward_dkdv_d{64,128}:
//   q, k, v, d_o     tensor maps: 2D, bf16, heads * D (KV * D) columns, T rows, row stride in bytes, box 64 columns x 64
//                    rows, SWIZZLE_128B, no interleave, zeros out of bounds
//   tiles            (start, end, seq_start, seq_end): kv rows start..end of the sequence seq_start..seq_end, at least one, at
//                    most 128; together they cover every row once, those with the most rows start..seq_end first
//   grid             tile_count * KV
//   block            384 threads: a warpgroup that loads, two that compute
//   shared           dynamic bytes: 101,456 (D = 64) and 199,760 (D = 128)
//   pointers         16-byte aligned, strides multiples of 8 elements
//
// CPU twin: engine/src/ops/attention.rs
// Source: Dao, "FlashAttention-2" (2023), section 3.1.2; Shah et al., "FlashAttention-3" (2024), for the use of wgmma.

#include "attention_hopper_backward.cuh"

// ---------------------------------------------------------------------------------------------------- device helpers

namespace {

template <int D>
using LayoutDkdv = Layout<D, 2, true>;

static_assert(LayoutDkdv<64>::BYTES == 101456 && LayoutDkdv<128>::BYTES == 199760, "the launch rule above says so");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ float2 load_shared_2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// A work item: a kv tile of one kv head, 64 rows for each computing warpgroup. It loops over the q tiles of the sequence from
// the last back to the kv tile, and over the q heads of the group in each: blocks that run at the same time so read the same q
// tiles at about the same time, out of the L2 cache. S and dP are computed transposed (rows kv, columns q), so that P^T and
// dS^T come out in registers as the A operands of dv and dk.
struct ItemDkdv {
    int4 tile;
    int kv_head, first_head, group, q_tiles;

    __device__ __forceinline__ ItemDkdv(const int4* tiles, int heads, int group) : group(group) {
        const int item = blockIdx.x, kv_heads = heads / group;
        kv_head = item % kv_heads;
        first_head = kv_head * group;
        tile = tiles[item / kv_heads];
        q_tiles = (tile.w - tile.x + STREAM_ROWS - 1) / STREAM_ROWS;
    }
};

// Where things lie in shared memory.
template <int D>
struct PlacesDkdv {
    using Shared = LayoutDkdv<D>;
    uint32_t k, v, slots, statistics;
    Barriers barriers;

    __device__ __forceinline__ explicit PlacesDkdv(uint32_t base)
        : k(base),
          v(base + Shared::TILE_BYTES),
          slots(base + Shared::SLOTS_AT),
          statistics(base + Shared::STATISTICS_AT),
          barriers{base + Shared::BARRIERS_AT} {}
};

// One thread: loads the tile's k and v, and q and do step by step, as the slots fall empty.
template <int D>
__device__ __forceinline__ void load_tiles(const PlacesDkdv<D>& places, const ItemDkdv& item, const CUtensorMap* map_q,
                                           const CUtensorMap* map_k, const CUtensorMap* map_v, const CUtensorMap* map_do) {
    using Shared = LayoutDkdv<D>;
    const Barriers& barriers = places.barriers;
    Ring ring;
    mbarrier_arrive_expect(barriers.tile_full(), 2 * Shared::TILE_BYTES);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = item.tile.x + 64 * i, offset = i * 64 * PANEL_ROW_BYTES;
        load_rows<D, TILE_ROWS>(places.k + offset, map_k, barriers.tile_full(), item.kv_head, row);
        load_rows<D, TILE_ROWS>(places.v + offset, map_v, barriers.tile_full(), item.kv_head, row);
    }
    for (int q_tile = item.q_tiles - 1; q_tile >= 0; q_tile--) {
        for (int head = item.first_head; head < item.first_head + item.group; head++) {
            const uint32_t at = places.slots + ring.slot * Shared::SLOT_BYTES, full = barriers.full(ring.slot);
            const int q0 = item.tile.x + q_tile * STREAM_ROWS;
            mbarrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
            mbarrier_arrive_expect(full, Shared::SLOT_BYTES);
            load_rows<D, STREAM_ROWS>(at, map_q, full, head, q0);
            load_rows<D, STREAM_ROWS>(at + Shared::STREAM_BYTES, map_do, full, head, q0);
            ring.next();
        }
    }
}

// One warp: brings lse and delta of each step's q rows. lse in units of log2, infinite for rows behind the sequence: their P
// is exp2(-inf) = 0. The arrays are the caller's: as locals here they make nvcc order the code of store_result otherwise.
template <int D>
__device__ __forceinline__ void load_statistics(const PlacesDkdv<D>& places, const ItemDkdv& item, const float* lse,
                                                const float* delta, int tokens, int lane,
                                                float (&row_lse)[STREAM_ROWS / 32], float (&row_delta)[STREAM_ROWS / 32]) {
    const Barriers& barriers = places.barriers;
    Ring ring;
    for (int q_tile = item.q_tiles - 1; q_tile >= 0; q_tile--) {
        for (int head = item.first_head; head < item.first_head + item.group; head++) {
#pragma unroll
            for (int i = 0; i < STREAM_ROWS / 32; i++) {
                const int row = item.tile.x + q_tile * STREAM_ROWS + lane + 32 * i;
                const size_t at = static_cast<size_t>(head) * tokens + row;
                row_lse[i] = row < item.tile.w ? lse[at] * LOG2E : infinity();
                row_delta[i] = row < item.tile.w ? delta[at] : 0.0f;
            }
            const uint32_t at = places.statistics + ring.slot * LayoutDkdv<D>::STATISTICS_BYTES + lane * 4;
            mbarrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
#pragma unroll
            for (int i = 0; i < STREAM_ROWS / 32; i++) {
                store_shared(at + 128 * i, row_lse[i]);
                store_shared(at + 128 * i + STREAM_ROWS * 4, row_delta[i]);
            }
            mbarrier_arrive(barriers.full(ring.slot));
            ring.next();
        }
    }
}

// S where the q tile begins at the first row of the warpgroup: what comes before a kv row is not seen. The first row and column
// are those of this thread.
__device__ __forceinline__ void mask(float (&s)[STREAM_ROWS / 2], int first_row, int first_column) {
#pragma unroll
    for (int i = 0; i < STREAM_ROWS / 2; i++) {
        const int q = first_column + 8 * (i / 4) + i % 2, kv = first_row + 8 * (i % 4 / 2);
        s[i] = q >= kv ? s[i] : -infinity();
    }
}

// P of S, as an operand; `at_lse`: of this thread's first column.
__device__ __forceinline__ void compute_p(uint32_t (&p_operand)[STREAM_ROWS / 4], float (&s)[STREAM_ROWS / 2], float scale_log2,
                                          uint32_t at_lse) {
#pragma unroll
    for (int i = 0; i < STREAM_ROWS / 2; i += 4) {
        const float2 lse_log2 = load_shared_2(at_lse + 8 * i);
        s[i] = exp2_fast(fmaf(s[i], scale_log2, -lse_log2.x));
        s[i + 1] = exp2_fast(fmaf(s[i + 1], scale_log2, -lse_log2.y));
        s[i + 2] = exp2_fast(fmaf(s[i + 2], scale_log2, -lse_log2.x));
        s[i + 3] = exp2_fast(fmaf(s[i + 3], scale_log2, -lse_log2.y));
        p_operand[i / 2] = pack_bf16(s[i], s[i + 1]);
        p_operand[i / 2 + 1] = pack_bf16(s[i + 2], s[i + 3]);
    }
    hold(p_operand);
}

// dS of P and dP, as an operand; `at_delta` as in compute_p.
__device__ __forceinline__ void compute_ds(uint32_t (&ds_operand)[STREAM_ROWS / 4], const uint32_t (&p_operand)[STREAM_ROWS / 4],
                                           const float (&dp)[STREAM_ROWS / 2], uint32_t at_delta) {
#pragma unroll
    for (int i = 0; i < STREAM_ROWS / 2; i += 4) {
        const float2 row = load_shared_2(at_delta + 8 * i);
        const uint32_t p = p_operand[i / 2], p_below = p_operand[i / 2 + 1];
        ds_operand[i / 2] = pack_bf16(low_half(p) * (dp[i] - row.x), high_half(p) * (dp[i + 1] - row.y));
        ds_operand[i / 2 + 1] = pack_bf16(low_half(p_below) * (dp[i + 2] - row.x), high_half(p_below) * (dp[i + 3] - row.y));
    }
    hold(ds_operand);
}

// At D = 64 there are registers for k and v too; that halves what S and dP read from shared memory.
template <int D>
constexpr bool TILE_IN_REGISTERS = D == 64;
template <int D>
constexpr int TILE_OPERAND = TILE_IN_REGISTERS<D> ? D / 4 : 1;

// Begins c = a b^T: a is the 64 rows of this warpgroup of a tile, in registers where there is room for them.
template <int D>
__device__ __forceinline__ void start_product(float (&c)[STREAM_ROWS / 2], const uint32_t (&a)[TILE_OPERAND<D>], uint32_t tile,
                                              int warpgroup, uint32_t b) {
    hold(c);
    wgmma_fence();
    if constexpr (TILE_IN_REGISTERS<D>) {
        product_abt<D>(c, a, b);
    } else {
        product_abt<D>(c, tile + warpgroup * 64 * PANEL_ROW_BYTES, b);
    }
    wgmma_commit();
}

// A thread of a computing warpgroup, with its first row and column in a result.
struct ThreadDkdv {
    int warpgroup, row, column;
    float scale_log2;
};

// A step, and what of `compute` it works on: all references in this order, as a lambda has them (ptxas chooses other registers otherwise).
template <int D>
struct StepDkdv {
    using Shared = LayoutDkdv<D>;
    const PlacesDkdv<D>& places;
    Ring& ring;
    // The slot that products under way still read.
    int& held;
    const ThreadDkdv& thread;
    float (&dk)[D / 2], (&dv)[D / 2], (&s)[STREAM_ROWS / 2], (&dp)[STREAM_ROWS / 2];
    uint32_t (&p_operand)[STREAM_ROWS / 4], (&ds_operand)[STREAM_ROWS / 4];
    const uint32_t (&k_operand)[TILE_OPERAND<D>], (&v_operand)[TILE_OPERAND<D>];

    __device__ __forceinline__ void wait_full() const { mbarrier_wait(places.barriers.full(ring.slot), ring.parity); }

    __device__ __forceinline__ void start_s(int slot) const {
        const uint32_t at_q = places.slots + slot * Shared::SLOT_BYTES;
        start_product<D>(s, k_operand, places.k, thread.warpgroup, at_q);
    }

    __device__ __forceinline__ void start_dp(int slot) const {
        const uint32_t at_do = places.slots + slot * Shared::SLOT_BYTES + Shared::STREAM_BYTES;
        start_product<D>(dp, v_operand, places.v, thread.warpgroup, at_do);
    }

    // At its start S is there, and dk of the step before under way (held: its slot). The tensor cores have work while this
    // warpgroup computes: dk during P, dv and the next S during dS. There are registers for no more than that.
    template <bool MORE>
    __device__ __forceinline__ void run(bool masked) const {
        const int slot = ring.slot;
        const uint32_t at_q = places.slots + slot * Shared::SLOT_BYTES, at_do = at_q + Shared::STREAM_BYTES;
        const uint32_t at_lse = places.statistics + slot * Shared::STATISTICS_BYTES + thread.column * 4;
        const uint32_t at_delta = at_lse + STREAM_ROWS * 4;
        ring.next();
        const bool ready = mbarrier_test_wait(places.barriers.full(ring.slot), ring.parity);
        if (masked) {
            mask(s, thread.row, thread.column);
        }
        compute_p(p_operand, s, thread.scale_log2, at_lse);
        if constexpr (MORE) {
            // Here, because the compiler moves no computation of P behind this branch, which it would behind the next wait.
            if (!ready) {
                wait_full();
            }
        }
        wgmma_wait<0>();
        hold(dk);
        hold(ds_operand);
        if (held >= 0) {
            mbarrier_arrive(places.barriers.empty(held));
        }
        held = slot;
        start_dp(slot);
        hold(dv);
        wgmma_fence();
        product_ab<D>(dv, p_operand, at_do);
        wgmma_commit();
        if constexpr (MORE) {
            start_s(ring.slot);
            wgmma_wait<2>();
        } else {
            wgmma_wait<1>();
        }
        hold(dp);
        compute_ds(ds_operand, p_operand, dp, at_delta);
        hold(dk);
        wgmma_fence();
        product_ab<D>(dk, ds_operand, at_q);
        wgmma_commit();
        if constexpr (MORE) {
            wgmma_wait<1>();
            hold(s);
            hold(p_operand);
        }
    }
};

// A computing warpgroup: dk and dv of its 64 rows. `never` is false.
template <int D>
__device__ __forceinline__ void compute(const PlacesDkdv<D>& places, const ItemDkdv& item, int warp, int lane,
                                        __nv_bfloat16* dk_out, long long dk_stride, __nv_bfloat16* dv_out,
                                        long long dv_stride, float scale, bool never) {
    const Barriers& barriers = places.barriers;
    const int4 tile = item.tile;
    Ring ring;
    int held = -1;
    const int warpgroup = warp / 4 - 1;
    const ThreadDkdv thread = {warpgroup, warp % 4 * 16 + lane / 4, 2 * (lane % 4), scale * LOG2E};
    const int first_row = tile.x + 64 * warpgroup;
    // Steps, that is pairs of a q tile and a head. The rows of this warpgroup see all but the last q tile or tiles.
    const int steps = item.q_tiles * item.group;
    const int seen_steps = first_row < tile.y ? (item.q_tiles - warpgroup) * item.group : 0;
    float dk[D / 2], dv[D / 2], s[STREAM_ROWS / 2], dp[STREAM_ROWS / 2];
    uint32_t p_operand[STREAM_ROWS / 4], ds_operand[STREAM_ROWS / 4], k_operand[TILE_OPERAND<D>], v_operand[TILE_OPERAND<D>];
    const StepDkdv<D> step = {places, ring, held, thread, dk, dv, s, dp, p_operand, ds_operand, k_operand, v_operand};

    set_zero(dk);
    set_zero(dv);
    mbarrier_wait(barriers.tile_full(), 0);
    if constexpr (TILE_IN_REGISTERS<D>) {
        load_operand<D>(k_operand, places.k, warpgroup);
        load_operand<D>(v_operand, places.v, warpgroup);
        hold(k_operand);
        hold(v_operand);
    }
    if (seen_steps > 0) {
        step.wait_full();
        step.start_s(ring.slot);
        wgmma_wait<0>();
        hold(s);
        for (int i = 0; i < seen_steps - 1; i++) {
            step.template run<true>(i >= seen_steps - item.group);
        }
        step.template run<false>(true);
        wgmma_wait<0>();
        hold(dk);
        hold(dv);
        hold(p_operand);
        hold(ds_operand);
        if constexpr (TILE_IN_REGISTERS<D>) {
            read_behind_loop(k_operand, never, dk_out);
            read_behind_loop(v_operand, never, dv_out);
        }
        mbarrier_arrive(barriers.empty(held));
    }
    for (int i = seen_steps; i < steps; i++) {
        step.wait_full();
        mbarrier_arrive(barriers.empty(ring.slot));
        ring.next();
    }
    store_result<D>(dk, scale, dk_out + item.kv_head * D, dk_stride, first_row, tile.y);
    store_result<D>(dv, 1.0f, dv_out + item.kv_head * D, dv_stride, first_row, tile.y);
}

template <int D>
__device__ __forceinline__ void backward_dkdv(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                              const CUtensorMap* map_do, __nv_bfloat16* dk_out, long long dk_stride,
                                              __nv_bfloat16* dv_out, long long dv_stride, const float* lse,
                                              const float* delta, const int4* tiles, int tokens, int heads, int group,
                                              float scale) {
    extern __shared__ uint8_t shared_bytes[];
    const PlacesDkdv<D> places((shared_address(shared_bytes) + 1023) & ~1023u);
    // The TMA warp, and each lane of the warp that brings lse and delta.
    places.barriers.initialise(1 + 32);
    const int warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
    const ItemDkdv item(tiles, heads, group);
    if (warp < 4) {
        registers_decrease<24>();
        if (warp == 0 && lane == 0) {
            load_tiles(places, item, map_q, map_k, map_v, map_do);
        } else if (warp == 1) {
            float row_lse[STREAM_ROWS / 32], row_delta[STREAM_ROWS / 32];
            load_statistics(places, item, lse, delta, tokens, lane, row_lse, row_delta);
        }
        return;
    }
    registers_increase<240>();
    compute(places, item, warp, lane, dk_out, dk_stride, dv_out, dv_stride, scale, tokens < 0);
}

#define BODY(D)                                                                                                           \
    backward_dkdv<D>(&q, &k, &v, &d_o, dk, dk_stride, dv, dv_stride, lse, delta, tiles, tokens, heads, group, scale)

#else

#define BODY(D) __trap()

#endif

}  // namespace

// ------------------------------------------------------------------------------------------------------------ kernels

#define KERNEL(D)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_dkdv_d##D(                          \
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                                     \
        const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap d_o, __nv_bfloat16* dk,                \
        long long dk_stride, __nv_bfloat16* dv, long long dv_stride, const float* lse, const float* delta,                \
        const int4* tiles, int tokens, int heads, int group, float scale) {                                               \
        BODY(D);                                                                                                          \
    }

KERNEL(64)
KERNEL(128)
