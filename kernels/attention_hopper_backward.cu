// Causal attention over packed sequences, backward, for Hopper (sm_90a): TMA loads, wgmma products, no (T, T) matrix in
// memory, no atomics. The same input gives the same bits.
//
//   S = scale * q k^T,  P = exp(S - lse),  o = P v                      (forward; lse: log-sum-exp of a row of S)
//   delta = rowsum(do * o),  dP = do v^T,  dS = P * (dP - delta)
//   dv = P^T do,  dk = scale * dS^T q,  dq = scale * dS k
//
// Shapes: q, o, do, dq (T, H, D); k, v, dk, dv (T, KV, D), all bf16 with a row stride; lse, delta (H, T) f32. q head h uses
// kv head h / group, group = H / KV. D is 64 or 128. Products take bf16 operands (P and dS are rounded) and sum in f32.
// dq, dk, dv and delta are overwritten; rows outside of all tiles and columns outside of the heads are not touched.
// A token attends to the tokens of its own sequence up to itself; sequences may begin at any row.
//
// Two kernels, dq first: it also computes delta, which dkdv reads. Each computes S and dP anew, so that dq is a sum over kv
// tiles and dk and dv are sums over q tiles, both in a fixed order inside one block.
//
// Launch rule of attention_hopper_backward_dq_d{64,128} and attention_hopper_backward_dkdv_d{64,128}:
//   q, k, v, o, d_o  tensor maps: 2D, bf16, heads * D (KV * D) columns, T rows, row stride in bytes, box 64 columns x 64
//                    rows, SWIZZLE_128B, no interleave, zeros out of bounds
//   tiles            (start, end, seq_start, seq_end): rows start..end of the sequence seq_start..seq_end, at least one, at
//                    most the tile height; together they cover every row once
//     dq             q rows; height 64 where group is even, else 128; those with the most rows seq_start..end first
//     dkdv           kv rows; height 128; those with the most rows start..seq_end first
//   grid             dq: min(tile_count * H / (2 where group is even, else 1), multiprocessors); dkdv: tile_count * KV
//   block            384 threads: a warpgroup that loads, two that compute
//   shared           dynamic bytes: dq 115,792 (D = 64) and 230,480 (D = 128); dkdv 101,456 and 199,760
//   pointers         16-byte aligned, strides multiples of 8 elements
//
// CPU twin: engine/src/ops/attention.rs
// Source: Dao, "FlashAttention-2" (2023), section 3.1.2; Shah et al., "FlashAttention-3" (2024), for the use of wgmma.

#include "hopper.cuh"

// ---------------------------------------------------------------------------------------------------- device helpers

namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr int THREADS = 384;
constexpr int CONSUMER_WARPS = 8;
// Rows of the tile of a work item: 64 for each of the two computing warpgroups.
constexpr int TILE_ROWS = 128;
// Rows of a tile that is streamed past it, and of a TMA box.
constexpr int STREAM_ROWS = 64;
// A panel is 64 columns wide.
constexpr int PANEL_ROW_BYTES = 128;

// Dynamic shared memory: TILES tiles of the work item, STAGES slots for two streamed tiles, lse and delta of the slots'
// q rows (dkdv), the barriers, and room to align all to the 1024 bytes of the swizzle.
template <int D, int TILES, int STAGES, bool STATISTICS>
struct Layout {
    static constexpr int TILE_BYTES = TILE_ROWS * D * 2;
    static constexpr int STREAM_BYTES = STREAM_ROWS * D * 2;
    static constexpr int SLOT_BYTES = 2 * STREAM_BYTES;
    static constexpr int SLOTS_AT = TILES * TILE_BYTES;
    static constexpr int STATISTICS_AT = SLOTS_AT + STAGES * SLOT_BYTES;
    static constexpr int STATISTICS_BYTES = STATISTICS ? 2 * STREAM_ROWS * 4 : 0;
    static constexpr int BARRIERS_AT = STATISTICS_AT + STAGES * STATISTICS_BYTES;
    static constexpr int BYTES = BARRIERS_AT + (2 + 2 * STAGES) * 8 + 1024;
};

