// Causal attention over packed sequences, backward, for Hopper (sm_90a): dq, and delta, which attention_hopper_dkdv.cu reads.
// TMA loads, wgmma products, no (T, T) matrix in memory, no atomics. The same input gives the same bits.
//
//   S = scale * q k^T,  P = exp(S - lse),  o = P v                      (forward; lse: log-sum-exp of a row of S)
//   delta = rowsum(do * o),  dP = do v^T,  dS = P * (dP - delta),  dq = scale * dS k
//
// Shapes: q, o, do, dq (T, H, D); k, v (T, KV, D), all bf16 with a row stride; lse, delta (H, T) f32. q head h uses kv head
// h / group, group = H / KV. D is 64 or 128. Products take bf16 operands (dS is rounded) and sum in f32.
// dq and delta are overwritten; rows outside of all tiles and columns outside of the heads are not touched.
// A token attends to the tokens of its own sequence up to itself; sequences may begin at any row.
//
// Launch rule of attention_hopper_backward_dq_d{64,128}:
//   q, k, v, o, d_o  tensor maps: 2D, bf16, heads * D (KV * D) columns, T rows, row stride in bytes, box 64 columns x 64
//                    rows, SWIZZLE_128B, no interleave, zeros out of bounds
//   tiles            (start, end, seq_start, seq_end): q rows start..end of the sequence seq_start..seq_end, at least one, at
//                    most the tile height: 64 where group is even, else 128; together they cover every row once, those with
//                    the most rows seq_start..end first
//   grid             min(tile_count * H / (2 where group is even, else 1), multiprocessors)
//   block            384 threads: a warpgroup that loads, two that compute
//   shared           dynamic bytes: 115,792 (D = 64) and 230,480 (D = 128)
//   pointers         16-byte aligned, strides multiples of 8 elements
//
// CPU twin: engine/src/ops/attention.rs
// Source: Dao, "FlashAttention-2" (2023), section 3.1.2; Shah et al., "FlashAttention-3" (2024), for the use of wgmma.

#include "attention_hopper_backward.cuh"

// ---------------------------------------------------------------------------------------------------- device helpers

namespace {

template <int D>
using LayoutDq = Layout<D, 3, false>;

static_assert(LayoutDq<64>::BYTES == 115792 && LayoutDq<128>::BYTES == 230480, "the launch rule above says so");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Row sums of the elementwise product of two A operands: of the rows lane / 4 and 8 more, in all four lanes of a row.
template <int N>
__device__ __forceinline__ void row_dots(float (&sums)[2], const uint32_t (&a)[N], const uint32_t (&b)[N]) {
    sums[0] = 0.0f;
    sums[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        sums[i % 2] = fmaf(low_half(a[i]), low_half(b[i]), sums[i % 2]);
        sums[i % 2] = fmaf(high_half(a[i]), high_half(b[i]), sums[i % 2]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2);
    }
}

// What dq works on at a time: a q tile of one head, 64 rows for each computing warpgroup; or, where that divides the group,
// 64 rows of two heads, which see the same kv rows. It loops over the kv tiles of the sequence up to the q tile.
struct ItemDq {
    int4 tile;
    int head;
};

struct ItemsDq {
    const int4* tiles;
    int heads_each, heads_groups, count;

    __device__ __forceinline__ ItemsDq(const int4* tiles, int tile_count, int heads, int group)
        : tiles(tiles), heads_each(group % 2 == 0 ? 2 : 1), heads_groups(heads / heads_each), count(tile_count * heads_groups) {}

    // The index of a round's item: back and forth, so that, the heaviest coming first, all blocks get about the same work.
    __device__ __forceinline__ int index(int round) const {
        const int blocks = gridDim.x, block = blockIdx.x;
        return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    }
    __device__ __forceinline__ ItemDq get(int index) const {
        return {tiles[index / heads_groups], index % heads_groups * heads_each};
    }
    // Head and first row of a warpgroup.
    __device__ __forceinline__ int head(const ItemDq& item, int warpgroup) const {
        return item.head + (heads_each == 2 ? warpgroup : 0);
    }
    __device__ __forceinline__ int row(const ItemDq& item, int warpgroup) const {
        return item.tile.x + (heads_each == 2 ? 0 : 64 * warpgroup);
    }
};

// Where things lie in shared memory.
template <int D>
struct PlacesDq {
    using Shared = LayoutDq<D>;
    uint32_t q, d_o, o, slots;
    Barriers barriers;

