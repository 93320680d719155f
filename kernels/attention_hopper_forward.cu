// attention_hopper_forward: causal attention over packed sequences, forward, for compute capability 9.0 (wgmma, TMA).
//
//   o[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, h / group]) v[s, h / group],  start of t's sequence <= s <= t
//   lse[h, t] = ln sum_s exp(scale * q[t, h] . k[s, h / group])
//
// Shapes: q, o (T, H, D); k, v (T, KV, D), group = H / KV, bf16; lse (H, T), f32; D is 64 or 128. Products and sums in f32,
// probabilities rounded to bf16 before P V. `scale` > 0. No atomics: same input, same bits, whatever the number of blocks;
// the bits of a row do not depend on the rows beside it.
//
// Maps q_map, k_map, v_map: 2D, bf16, columns (H * D or KV * D) fastest, T rows, any row stride that is a multiple of 16
// bytes, box of 64 columns and ROWS rows (q) or 128 rows (k, v), SWIZZLE_128B, zeros out of bounds.
// o: 16-byte aligned, `o_stride` elements from row to row, a multiple of 8.
// tiles[i] = (q_start, q_end, seq_start, seq_end): queries q_start..q_end of the sequence seq_start..seq_end, at most ROWS of
// them and at least one, longest q_end - seq_start first (the order balances the blocks). Every query stands in one tile.
//
// Launch rule (the host's side: engine/src/ops/cuda/attention.rs):
//            ROWS   threads   dynamic shared bytes
//   d128      128       384                 230656
//   d64       192       512                 140544
//   grid min(multiprocessors, tile_count * H), one block a multiprocessor; not launched for no tiles.
//
// Work items (tile, head), heads fastest, go to the blocks in a snake (0..G, G..0, ...), so that each gets as many long
// ones as short ones. In a block one thread loads (TMA) and two or three warpgroups of 64 rows each compute. Per block of
// 128 keys a warpgroup issues S' = Q K'^T for the next keys and O += P V for the present ones, hands the tensor cores to the
// next warpgroup, and does the softmax of S' meanwhile. The first S of an item goes with the last P V of the item before.
//
// CPU twin: engine/src/ops/attention.rs. Source: Shah et al., "FlashAttention-3", 2024 (warp specialisation, the warpgroups'
// turns); Dao, "FlashAttention-2", 2023 (the online softmax).

#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

// ---- device helpers -------------------------------------------------------------------------------------------------

constexpr int KEYS = 128;     // keys of a block
constexpr int KV_STAGES = 2;  // blocks of k and of v in shared memory
constexpr int Q_STAGES = 2;   // items whose q is in shared memory
constexpr int ITEMS = 4;      // items whose description is: one is still stored while q of the next but one is loaded
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// A row's maximum is that of its first block; it is only raised when a thread's part of a block's sum exceeds this. So
// probabilities reach 2^14 instead of 1, which costs neither f32 nor bf16 any precision, and nearly every block is spared
// the search for its maximum and the rescaling of the output.
constexpr float RAISE = 16384.0f;

template <int D, int WARPGROUPS>
struct Shape {
    static constexpr int ROWS = 64 * WARPGROUPS;
    static constexpr int PANELS = D / 64;  // of 64 columns: what one swizzled box holds
    static constexpr int Q_PANEL = ROWS * 128;
    static constexpr int KV_PANEL = KEYS * 128;
    static constexpr int Q_BYTES = PANELS * Q_PANEL;
    static constexpr int KV_BYTES = PANELS * KV_PANEL;
    // Offsets into shared memory, from a multiple of 1024.
    static constexpr int Q = 0;
    static constexpr int O = Q + Q_STAGES * Q_BYTES;
    static constexpr int K = O + Q_BYTES;
    static constexpr int V = K + KV_STAGES * KV_BYTES;
    static constexpr int ITEM = V + KV_STAGES * KV_BYTES;
    static constexpr int Q_FULL = ITEM + 16 * ITEMS;
    static constexpr int Q_EMPTY = Q_FULL + 8 * Q_STAGES;
    static constexpr int K_FULL = Q_EMPTY + 8 * Q_STAGES;
    static constexpr int K_EMPTY = K_FULL + 8 * KV_STAGES;
    static constexpr int V_FULL = K_EMPTY + 8 * KV_STAGES;
    static constexpr int V_EMPTY = V_FULL + 8 * KV_STAGES;
    static constexpr int END = V_EMPTY + 8 * KV_STAGES;
    static constexpr int SHARED_BYTES = 1024 + (END + 127) / 128 * 128;
};
static_assert(Shape<128, 2>::SHARED_BYTES == 230656 && Shape<64, 3>::SHARED_BYTES == 140544, "the launch rule above");