template <int D>
using LayoutDq = Layout<D, 3, 4, false>;
template <int D>
using LayoutDkdv = Layout<D, 2, 4, true>;
constexpr int STAGES = 4;

static_assert(LayoutDq<64>::BYTES == 115792 && LayoutDq<128>::BYTES == 230480, "the launch rule above says so");
static_assert(LayoutDkdv<64>::BYTES == 101456 && LayoutDkdv<128>::BYTES == 199760, "the launch rule above says so");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float2 load_shared_2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// The same value in all lanes: tells the compiler so, which then keeps what depends on it in uniform registers.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// ------------------------------------------------------------ registers of asynchronous products

// Keeps the compiler from moving reads and writes of registers over this point, while or because a product uses them.
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

// Reads an operand behind the loop that uses it; `never` is false. Without it ptxas 13.0 gives the registers of an operand
// that a loop does not change to other values inside the loop (seen with four k-steps: only the first turn was right).
template <int N>
__device__ __forceinline__ void read_behind_loop(const uint32_t (&x)[N], bool never, void* anywhere) {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        all ^= x[i];
    }
    if (never) {
        *static_cast<uint32_t*>(anywhere) = all;
    }
}

template <int N>
__device__ __forceinline__ void set_zero(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = 0.0f;
    }
}

// ------------------------------------------------------------ products of a warpgroup: 64 rows each

// c = a b^T over D: a 64 rows of a tile of the work item (the address of their first), b all rows of a streamed tile.
template <int D>
__device__ __forceinline__ void product_abt(float (&c)[STREAM_ROWS / 2], uint32_t a, uint32_t b) {
    const uint64_t descriptor_a = descriptor_k_major(a), descriptor_b = descriptor_k_major(b);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const int panel = k / 4, within = k % 4 * 32;
        wgmma_shared<STREAM_ROWS, K_MAJOR, K_MAJOR>(
            c, descriptor_advance(descriptor_a, panel * TILE_ROWS * PANEL_ROW_BYTES + within),
            descriptor_advance(descriptor_b, panel * STREAM_ROWS * PANEL_ROW_BYTES + within), k != 0);
    }
}

// The same with a in registers.
template <int D>
__device__ __forceinline__ void product_abt(float (&c)[STREAM_ROWS / 2], const uint32_t (&a)[D / 4], uint32_t b) {
    const uint64_t descriptor_b = descriptor_k_major(b);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        wgmma_registers<STREAM_ROWS, K_MAJOR>(
            c, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
            descriptor_advance(descriptor_b, k / 4 * STREAM_ROWS * PANEL_ROW_BYTES + k % 4 * 32), k != 0);
    }
}

// c += a b: a in registers, its columns are the rows of the streamed tile b; c has D columns.
template <int D>
__device__ __forceinline__ void product_ab(float (&c)[D / 2], const uint32_t (&a)[STREAM_ROWS / 4], uint32_t b) {
    const uint64_t descriptor_b = descriptor_mn_major(b, STREAM_ROWS * PANEL_ROW_BYTES);
#pragma unroll
    for (int k = 0; k < STREAM_ROWS / 16; k++) {
        wgmma_registers<D, MN_MAJOR>(c, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                     descriptor_advance(descriptor_b, k * 16 * PANEL_ROW_BYTES), 1);
    }
}

// Reads the 64 rows of this warpgroup from a tile of the work item as an A operand.
template <int D>
__device__ __forceinline__ void load_operand(uint32_t (&a)[D / 4], uint32_t tile, int warpgroup) {
    const int lane = threadIdx.x % 32;
    // Lanes 0-15 address the rows of a k-step's left 8 columns, lanes 16-31 those of its right ones.
    const int row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const int chunk = (k % 4 * 2 + lane / 16) ^ (row % 8);
        ldmatrix_x4(tile + (k / 4 * TILE_ROWS + row) * PANEL_ROW_BYTES + chunk * 16, a[4 * k], a[4 * k + 1], a[4 * k + 2],
                    a[4 * k + 3]);
    }
}

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