    __device__ __forceinline__ explicit PlacesDq(uint32_t base)
        : q(base),
          d_o(base + Shared::TILE_BYTES),
          o(base + 2 * Shared::TILE_BYTES),
          slots(base + Shared::SLOTS_AT),
          barriers{base + Shared::BARRIERS_AT} {}
};

// One thread: loads k and v of all items, step by step, as the slots fall empty.
template <int D>
__device__ __forceinline__ void load_stream(const PlacesDq<D>& places, const ItemsDq& items, const CUtensorMap* map_k,
                                            const CUtensorMap* map_v, int group) {
    using Shared = LayoutDq<D>;
    const Barriers& barriers = places.barriers;
    Ring ring;
    for (int round = 0; items.index(round) < items.count; round++) {
        const ItemDq item = items.get(items.index(round));
        const int kv_head = item.head / group;
        for (int kv0 = item.tile.z; kv0 < item.tile.y; kv0 += STREAM_ROWS) {
            const uint32_t at = places.slots + ring.slot * Shared::SLOT_BYTES, full = barriers.full(ring.slot);
            mbarrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
            mbarrier_arrive_expect(full, Shared::SLOT_BYTES);
            load_rows<D, STREAM_ROWS>(at, map_k, full, kv_head, kv0);
            load_rows<D, STREAM_ROWS>(at + Shared::STREAM_BYTES, map_v, full, kv_head, kv0);
            ring.next();
        }
    }
}

// One thread, of a warp of its own, so that a tile comes in as soon as the one before was read, not behind its kv rows.
template <int D>
__device__ __forceinline__ void load_tiles(const PlacesDq<D>& places, const ItemsDq& items, const CUtensorMap* map_q,
                                           const CUtensorMap* map_do, const CUtensorMap* map_o) {
    const Barriers& barriers = places.barriers;
    uint32_t parity = 1;
    for (int round = 0; items.index(round) < items.count; round++) {
        const ItemDq item = items.get(items.index(round));
        mbarrier_wait(barriers.tile_empty(), parity);
        parity ^= 1;
        mbarrier_arrive_expect(barriers.tile_full(), 3 * LayoutDq<D>::TILE_BYTES);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = items.head(item, i), row = items.row(item, i), offset = i * 64 * PANEL_ROW_BYTES;
            load_rows<D, TILE_ROWS>(places.q + offset, map_q, barriers.tile_full(), head, row);
            load_rows<D, TILE_ROWS>(places.d_o + offset, map_do, barriers.tile_full(), head, row);
            load_rows<D, TILE_ROWS>(places.o + offset, map_o, barriers.tile_full(), head, row);
        }
    }
}

// P of S.
__device__ __forceinline__ void compute_p(float (&s)[STREAM_ROWS / 2], float scale_log2, const float (&row_lse)[2]) {
#pragma unroll
    for (int i = 0; i < STREAM_ROWS / 2; i++) {
        s[i] = exp2_fast(fmaf(s[i], scale_log2, -row_lse[i % 4 / 2]));
    }
}

// dS of P and dP, as an operand.
__device__ __forceinline__ void compute_ds(uint32_t (&ds_operand)[STREAM_ROWS / 4], const float (&p)[STREAM_ROWS / 2],
                                           const float (&dp)[STREAM_ROWS / 2], const float (&row_delta)[2]) {
#pragma unroll
    for (int i = 0; i < STREAM_ROWS / 4; i++) {
        const float row = row_delta[i % 2];
        ds_operand[i] = pack_bf16(p[2 * i] * (dp[2 * i] - row), p[2 * i + 1] * (dp[2 * i + 1] - row));
    }
    hold(ds_operand);
}

// Kv rows behind a q row become -infinity: `first_kv` and `first_q` are those of this thread's first score.
__device__ __forceinline__ void mask(float (&s)[STREAM_ROWS / 2], int first_q, int first_kv) {
#pragma unroll
    for (int i = 0; i < STREAM_ROWS / 2; i++) {
        const int kv = first_kv + 8 * (i / 4) + i % 2, q = first_q + 8 * (i % 4 / 2);
        s[i] = q >= kv ? s[i] : -infinity();
    }
}