template <bool VALUE>
struct Flag {
    static constexpr bool value = VALUE;
};

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ int4 load_shared(uint32_t address) {
    int4 bits;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(address)
                 : "memory");
    return bits;
}

__device__ __forceinline__ void store_shared(uint32_t address, int4 bits) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
}

// In one instruction, without a branch: the plain form became four 4-byte stores in a branch each.
__device__ __forceinline__ void store_global(void* pointer, int4 bits, bool wanted) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(pointer),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w), "r"(static_cast<int>(wanted))
                 : "memory");
}

// The item of this block's round.
__device__ __forceinline__ int item_at(int round) {
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

__device__ __forceinline__ int blocks_of(int4 tile) { return (tile.y - tile.z + KEYS - 1) / KEYS; }

// Scores of a block in a thread: s[4 * i + j] is row j / 2 of its two (8 apart), key 8 * i + j % 2 after its first.

// Keys that the rows may not see become -infinity; the first row sees the keys up to `limit`.
__device__ __forceinline__ void mask(float (&s)[64], int limit) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (8 * i + j % 2 > limit + 8 * (j / 2)) s[4 * i + j] = -INFINITY;
        }
    }
}

// Of scale * log2(e) * s over both rows, in all of the four threads that share them.
__device__ __forceinline__ void row_maxima(const float (&s)[64], float scale_log2, float (&row)[2]) {
    float top[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 1; i < 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) top[j] = fmaxf(top[j], s[4 * i + j]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        row[r] = fmaxf(top[2 * r], top[2 * r + 1]);
        row[r] = fmaxf(row[r], __shfl_xor_sync(0xFFFFFFFF, row[r], 1));
        row[r] = fmaxf(row[r], __shfl_xor_sync(0xFFFFFFFF, row[r], 2)) * scale_log2;
    }
}

// p = exp(scale * s - maximum) as bf16, in the order of wgmma's A operand, and the thread's part of the rows' sums.
__device__ __forceinline__ void exponentials(const float (&s)[64], float scale_log2, const float (&maximum)[2],
                                             uint32_t (&p)[32], float (&part)[2]) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        float e[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            e[j] = exp2_fast(fmaf(s[4 * i + j], scale_log2, -maximum[j / 2]));
            sums[j] += e[j];
        }
        p[2 * i] = pack_bf16(e[0], e[1]);
        p[2 * i + 1] = pack_bf16(e[2], e[3]);
    }
    part[0] = sums[0] + sums[1];
    part[1] = sums[2] + sums[3];
}