// Writes the 64 x D result of a warpgroup times `scale` to the rows from `first_row` on, those before `end`.
// The four lanes of a row exchange their pairs of columns, so that each writes 16 bytes.
template <int D>
__device__ __forceinline__ void store_result(const float (&x)[D / 2], float scale, __nv_bfloat16* out, long long stride,
                                             int first_row, int end) {
    const int lane = threadIdx.x % 32, part = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * half;
        __nv_bfloat16* to = out + static_cast<size_t>(row) * stride + 8 * part;
#pragma unroll
        for (int columns = 0; columns < D; columns += 32) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = (columns / 8 + i) * 4 + 2 * half;
                words[i] = pack_bf16(x[at] * scale, x[at + 1] * scale);
            }
            // A 4 x 4 transpose: lane `part` gets the four words of columns 8 * part.. of these 32.
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
            if (row < end) {
                *reinterpret_cast<uint4*>(to + columns) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

// ------------------------------------------------------------ loads

// 64 rows from `row` on of the D columns of a head, into the panels of a tile of ROWS rows.
template <int D, int ROWS>
__device__ __forceinline__ void load_rows(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int head, int row) {
#pragma unroll
    for (int panel = 0; panel < D / 64; panel++) {
        tma_load_2d(destination + panel * ROWS * PANEL_ROW_BYTES, map, barrier, head * D + panel * 64, row);
    }
}

// Slots that a producer fills and the consumers empty, one after the other.
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
    uint32_t at;

    __device__ __forceinline__ uint32_t tile_full() const { return at; }
    __device__ __forceinline__ uint32_t tile_empty() const { return at + 8; }
    __device__ __forceinline__ uint32_t full(int slot) const { return at + 16 + 8 * slot; }
    __device__ __forceinline__ uint32_t empty(int slot) const { return at + 16 + 8 * (STAGES + slot); }

    // By all threads of the block; `arrivals`: how many fill a slot.
    __device__ __forceinline__ void initialise(int arrivals) const {
        if (threadIdx.x == 0) {
            mbarrier_init(tile_full(), 1);
            mbarrier_init(tile_empty(), CONSUMER_WARPS);
            for (int slot = 0; slot < STAGES; slot++) {
                mbarrier_init(full(slot), arrivals);
                mbarrier_init(empty(slot), CONSUMER_WARPS);
            }
            mbarrier_init_fence();
        }
        __syncthreads();
    }
};

__device__ __forceinline__ void arrive_of_warp(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) {
        mbarrier_arrive(barrier);
    }
}

template <bool VALUE>
struct Flag {
    static constexpr bool value = VALUE;
};

// ----------------------------------------------------------------------------------------------------------------- dq

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