// Reads the rows of this warpgroup as operands, and computes delta of the two rows of this thread.
template <int D>
__device__ __forceinline__ void load_operands(uint32_t (&q_operand)[D / 4], uint32_t (&do_operand)[D / 4], float (&row_delta)[2],
                                              const PlacesDq<D>& places, int warpgroup) {
    load_operand<D>(do_operand, places.d_o, warpgroup);
    load_operand<D>(q_operand, places.o, warpgroup);
    row_dots(row_delta, do_operand, q_operand);
    load_operand<D>(q_operand, places.q, warpgroup);
    hold(q_operand);
    hold(do_operand);
}

// The computing warpgroups take turns to start products, so that one computes P and dS while those of the other run.
struct Turns {
    int warpgroup;

    __device__ __forceinline__ void wait() const { named_barrier_sync(1 + warpgroup, 256); }
    __device__ __forceinline__ void pass() const { named_barrier_arrive(2 - warpgroup, 256); }
};

// A step, and what of `compute` it works on: all references, as a lambda has them (values make ptxas choose other registers).
template <int D>
struct StepDq {
    using Shared = LayoutDq<D>;
    const PlacesDq<D>& places;
    const Turns& turns;
    Ring& ring;
    // The first row and column of this thread in a result.
    const int &my_row, &my_column;
    const float& scale_log2;
    float (&dq)[D / 2], (&s)[STREAM_ROWS / 2], (&dp)[STREAM_ROWS / 2];
    const uint32_t (&q_operand)[D / 4], (&do_operand)[D / 4];
    uint32_t (&ds_operand)[STREAM_ROWS / 4];
    // Of the two rows of this thread.
    const float (&row_lse)[2], (&row_delta)[2];

    // The kv rows from `kv0` on, with the q rows from `first_row` on. `held`: the slot that products under way still read.
    __device__ __forceinline__ void run(int kv0, int first_row, int& held) const {
        mbarrier_wait(places.barriers.full(ring.slot), ring.parity);
        const int slot = same_in_warp(ring.slot);
        const uint32_t at_k = places.slots + slot * Shared::SLOT_BYTES, at_v = at_k + Shared::STREAM_BYTES;
        ring.next();
        hold(s);
        hold(dp);
        wgmma_fence();
        product_abt<D>(s, q_operand, at_k);
        wgmma_commit();
        product_abt<D>(dp, do_operand, at_v);
        wgmma_commit();
        turns.pass();
        wgmma_wait<1>();
        hold(s);
        if (held >= 0) {
            mbarrier_arrive(places.barriers.empty(held));
        }
        held = slot;
        if (kv0 + STREAM_ROWS - 1 > first_row) {
            mask(s, first_row + my_row, kv0 + my_column);
        }
        compute_p(s, scale_log2, row_lse);
        wgmma_wait<0>();
        hold(dp);
        compute_ds(ds_operand, s, dp, row_delta);
        turns.wait();
        hold(dq);
        wgmma_fence();
        product_ab<D>(dq, ds_operand, at_k);
        wgmma_commit();
    }
};