// One thread: loads the items' descriptions and q, and k and v block by block, as the slots fall empty.
template <int D, int WARPGROUPS>
__device__ __forceinline__ void load(uint32_t base, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                     const CUtensorMap& v_map, const int4* __restrict__ tiles, int items, int heads,
                                     int group) {
    using S = Shape<D, WARPGROUPS>;
    RingOf<Q_STAGES> q_ring;
    RingOf<KV_STAGES> kv_ring;

    // The description is (q_start, q_end, seq_start, head); head -1 ends the work.
    auto load_item = [&](int round) {
        const int item = item_at(round);
        const uint32_t full = base + S::Q_FULL + 8 * q_ring.slot;
        int4 tile = make_int4(0, 0, 0, -1);
        if (item < items) {
            tile = tiles[item / heads];
            tile.w = item % heads;
        }
        mbarrier_wait(base + S::Q_EMPTY + 8 * q_ring.slot, q_ring.parity ^ 1);
        store_shared(base + S::ITEM + 16 * (round % ITEMS), tile);
        if (tile.w < 0) {
            mbarrier_arrive(full);
        } else {
            mbarrier_arrive_expect(full, S::Q_BYTES);
            for (int panel = 0; panel < S::PANELS; ++panel) {
                tma_load_2d(base + S::Q + q_ring.slot * S::Q_BYTES + panel * S::Q_PANEL, &q_map, full,
                            tile.w * D + 64 * panel, tile.x);
            }
        }
        q_ring.next();
        return tile;
    };
    auto load_block = [&](const CUtensorMap& map, uint32_t ring, uint32_t full, uint32_t empty, int column, int row) {
        mbarrier_wait(empty + 8 * kv_ring.slot, kv_ring.parity ^ 1);
        mbarrier_arrive_expect(full + 8 * kv_ring.slot, S::KV_BYTES);
        for (int panel = 0; panel < S::PANELS; ++panel) {
            tma_load_2d(ring + kv_ring.slot * S::KV_BYTES + panel * S::KV_PANEL, &map, full + 8 * kv_ring.slot,
                        column + 64 * panel, row);
        }
    };

    tma_prefetch_map(&q_map);
    tma_prefetch_map(&k_map);
    tma_prefetch_map(&v_map);
    int4 tile = load_item(0);
    for (int round = 0; tile.w >= 0; ++round) {
        const int column = tile.w / group * D;
        const int blocks = blocks_of(tile);
        int4 next;
        for (int block = 0; block < blocks; ++block) {
            load_block(k_map, base + S::K, base + S::K_FULL, base + S::K_EMPTY, column, tile.z + block * KEYS);
            load_block(v_map, base + S::V, base + S::V_FULL, base + S::V_EMPTY, column, tile.z + block * KEYS);
            kv_ring.next();
            // Early, since q comes from device memory, and after enough k and v to keep the warpgroups busy.
            if (block == min(1, blocks - 1)) next = load_item(round + 1);
        }
        tile = next;
    }
}

// An item, as a thread of a warpgroup sees it.
struct Item {
    int blocks;
    int full;   // blocks whose keys are seen by all rows of the warpgroup
    int limit;  // of `mask`, for block 0
    float maximum[2];
    float sum[2];  // the thread's part
};

// Raises the maxima of rows whose `part` of a block's sum exceeds RAISE to those of the block, and corrects what was summed.
// A row is raised for its own four threads' sake only, so that its bits do not depend on its neighbours.
template <int D>
__device__ __forceinline__ void raise(Item& item, const float (&s)[64], float scale_log2, const float (&part)[2],
                                      float (&out)[D / 2]) {
    const int lane = threadIdx.x % 32;
    float row[2];
    row_maxima(s, scale_log2, row);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t over = __ballot_sync(0xFFFFFFFF, part[r] > RAISE);
        const bool raise = (over >> (lane & 28)) & 15;
        const float correction = raise ? exp2_fast(item.maximum[r] - row[r]) : 1.0f;
        item.maximum[r] = raise ? row[r] : item.maximum[r];
        item.sum[r] *= correction;
#pragma unroll
        for (int i = 0; i < D / 4; ++i) out[4 * (i / 2) + 2 * r + i % 2] *= correction;
    }
}

// lse of the thread's two rows; `inverse` becomes one over their sums.
__device__ __forceinline__ void store_lse(float* __restrict__ lse, const Item& item, float (&inverse)[2], int head, int tokens,
                                          int first, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = item.sum[r];
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
        inverse[r] = __frcp_rn(sum);
        const int row = lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < rows) {
            lse[static_cast<size_t>(head) * tokens + first + row] = (item.maximum[r] + log2_fast(sum)) * LN_2;
        }
    }
}