template <int D>
__device__ __forceinline__ void backward_dq(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                            const CUtensorMap* map_o, const CUtensorMap* map_do, __nv_bfloat16* dq_out,
                                            long long dq_stride, const float* lse, float* delta, const int4* tiles,
                                            int tile_count, int tokens, int heads, int group, float scale) {
    using Shared = LayoutDq<D>;
    extern __shared__ uint8_t shared_bytes[];
    const uint32_t shared_q = (shared_address(shared_bytes) + 1023) & ~1023u;
    const uint32_t shared_do = shared_q + Shared::TILE_BYTES, shared_o = shared_do + Shared::TILE_BYTES;
    const uint32_t slots = shared_q + Shared::SLOTS_AT;
    const Barriers barriers = {shared_q + Shared::BARRIERS_AT};
    barriers.initialise(1);
    const ItemsDq items(tiles, tile_count, heads, group);
    const int warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
    Ring ring;

    if (warp < 4) {
        registers_decrease<24>();
        if (warp == 0 && lane == 0) {
            uint32_t tile_parity = 1;
            for (int round = 0; items.index(round) < items.count; round++) {
                const ItemDq item = items.get(items.index(round));
                const int kv_head = item.head / group;
                mbarrier_wait(barriers.tile_empty(), tile_parity);
                tile_parity ^= 1;
                mbarrier_arrive_expect(barriers.tile_full(), 3 * Shared::TILE_BYTES);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int head = items.head(item, i), row = items.row(item, i), offset = i * 64 * PANEL_ROW_BYTES;
                    load_rows<D, TILE_ROWS>(shared_q + offset, map_q, barriers.tile_full(), head, row);
                    load_rows<D, TILE_ROWS>(shared_do + offset, map_do, barriers.tile_full(), head, row);
                    load_rows<D, TILE_ROWS>(shared_o + offset, map_o, barriers.tile_full(), head, row);
                }
                for (int kv0 = item.tile.z; kv0 < item.tile.y; kv0 += STREAM_ROWS) {
                    const uint32_t at = slots + ring.slot * Shared::SLOT_BYTES, full = barriers.full(ring.slot);
                    mbarrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
                    mbarrier_arrive_expect(full, Shared::SLOT_BYTES);
                    load_rows<D, STREAM_ROWS>(at, map_k, full, kv_head, kv0);
                    load_rows<D, STREAM_ROWS>(at + Shared::STREAM_BYTES, map_v, full, kv_head, kv0);
                    ring.next();
                }
            }
        }
        return;
    }

    registers_increase<240>();
    const int warpgroup = warp / 4 - 1;
    const float scale_log2 = scale * LOG2E;
    // The first row and column of this thread in a result.
    const int my_row = warp % 4 * 16 + lane / 4, my_column = 2 * (lane % 4);
    uint32_t tile_parity = 0;
    float dq[D / 2], s[STREAM_ROWS / 2], dp[STREAM_ROWS / 2];
    uint32_t q_operand[D / 4], do_operand[D / 4], ds_operand[STREAM_ROWS / 4];

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
        load_operand<D>(do_operand, shared_do, warpgroup);
        load_operand<D>(q_operand, shared_o, warpgroup);
        row_dots(row_delta, do_operand, q_operand);
        load_operand<D>(q_operand, shared_q, warpgroup);
        hold(q_operand);
        hold(do_operand);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (lane % 4 == 0 && first_row + my_row + 8 * i < tile.y) {
                delta[at + 8 * i] = row_delta[i];
            }
        }
        __syncwarp();
        // The next tile may come in while this one is worked on.
        arrive_of_warp(barriers.tile_empty());

        // kv tiles that the rows of this warpgroup see, of all that are loaded: at least one.
        const int steps = (tile.y - tile.z + STREAM_ROWS - 1) / STREAM_ROWS;
        const int seen_steps = min(steps, (first_row + 63 - tile.z) / STREAM_ROWS + 1);
        // The slot that products under way still read.
        int held = -1;
        for (int step = 0; step < seen_steps; step++) {
            mbarrier_wait(barriers.full(ring.slot), ring.parity);
            const int slot = same_in_warp(ring.slot), kv0 = tile.z + step * STREAM_ROWS;
            const uint32_t at_k = slots + slot * Shared::SLOT_BYTES, at_v = at_k + Shared::STREAM_BYTES;
            ring.next();
            hold(s);
            hold(dp);
            wgmma_fence();
            product_abt<D>(s, q_operand, at_k);
            wgmma_commit();
            product_abt<D>(dp, do_operand, at_v);
            wgmma_commit();
            wgmma_wait<1>();
            hold(s);
            if (held >= 0) {
                arrive_of_warp(barriers.empty(held));
            }
            held = slot;
            if (kv0 + STREAM_ROWS - 1 > first_row) {
#pragma unroll
                for (int i = 0; i < STREAM_ROWS / 2; i++) {
                    const int kv = kv0 + my_column + 8 * (i / 4) + i % 2, q = first_row + my_row + 8 * (i % 4 / 2);
                    s[i] = q >= kv ? s[i] : -infinity();
                }
            }
#pragma unroll
            for (int i = 0; i < STREAM_ROWS / 2; i++) {
                s[i] = exp2_fast(fmaf(s[i], scale_log2, -row_lse[i % 4 / 2]));
            }
            wgmma_wait<0>();
            hold(dp);
#pragma unroll
            for (int i = 0; i < STREAM_ROWS / 4; i++) {
                const float row = row_delta[i % 2];
                ds_operand[i] = pack_bf16(s[2 * i] * (dp[2 * i] - row), s[2 * i + 1] * (dp[2 * i + 1] - row));
            }
            hold(dq);
            wgmma_fence();
            product_ab<D>(dq, ds_operand, at_k);
            wgmma_commit();
        }
        wgmma_wait<0>();
        hold(dq);
        read_behind_loop(q_operand, tokens < 0, delta);
        read_behind_loop(do_operand, tokens < 0, delta);
        arrive_of_warp(barriers.empty(held));
        for (int step = seen_steps; step < steps; step++) {
            mbarrier_wait(barriers.full(ring.slot), ring.parity);
            arrive_of_warp(barriers.empty(ring.slot));
            ring.next();
        }
        store_result<D>(dq, scale, dq_out + items.head(item, warpgroup) * D, dq_stride, first_row, tile.y);
    }
}