// A computing warpgroup: dq and delta of its 64 rows of every item of the block.
template <int D>
__device__ __forceinline__ void compute(const PlacesDq<D>& places, const ItemsDq& items, int warp, int lane,
                                        __nv_bfloat16* dq_out, long long dq_stride, const float* lse, float* delta,
                                        int tokens, float scale) {
    const Barriers& barriers = places.barriers;
    Ring ring;
    const int warpgroup = warp / 4 - 1;
    const float scale_log2 = scale * LOG2E;
    const int my_row = warp % 4 * 16 + lane / 4, my_column = 2 * (lane % 4);
    uint32_t tile_parity = 0;
    float dq[D / 2], s[STREAM_ROWS / 2], dp[STREAM_ROWS / 2];
    uint32_t q_operand[D / 4], do_operand[D / 4], ds_operand[STREAM_ROWS / 4];
    const Turns turns = {warpgroup};
    if (warpgroup == 1) {
        turns.pass();
    }

    ItemDq next = items.get(min(items.index(0), items.count - 1));
    for (int round = 0; items.index(round) < items.count; round++) {
        const ItemDq item = next;
        // Long before it is needed: the load takes longer than a step.
        next = items.get(min(items.index(round + 1), items.count - 1));
        const int4 tile = item.tile;
        const int first_row = items.row(item, warpgroup);
        const size_t at = static_cast<size_t>(items.head(item, warpgroup)) * tokens + first_row + my_row;
        // lse and delta of the two rows of this thread. Rows behind the tile get any finite values and are not stored.
        float row_lse[2], row_delta[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row_lse[i] = first_row + my_row + 8 * i < tile.y ? lse[at + 8 * i] * LOG2E : 0.0f;
        }
        set_zero(dq);
        mbarrier_wait(barriers.tile_full(), tile_parity);
        tile_parity ^= 1;
        load_operands(q_operand, do_operand, row_delta, places, warpgroup);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (lane % 4 == 0 && first_row + my_row + 8 * i < tile.y) {
                delta[at + 8 * i] = row_delta[i];
            }
        }
        // The next tile may come in while this one is worked on.
        mbarrier_arrive(barriers.tile_empty());

        // kv tiles that the rows of this warpgroup see, of all that are loaded: at least one.
        const int steps = (tile.y - tile.z + STREAM_ROWS - 1) / STREAM_ROWS;
        const int seen_steps = min(steps, (first_row + 63 - tile.z) / STREAM_ROWS + 1);
        int held = -1;
        const StepDq<D> step = {places, turns, ring, my_row, my_column, scale_log2, dq, s, dp, q_operand, do_operand, ds_operand,
                                row_lse, row_delta};
        turns.wait();
        for (int i = 0; i < seen_steps; i++) {
            step.run(tile.z + i * STREAM_ROWS, first_row, held);
        }
        turns.pass();
        wgmma_wait<0>();
        hold(dq);
        read_behind_loop(q_operand, tokens < 0, delta);
        read_behind_loop(do_operand, tokens < 0, delta);
        mbarrier_arrive(barriers.empty(held));
        for (int i = seen_steps; i < steps; i++) {
            mbarrier_wait(barriers.full(ring.slot), ring.parity);
            mbarrier_arrive(barriers.empty(ring.slot));
            ring.next();
            turns.wait();
            turns.pass();
        }
        store_result<D>(dq, scale, dq_out + items.head(item, warpgroup) * D, dq_stride, first_row, tile.y);
    }
}

template <int D>
__device__ __forceinline__ void backward_dq(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                            const CUtensorMap* map_o, const CUtensorMap* map_do, __nv_bfloat16* dq_out,
                                            long long dq_stride, const float* lse, float* delta, const int4* tiles,
                                            int tile_count, int tokens, int heads, int group, float scale) {
    extern __shared__ uint8_t shared_bytes[];
    const PlacesDq<D> places((shared_address(shared_bytes) + 1023) & ~1023u);
    places.barriers.initialise(1);
    const ItemsDq items(tiles, tile_count, heads, group);
    const int warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;

    if (warp < 4) {
        registers_decrease<24>();
        if (warp == 0 && lane == 0) {
            load_stream(places, items, map_k, map_v, group);
        } else if (warp == 1 && lane == 0) {
            load_tiles(places, items, map_q, map_do, map_o);
        }
        return;
    }

    registers_increase<240>();
    compute(places, items, warp, lane, dq_out, dq_stride, lse, delta, tokens, scale);
}

#define BODY(D)                                                                                                           \
    backward_dq<D>(&q, &k, &v, &o, &d_o, dq, dq_stride, lse, delta, tiles, tile_count, tokens, heads, group, scale)

#else

#define BODY(D) __trap()

#endif

}  // namespace

// ------------------------------------------------------------------------------------------------------------ kernels

#define KERNEL(D)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_dq_d##D(                            \
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                                     \
        const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o,                                     \
        const __grid_constant__ CUtensorMap d_o, __nv_bfloat16* dq, long long dq_stride, const float* lse, float* delta,   \
        const int4* tiles, int tile_count, int tokens, int heads, int group, float scale) {                               \
        BODY(D);                                                                                                          \
    }

KERNEL(64)
KERNEL(128)