// o of the warp's 16 rows, the first `rows` of them, through shared memory, so that rows are written in whole.
// Chunk c (16 bytes) of row r at c ^ (r % 8): neither the stores nor the loads meet in a bank.
template <int D>
__device__ __forceinline__ void store_rows(__nv_bfloat16* __restrict__ o, size_t o_stride, int first, int head,
                                           const float (&out)[D / 2], const float (&inverse)[2], uint32_t staging,
                                           int rows) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        const int row = lane % 16;
        const int chunk = 2 * i + lane / 16;
        stmatrix_x4(staging + row * D * 2 + (chunk ^ (row % 8)) * 16,
                    pack_bf16(out[8 * i] * inverse[0], out[8 * i + 1] * inverse[0]),
                    pack_bf16(out[8 * i + 2] * inverse[1], out[8 * i + 3] * inverse[1]),
                    pack_bf16(out[8 * i + 4] * inverse[0], out[8 * i + 5] * inverse[0]),
                    pack_bf16(out[8 * i + 6] * inverse[1], out[8 * i + 7] * inverse[1]));
    }
    __syncwarp();
    constexpr int CHUNKS = D / 8;           // of a row
    constexpr int AT_ONCE = 32 / CHUNKS;    // rows
    const int chunk = lane % CHUNKS;
    int4 bits[16 / AT_ONCE];
#pragma unroll
    for (int i = 0; i < 16 / AT_ONCE; ++i) {
        const int row = i * AT_ONCE + lane / CHUNKS;
        bits[i] = load_shared(staging + row * D * 2 + (chunk ^ (row % 8)) * 16);
    }
    const int row = lane / CHUNKS;
    __nv_bfloat16* target = o + (first + row) * o_stride + head * D + chunk * 8;
#pragma unroll
    for (int i = 0; i < 16 / AT_ONCE; ++i) {
        store_global(target, bits[i], row + i * AT_ONCE < rows);
        target += AT_ONCE * o_stride;
    }
}

// s = Q K^T of a block; `q` and `k`: the addresses of the warpgroup's rows and of the block's keys.
template <int D, int WARPGROUPS>
__device__ __forceinline__ void issue_scores(float (&s)[64], uint32_t q, uint32_t k) {
    using S = Shape<D, WARPGROUPS>;
    const uint64_t queries = descriptor_k_major(q);
    const uint64_t keys = descriptor_k_major(k);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        wgmma_shared<KEYS, K_MAJOR, K_MAJOR>(s, descriptor_advance(queries, i / 4 * S::Q_PANEL + i % 4 * 32),
                                             descriptor_advance(keys, i / 4 * S::KV_PANEL + i % 4 * 32), i > 0);
    }
    wgmma_commit();
}

// out = or += P V of a block; `v`: the address of its values.
template <int D>
__device__ __forceinline__ void issue_values(float (&out)[D / 2], const uint32_t (&p)[32], uint32_t v, bool accumulate) {
    const uint64_t values = descriptor_mn_major(v, KEYS * 128);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
        wgmma_registers<D, MN_MAJOR>(out, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3],
                                     descriptor_advance(values, i * 16 * 128), accumulate || i > 0);
    }
    wgmma_commit();
}

// Probabilities of a block behind an item's first, and its sums.
template <int D>
__device__ __forceinline__ void add_block(Item& item, const float (&s)[64], float scale_log2, uint32_t (&p)[32],
                                          float (&out)[D / 2]) {
    float part[2];
    exponentials(s, scale_log2, item.maximum, p, part);
    if (__any_sync(0xFFFFFFFF, fmaxf(part[0], part[1]) > RAISE)) {
        raise<D>(item, s, scale_log2, part, out);
        exponentials(s, scale_log2, item.maximum, p, part);
    }
    item.sum[0] += part[0];
    item.sum[1] += part[1];
}