// --------------------------------------------------------------------------------------------------------------- dkdv

// Work item: a kv tile of one kv head, 64 rows for each computing warpgroup. It loops over the q tiles of the sequence from
// the last back to the kv tile, and over the q heads of the group in each: blocks that run at the same time so read the same q
// tiles at about the same time, out of the L2 cache. S and dP are computed transposed (rows kv, columns q), so that P^T and
// dS^T come out in registers as the A operands of dv and dk.
template <int D>
__device__ __forceinline__ void backward_dkdv(const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                                              const CUtensorMap* map_do, __nv_bfloat16* dk_out, long long dk_stride,
                                              __nv_bfloat16* dv_out, long long dv_stride, const float* lse,
                                              const float* delta, const int4* tiles, int tokens, int heads, int group,
                                              float scale) {
    using Shared = LayoutDkdv<D>;
    extern __shared__ uint8_t shared_bytes[];
    const uint32_t shared_k = (shared_address(shared_bytes) + 1023) & ~1023u, shared_v = shared_k + Shared::TILE_BYTES;
    const uint32_t slots = shared_k + Shared::SLOTS_AT, statistics = shared_k + Shared::STATISTICS_AT;
    const Barriers barriers = {shared_k + Shared::BARRIERS_AT};
    // The TMA warp, and each lane of the warp that brings lse and delta.
    barriers.initialise(1 + 32);
    const int warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int kv_heads = heads / group, kv_head = blockIdx.x % kv_heads;
    const int4 tile = tiles[blockIdx.x / kv_heads];
    const int q_tiles = (tile.w - tile.x + STREAM_ROWS - 1) / STREAM_ROWS;
    Ring ring;

    if (warp < 4) {
        registers_decrease<24>();
        if (warp == 0 && lane == 0) {
            mbarrier_arrive_expect(barriers.tile_full(), 2 * Shared::TILE_BYTES);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = tile.x + 64 * i, offset = i * 64 * PANEL_ROW_BYTES;
                load_rows<D, TILE_ROWS>(shared_k + offset, map_k, barriers.tile_full(), kv_head, row);
                load_rows<D, TILE_ROWS>(shared_v + offset, map_v, barriers.tile_full(), kv_head, row);
            }
            for (int q_tile = q_tiles - 1; q_tile >= 0; q_tile--) {
                for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                    const uint32_t at = slots + ring.slot * Shared::SLOT_BYTES, full = barriers.full(ring.slot);
                    const int q0 = tile.x + q_tile * STREAM_ROWS;
                    mbarrier_wait(barriers.empty(ring.slot), ring.parity ^ 1);
                    mbarrier_arrive_expect(full, Shared::SLOT_BYTES);
                    load_rows<D, STREAM_ROWS>(at, map_q, full, head, q0);
                    load_rows<D, STREAM_ROWS>(at + Shared::STREAM_BYTES, map_do, full, head, q0);
                    ring.next();
                }
            }
        } else if (warp == 1) {
            // lse in units of log2, infinite for rows behind the sequence: their P is exp2(-inf) = 0.
            for (int q_tile = q_tiles - 1; q_tile >= 0; q_tile--) {
                for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                    float row_lse[STREAM_ROWS / 32], row_delta[STREAM_ROWS / 32];
#pragma unroll
                    for (int i = 0; i < STREAM_ROWS / 32; i++) {
                        const int row = tile.x + q_tile * STREAM_ROWS + lane + 32 * i;
                        const size_t at = static_cast<size_t>(head) * tokens + row;
                        row_lse[i] = row < tile.w ? lse[at] * LOG2E : infinity();
                        row_delta[i] = row < tile.w ? delta[at] : 0.0f;
                    }
                    const uint32_t at = statistics + ring.slot * Shared::STATISTICS_BYTES + lane * 4;
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
        return;
    }

    registers_increase<240>();
    const int warpgroup = warp / 4 - 1;
    const float scale_log2 = scale * LOG2E;
    // The first row and column of this thread in a result.
    const int my_row = warp % 4 * 16 + lane / 4, my_column = 2 * (lane % 4);
    const int first_row = tile.x + 64 * warpgroup;
    // Steps, that is pairs of a q tile and a head. The rows of this warpgroup see all but the last q tile or tiles.
    const int steps = q_tiles * group, seen_steps = first_row < tile.y ? (q_tiles - warpgroup) * group : 0;
    float dk[D / 2], dv[D / 2], s[STREAM_ROWS / 2], dp[STREAM_ROWS / 2];
    uint32_t p_operand[STREAM_ROWS / 4], ds_operand[STREAM_ROWS / 4];
    // At D = 64 there are registers for k and v too; that halves what S and dP read from shared memory.
    constexpr bool TILE_IN_REGISTERS = D == 64;
    uint32_t k_operand[TILE_IN_REGISTERS ? D / 4 : 1], v_operand[TILE_IN_REGISTERS ? D / 4 : 1];

    const auto start_s = [&](int slot) {
        const uint32_t at_q = slots + slot * Shared::SLOT_BYTES;
        hold(s);
        wgmma_fence();
        if constexpr (TILE_IN_REGISTERS) {
            product_abt<D>(s, k_operand, at_q);
        } else {
            product_abt<D>(s, shared_k + warpgroup * 64 * PANEL_ROW_BYTES, at_q);
        }
        wgmma_commit();
    };
    const auto start_dp = [&](int slot) {
        const uint32_t at_do = slots + slot * Shared::SLOT_BYTES + Shared::STREAM_BYTES;
        hold(dp);
        wgmma_fence();
        if constexpr (TILE_IN_REGISTERS) {
            product_abt<D>(dp, v_operand, at_do);
        } else {
            product_abt<D>(dp, shared_v + warpgroup * 64 * PANEL_ROW_BYTES, at_do);
        }
        wgmma_commit();
    };

    // One step. At its start S is there, and dk of the step before under way (held: its slot). The tensor cores have work while
    // this warpgroup computes: dk during P, dv and the next S during dS. There are registers for no more than that.
    int held = -1;
    const auto step = [&](auto more, bool masked) {
        const int slot = ring.slot;
        const uint32_t at_q = slots + slot * Shared::SLOT_BYTES, at_do = at_q + Shared::STREAM_BYTES;
        const uint32_t at_lse = statistics + slot * Shared::STATISTICS_BYTES + my_column * 4;
        const uint32_t at_delta = at_lse + STREAM_ROWS * 4;
        ring.next();
        if (masked) {
            // The q tile begins at the first row of this warpgroup.
#pragma unroll
            for (int i = 0; i < STREAM_ROWS / 2; i++) {
                const int q = my_column + 8 * (i / 4) + i % 2, kv = my_row + 8 * (i % 4 / 2);
                s[i] = q >= kv ? s[i] : -infinity();
            }
        }
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
        if constexpr (decltype(more)::value) {
            // Here, because the compiler moves no computation of P behind this loop, which it would behind the next wait.
            mbarrier_wait(barriers.full(ring.slot), ring.parity);
        }
        wgmma_wait<0>();
        hold(dk);
        hold(ds_operand);
        if (held >= 0) {
            arrive_of_warp(barriers.empty(held));
        }
        held = slot;
        start_dp(slot);
        hold(dv);
        wgmma_fence();
        product_ab<D>(dv, p_operand, at_do);
        wgmma_commit();
        if constexpr (decltype(more)::value) {
            start_s(ring.slot);
            wgmma_wait<2>();
        } else {
            wgmma_wait<1>();
        }
        hold(dp);
#pragma unroll
        for (int i = 0; i < STREAM_ROWS / 2; i += 4) {
            const float2 row = load_shared_2(at_delta + 8 * i);
            const uint32_t p = p_operand[i / 2], p_below = p_operand[i / 2 + 1];
            ds_operand[i / 2] = pack_bf16(low_half(p) * (dp[i] - row.x), high_half(p) * (dp[i + 1] - row.y));
            ds_operand[i / 2 + 1] =
                pack_bf16(low_half(p_below) * (dp[i + 2] - row.x), high_half(p_below) * (dp[i + 3] - row.y));
        }
        hold(ds_operand);
        hold(dk);
        wgmma_fence();
        product_ab<D>(dk, ds_operand, at_q);
        wgmma_commit();
        if constexpr (decltype(more)::value) {
            wgmma_wait<1>();
            hold(s);
            hold(p_operand);
        }
    };

    set_zero(dk);
    set_zero(dv);
    mbarrier_wait(barriers.tile_full(), 0);
    if constexpr (TILE_IN_REGISTERS) {
        load_operand<D>(k_operand, shared_k, warpgroup);
        load_operand<D>(v_operand, shared_v, warpgroup);
        hold(k_operand);
        hold(v_operand);
    }
    if (seen_steps > 0) {
        mbarrier_wait(barriers.full(ring.slot), ring.parity);
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
        if constexpr (TILE_IN_REGISTERS) {
            read_behind_loop(k_operand, tokens < 0, dk_out);
            read_behind_loop(v_operand, tokens < 0, dv_out);
        }
        arrive_of_warp(barriers.empty(held));
    }
    for (int i = seen_steps; i < steps; i++) {
        mbarrier_wait(barriers.full(ring.slot), ring.parity);
        arrive_of_warp(barriers.empty(ring.slot));
        ring.next();
    }
    store_result<D>(dk, scale, dk_out + kv_head * D, dk_stride, first_row, tile.y);
    store_result<D>(dv, 1.0f, dv_out + kv_head * D, dv_stride, first_row, tile.y);
}