// A warpgroup: 64 rows of every item of the block.
template <int D, int WARPGROUPS>
__device__ __forceinline__ void attend(uint32_t base, __nv_bfloat16* __restrict__ o, size_t o_stride,
                                       float* __restrict__ lse, int tokens, float scale) {
    using S = Shape<D, WARPGROUPS>;
    const int warpgroup = threadIdx.x / 128 - 1;
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    const float scale_log2 = scale * LOG2_E;
    // Named barriers: a warpgroup syncs on its own to issue its products, and arrives at the next one's when it has.
    const int turn = 1 + warpgroup;
    const int next_turn = 1 + (warpgroup + 1) % WARPGROUPS;
    if (warpgroup == WARPGROUPS - 1) named_barrier_arrive(next_turn, 256);

    float s[64];       // scores of the newest block
    uint32_t p[32];    // its probabilities
    float out[D / 2];  // sum of P V of the item's blocks so far
    RingOf<Q_STAGES> q_ring;
    RingOf<KV_STAGES> k_ring, v_ring;

    auto next_item = [&](int round, Item& item) {
        mbarrier_wait(base + S::Q_FULL + 8 * q_ring.slot, q_ring.parity);
        const int4 tile = load_shared(base + S::ITEM + 16 * (round % ITEMS));
        const int first = tile.x + 64 * warpgroup - tile.z;
        item.blocks = blocks_of(tile);
        item.full = min(item.blocks, (first + 1) / KEYS);
        item.limit = first + 16 * warp + lane / 4 - 2 * (lane % 4);
        return tile.w >= 0;
    };
    auto release_q = [&]() {
        if (lane == 0) mbarrier_arrive(base + S::Q_EMPTY + 8 * q_ring.slot);
        q_ring.next();
    };
    auto wait_k = [&]() { mbarrier_wait(base + S::K_FULL + 8 * k_ring.slot, k_ring.parity); };
    auto wait_v = [&]() { mbarrier_wait(base + S::V_FULL + 8 * v_ring.slot, v_ring.parity); };
    auto release_k = [&]() {
        if (lane == 0) mbarrier_arrive(base + S::K_EMPTY + 8 * k_ring.slot);
        k_ring.next();
    };
    auto release_v = [&]() {
        if (lane == 0) mbarrier_arrive(base + S::V_EMPTY + 8 * v_ring.slot);
        v_ring.next();
    };
    auto start_scores = [&]() {
        issue_scores<D, WARPGROUPS>(s, base + S::Q + q_ring.slot * S::Q_BYTES + warpgroup * 64 * 128,
                                    base + S::K + k_ring.slot * S::KV_BYTES);
    };
    auto start_values = [&](bool accumulate) {
        issue_values<D>(out, p, base + S::V + v_ring.slot * S::KV_BYTES, accumulate);
    };
    // P V of block `block - 1`, and scores and probabilities of `block`.
    auto step = [&](auto masked, Item& item, int block) {
        wait_k();
        named_barrier_sync(turn, 256);
        start_scores();
        wait_v();
        start_values(block > 1);
        named_barrier_arrive(next_turn, 256);
        wgmma_wait<1>();
        release_k();
        if (decltype(masked)::value) mask(s, item.limit - block * KEYS);
        wgmma_wait<0>();
        release_v();
        add_block<D>(item, s, scale_log2, p, out);
    };
    // o and lse of the warp's 16 rows.
    auto store = [&](int round, const Item& item) {
        const int4 tile = load_shared(base + S::ITEM + 16 * (round % ITEMS));
        const int first = tile.x + 64 * warpgroup + 16 * warp;
        const int rows = tile.y - first;
        const int head = tile.w;
        float inverse[2];
        store_lse(lse, item, inverse, head, tokens, first, rows);
        store_rows<D>(o, o_stride, first, head, out, inverse, base + S::O + (4 * warpgroup + warp) * 16 * D * 2, rows);
    };

    Item item;
    next_item(0, item);
    wait_k();
    named_barrier_sync(turn, 256);
    start_scores();
    named_barrier_arrive(next_turn, 256);
    wgmma_wait<0>();
    release_k();
    if (item.full == 0) mask(s, item.limit);
    row_maxima(s, scale_log2, item.maximum);
    exponentials(s, scale_log2, item.maximum, p, item.sum);
    int round = 0;
    for (;; ++round) {
        int block = 1;
        for (; block < item.full; ++block) step(Flag<false>{}, item, block);
        for (; block < item.blocks; ++block) step(Flag<true>{}, item, block);
        release_q();
        Item next;
        if (!next_item(round + 1, next)) break;
        wait_k();
        named_barrier_sync(turn, 256);
        start_scores();
        wait_v();
        start_values(item.blocks > 1);
        named_barrier_arrive(next_turn, 256);
        wgmma_wait<1>();
        release_k();
        if (next.full == 0) mask(s, next.limit);
        row_maxima(s, scale_log2, next.maximum);
        wgmma_wait<0>();
        release_v();
        store(round, item);
        exponentials(s, scale_log2, next.maximum, p, next.sum);
        item = next;
    }
    wait_v();
    start_values(item.blocks > 1);
    wgmma_wait<0>();
    store(round, item);
}

template <int D, int WARPGROUPS>
__device__ __forceinline__ void forward(const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        __nv_bfloat16* o, size_t o_stride, float* lse, const int4* tiles, int tile_count,
                                        int tokens, int heads, int group, float scale) {
    using S = Shape<D, WARPGROUPS>;
    extern __shared__ uint8_t shared_memory[];
    const uint32_t base = (shared_address(shared_memory) + 1023) / 1024 * 1024;
    if (threadIdx.x == 0) {
        constexpr int ARRIVALS = 4 * WARPGROUPS;  // one of each warp
        for (int i = 0; i < Q_STAGES; ++i) {
            mbarrier_init(base + S::Q_FULL + 8 * i, 1);
            mbarrier_init(base + S::Q_EMPTY + 8 * i, ARRIVALS);
        }
        for (int i = 0; i < KV_STAGES; ++i) {
            mbarrier_init(base + S::K_FULL + 8 * i, 1);
            mbarrier_init(base + S::K_EMPTY + 8 * i, ARRIVALS);
            mbarrier_init(base + S::V_FULL + 8 * i, 1);
            mbarrier_init(base + S::V_EMPTY + 8 * i, ARRIVALS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    // Registers: 3 * 168 or 4 * 128 a thread of each warpgroup at launch.
    if (threadIdx.x < 128) {
        registers_decrease<WARPGROUPS == 2 ? 24 : 32>();
        if (threadIdx.x == 0) {
            load<D, WARPGROUPS>(base, q_map, k_map, v_map, tiles, tile_count * heads, heads, group);
        }
    } else {
        registers_increase<WARPGROUPS == 2 ? 240 : 160>();
        attend<D, WARPGROUPS>(base, o, o_stride, lse, tokens, scale);
    }
}

}  // namespace

#endif

// ---- kernels --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_hopper_forward_d128(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map, __nv_bfloat16* o, long long o_stride, float* lse,
                                  const int4* tiles, int tile_count, int tokens, int heads, int group, float scale) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    forward<128, 2>(q_map, k_map, v_map, o, o_stride, lse, tiles, tile_count, tokens, heads, group, scale);
#else
    __trap();
#endif
}

extern "C" __global__ void __launch_bounds__(512, 1)
    attention_hopper_forward_d64(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                 const __grid_constant__ CUtensorMap v_map, __nv_bfloat16* o, long long o_stride, float* lse,
                                 const int4* tiles, int tile_count, int tokens, int heads, int group, float scale) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    forward<64, 3>(q_map, k_map, v_map, o, o_stride, lse, tiles, tile_count, tokens, heads, group, scale);
#else
    __trap();
#endif
}