#define DQ_BODY(D)                                                                                                        \
    backward_dq<D>(&q, &k, &v, &o, &d_o, dq, dq_stride, lse, delta, tiles, tile_count, tokens, heads, group, scale)
#define DKDV_BODY(D)                                                                                                      \
    backward_dkdv<D>(&q, &k, &v, &d_o, dk, dk_stride, dv, dv_stride, lse, delta, tiles, tokens, heads, group, scale)

#else

#define DQ_BODY(D) __trap()
#define DKDV_BODY(D) __trap()

#endif

}  // namespace

// ------------------------------------------------------------------------------------------------------------ kernels

#define KERNELS(D)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_dq_d##D(                            \
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                                     \
        const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o,                                     \
        const __grid_constant__ CUtensorMap d_o, __nv_bfloat16* dq, long long dq_stride, const float* lse, float* delta,   \
        const int4* tiles, int tile_count, int tokens, int heads, int group, float scale) {                               \
        DQ_BODY(D);                                                                                                       \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_dkdv_d##D(                          \
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                                     \
        const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap d_o, __nv_bfloat16* dk,                \
        long long dk_stride, __nv_bfloat16* dv, long long dv_stride, const float* lse, const float* delta,                \
        const int4* tiles, int tokens, int heads, int group, float scale) {                                               \
        DKDV_BODY(D);                                                                                                     \
    }

KERNELS(64)
KERNELS(128)
