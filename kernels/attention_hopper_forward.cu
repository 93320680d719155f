#include "hopper.cuh"

namespace {

constexpr int KEYS = 128;  // keys of a block
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// A row's maximum is only raised when it grows by more than a factor of 2^8: probabilities then reach 256 instead of 1,
// which costs f32 and bf16 no precision, and spares nearly all rescaling of the output.
constexpr float RAISE = 8.0f;

#ifndef PINGPONG
#define PINGPONG 1
#endif
#ifndef SNAKE
#define SNAKE 1
#endif

#ifdef TRACE
}
extern "C" __device__ uint2 trace[132 * 3 * 4096];
namespace {
#define MARK(k) do { if (threadIdx.x % 128 == 0 && mark < 4096) { uint32_t c; asm volatile("mov.u32 %0, %%clock;" : "=r"(c) :: "memory"); trace[(blockIdx.x * 3 + warpgroup) * 4096 + mark++] = make_uint2(k, c); } } while (0)
#else
#define MARK(k)
#endif
template <bool VALUE>
struct Flag {
    static constexpr bool value = VALUE;
};

template <int D, int WARPGROUPS, int STAGES>
struct Shape {
    static constexpr int ROWS = 64 * WARPGROUPS;
    static constexpr int PANELS = D / 64;
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int Q_BYTES = ROWS * D * 2;
    static constexpr int KV_BYTES = KEYS * D * 2;
    static constexpr int Q_OFFSET = 0;
    static constexpr int O_OFFSET = Q_OFFSET + 2 * Q_BYTES;
    static constexpr int K_OFFSET = O_OFFSET + Q_BYTES;
    static constexpr int V_OFFSET = K_OFFSET + STAGES * KV_BYTES;
    static constexpr int BARRIER_OFFSET = V_OFFSET + STAGES * KV_BYTES;
    static constexpr int BARRIERS = 4 + 4 * STAGES;
    static constexpr int SHARED_BYTES = 1024 + BARRIER_OFFSET + 8 * BARRIERS;
};

// A ring position: the slot and the parity of its current round.
template <int STAGES>
struct Slot {
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ int item_at(int round) {
    const int across = (SNAKE && (round & 1)) ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + across;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <bool MASKED>
__device__ __forceinline__ void softmax(float (&s)[64], float (&maximum)[2], float (&sum)[2], float (&correction)[2],
                                        float scale_log2, int limit) {
    if (MASKED) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (8 * i + j % 2 > limit + 8 * (j / 2)) s[4 * i + j] = -INFINITY;
            }
        }
    }
    float top[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 1; i < 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) top[j] = fmaxf(top[j], s[4 * i + j]);
    }
    float row[2] = {fmaxf(top[0], top[1]), fmaxf(top[2], top[3])};
#pragma unroll
    for (int r = 0; r < 2; ++r) row[r] = fmaxf(row[r], __shfl_xor_sync(0xFFFFFFFF, row[r], 1));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        row[r] = fmaxf(row[r], __shfl_xor_sync(0xFFFFFFFF, row[r], 2)) * scale_log2;
        const bool raise = row[r] > maximum[r] + RAISE;
        correction[r] = raise ? exp2_fast(maximum[r] - row[r]) : 1.0f;
        maximum[r] = raise ? row[r] : maximum[r];
    }
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            s[4 * i + j] = exp2_fast(fmaf(s[4 * i + j], scale_log2, -maximum[j / 2]));
            part[j] += s[4 * i + j];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = sum[r] * correction[r] + (part[2 * r] + part[2 * r + 1]);
}

template <int D, int WARPGROUPS, int STAGES>
__device__ __forceinline__ void forward(const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        __nv_bfloat16* __restrict__ o, size_t o_stride, float* __restrict__ lse,
                                        const int4* __restrict__ tiles, int tile_count, int tokens, int heads, int group,
                                        float scale) {
    using S = Shape<D, WARPGROUPS, STAGES>;
    extern __shared__ uint8_t shared_memory[];
    const uint32_t base = (shared_address(shared_memory) + 1023) & ~1023u;
    const uint32_t q_full = base + S::BARRIER_OFFSET;
    const uint32_t q_empty = q_full + 16;
    const uint32_t k_full = q_empty + 16;
    const uint32_t k_empty = k_full + 8 * STAGES;
    const uint32_t v_full = k_empty + 8 * STAGES;
    const uint32_t v_empty = v_full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(q_full + 8 * i, 1);
            mbarrier_init(q_empty + 8 * i, 4 * WARPGROUPS);
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(k_full + 8 * i, 1);
            mbarrier_init(k_empty + 8 * i, 4 * WARPGROUPS);
            mbarrier_init(v_full + 8 * i, 1);
            mbarrier_init(v_empty + 8 * i, 4 * WARPGROUPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    const int items = tile_count * heads;
    if (threadIdx.x < 128) {
        registers_decrease<WARPGROUPS == 2 ? 24 : 32>();
        if (threadIdx.x == 0) {
            tma_prefetch_map(&q_map);
            tma_prefetch_map(&k_map);
            tma_prefetch_map(&v_map);
            Slot<STAGES> slot;
            Slot<2> q_slot;
            for (int round = 0; item_at(round) < items; ++round) {
                const int4 tile = tiles[item_at(round) / heads];
                const int head = item_at(round) % heads;
                const int column = head / group * D;
                const int blocks = (tile.y - tile.z + KEYS - 1) / KEYS;
                mbarrier_wait(q_empty + 8 * q_slot.index, q_slot.parity ^ 1);
                mbarrier_arrive_expect(q_full + 8 * q_slot.index, S::Q_BYTES);
                for (int p = 0; p < S::PANELS; ++p) {
                    tma_load_2d(base + S::Q_OFFSET + q_slot.index * S::Q_BYTES + p * S::ROWS * 128, &q_map,
                                q_full + 8 * q_slot.index, head * D + 64 * p, tile.x);
                }
                q_slot.advance();
                for (int block = 0; block < blocks; ++block) {
                    const int row = tile.z + block * KEYS;
                    mbarrier_wait(k_empty + 8 * slot.index, slot.parity ^ 1);
                    mbarrier_arrive_expect(k_full + 8 * slot.index, S::KV_BYTES);
                    for (int p = 0; p < S::PANELS; ++p) {
                        tma_load_2d(base + S::K_OFFSET + slot.index * S::KV_BYTES + p * KEYS * 128, &k_map,
                                    k_full + 8 * slot.index, column + 64 * p, row);
                    }
                    mbarrier_wait(v_empty + 8 * slot.index, slot.parity ^ 1);
                    mbarrier_arrive_expect(v_full + 8 * slot.index, S::KV_BYTES);
                    for (int p = 0; p < S::PANELS; ++p) {
                        tma_load_2d(base + S::V_OFFSET + slot.index * S::KV_BYTES + p * KEYS * 128, &v_map,
                                    v_full + 8 * slot.index, column + 64 * p, row);
                    }
                    slot.advance();
                }
            }
        }
    } else {
        registers_increase<WARPGROUPS == 2 ? 240 : 160>();
        const int warpgroup = threadIdx.x / 128 - 1;
        const int warp = threadIdx.x / 32 % 4;
        const int lane = threadIdx.x % 32;
        const int turn = 1 + warpgroup;
        const int next_turn = 1 + (warpgroup + 1) % WARPGROUPS;
        const float scale_log2 = scale * LOG2_E;
        const uint32_t staging = base + S::O_OFFSET + (warpgroup * 4 + warp) * 16 * D * 2;

#ifdef TRACE
        int mark = 0;
#endif
        float s[64];       // scores, then probabilities, of the newest block
        uint32_t p[32];    // probabilities of the block before, the A operand of P V
        float out[D / 2];  // sum of P V, of the item's blocks so far
        Slot<2> q_slot;
        Slot<STAGES> k_slot, v_slot;
        if (PINGPONG && warpgroup == WARPGROUPS - 1) named_barrier_arrive(1, 256);

        auto scores = [&]() {
            const uint32_t q_rows = base + S::Q_OFFSET + q_slot.index * S::Q_BYTES + warpgroup * 64 * 128;
            const uint32_t k_tile = base + S::K_OFFSET + k_slot.index * S::KV_BYTES;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                wgmma_shared<KEYS, K_MAJOR, K_MAJOR>(
                    s, descriptor_k_major(q_rows + k / 4 * S::ROWS * 128 + k % 4 * 32),
                    descriptor_k_major(k_tile + k / 4 * KEYS * 128 + k % 4 * 32), k > 0);
            }
            wgmma_commit();
        };
        auto values = [&](bool accumulate) {
            const uint32_t v_tile = base + S::V_OFFSET + v_slot.index * S::KV_BYTES;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k) {
                wgmma_registers<D, MN_MAJOR>(out, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
                                             descriptor_mn_major(v_tile + k * 2048, KEYS * 128), accumulate || k > 0);
            }
            wgmma_commit();
        };
        auto pack = [&]() {
#pragma unroll
            for (int i = 0; i < 32; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
        };
        auto wait_q = [&]() { mbarrier_wait(q_full + 8 * q_slot.index, q_slot.parity); };
        auto wait_k = [&]() { mbarrier_wait(k_full + 8 * k_slot.index, k_slot.parity); };
        auto wait_v = [&]() { mbarrier_wait(v_full + 8 * v_slot.index, v_slot.parity); };
        auto release_k = [&]() {
            if (lane == 0) mbarrier_arrive(k_empty + 8 * k_slot.index);
            k_slot.advance();
        };
        auto release_v = [&]() {
            if (lane == 0) mbarrier_arrive(v_empty + 8 * v_slot.index);
            v_slot.advance();
        };

        struct Item {
            int head, first, end, blocks, full, limit;
            float maximum[2], sum[2];
        };
        auto item_of = [&](int4 tile, int head) {
            Item item;
            item.head = head;
            item.first = tile.x + 64 * warpgroup + 16 * warp;
            item.end = tile.y;
            item.blocks = (tile.y - tile.z + KEYS - 1) / KEYS;
            item.full = min(item.blocks, (tile.x + 64 * warpgroup + 1 - tile.z) / KEYS);
            // Key 8 * i + j % 2 of block 0 is seen by this thread's first row if it is at most this.
            item.limit = item.first + lane / 4 - tile.z - 2 * (lane % 4);
            item.maximum[0] = item.maximum[1] = -INFINITY;
            item.sum[0] = item.sum[1] = 0.0f;
            return item;
        };
        auto first_softmax = [&](Item& item) {
            float correction[2];
            if (item.full > 0) {
                softmax<false>(s, item.maximum, item.sum, correction, scale_log2, 0);
            } else {
                softmax<true>(s, item.maximum, item.sum, correction, scale_log2, item.limit);
            }
        };
        auto step = [&](auto masked, Item& item, int block) {
            float correction[2];
            MARK(decltype(masked)::value ? 16 : 0);
            wait_k();
            MARK(1);
            if (PINGPONG) named_barrier_sync(turn, 256);
            MARK(2);
            scores();
            wait_v();
            values(block > 1);
            MARK(3);
            if (PINGPONG) named_barrier_arrive(next_turn, 256);
            wgmma_wait<1>();
            MARK(4);
            release_k();
            softmax<decltype(masked)::value>(s, item.maximum, item.sum, correction, scale_log2, item.limit - block * KEYS);
            MARK(5);
#if HOLD == 1
            if (item.sum[0] + item.sum[1] < -1.0f) asm volatile("trap;");
#elif HOLD == 2
            if (item.sum[0] + item.sum[1] < -1.0f) __nanosleep(0);
#elif HOLD == 3
            asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0fBF800000; @p st.shared.f32 [%1], %0;}" ::"f"(item.sum[0] + item.sum[1]), "r"(base) : "memory");
#endif
            wgmma_wait<0>();
            MARK(6);
            release_v();
            if (__any_sync(0xFFFFFFFF, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
                for (int i = 0; i < D / 2; ++i) out[i] *= correction[i / 2 % 2];
            }
            pack();
        };
        auto store = [&](Item& item) {
            float inverse[2];
            const int row = item.first + lane / 4;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = item.sum[r];
                sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
                sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
                inverse[r] = 1.0f / sum;
                if (lane % 4 == 0 && row + 8 * r < item.end) {
                    lse[static_cast<size_t>(item.head) * tokens + row + 8 * r] = item.maximum[r] * LN_2 + logf(sum);
                }
            }
            __syncwarp();
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                const int line = lane % 16;
                const int chunk = 2 * k + lane / 16;
                stmatrix_x4(staging + line * D * 2 + (chunk ^ (line % 8)) * 16,
                            pack_bf16(out[8 * k] * inverse[0], out[8 * k + 1] * inverse[0]),
                            pack_bf16(out[8 * k + 2] * inverse[1], out[8 * k + 3] * inverse[1]),
                            pack_bf16(out[8 * k + 4] * inverse[0], out[8 * k + 5] * inverse[0]),
                            pack_bf16(out[8 * k + 6] * inverse[1], out[8 * k + 7] * inverse[1]));
            }
            __syncwarp();
            constexpr int CHUNKS = D / 8;
#pragma unroll
            for (int i = 0; i < CHUNKS / 2; ++i) {
                const int line = (i * 32 + lane) / CHUNKS;
                const int chunk = lane % CHUNKS;
                const int position = item.first + line;
                uint4 bits;
                asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                             : "r"(staging + line * D * 2 + (chunk ^ (line % 8)) * 16)
                             : "memory");
                if (position < item.end) {
                    *reinterpret_cast<uint4*>(o + position * o_stride + item.head * D + chunk * 8) = bits;
                }
            }
        };

        int index = item_at(0);
        Item item = item_of(tiles[index / heads], index % heads);
        wait_q();
        wait_k();
        if (PINGPONG) named_barrier_sync(turn, 256);
        scores();
        if (PINGPONG) named_barrier_arrive(next_turn, 256);
        wgmma_wait<0>();
        release_k();
        first_softmax(item);
        pack();
        for (int round = 1;; ++round) {
            const int next_index = item_at(round);
            const bool more = next_index < items;
            const int4 next_tile = more ? tiles[next_index / heads] : make_int4(0, 0, 0, 0);
            int block = 1;
            for (; block < item.full; ++block) step(Flag<false>{}, item, block);
            for (; block < item.blocks; ++block) step(Flag<true>{}, item, block);

            // The last P V of this item runs with the first Q K^T of the next.
            if (lane == 0) mbarrier_arrive(q_empty + 8 * q_slot.index);
            q_slot.advance();
            Item next = item_of(next_tile, next_index % heads);
            if (more) {
                MARK(32);
                wait_q();
                MARK(33);
                wait_k();
                MARK(34);
                if (PINGPONG) named_barrier_sync(turn, 256);
                MARK(35);
                scores();
                wait_v();
                values(item.blocks > 1);
                MARK(36);
                if (PINGPONG) named_barrier_arrive(next_turn, 256);
                wgmma_wait<1>();
                MARK(37);
                release_k();
                first_softmax(next);
                MARK(38);
                wgmma_wait<0>();
                MARK(39);
                release_v();
                store(item);
                MARK(40);
                pack();
                item = next;
            } else {
                wait_v();
                values(item.blocks > 1);
                wgmma_wait<0>();
                store(item);
                break;
            }
        }
    }
}

}  // namespace

#ifndef WG64
#define WG64 3
#endif

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_hopper_forward_d128(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                  const __grid_constant__ CUtensorMap v_map, __nv_bfloat16* o, long long o_stride, float* lse,
                                  const int4* tiles, int tile_count, int tokens, int heads, int group, float scale) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    forward<128, 2, 2>(q_map, k_map, v_map, o, o_stride, lse, tiles, tile_count, tokens, heads, group, scale);
#else
    __trap();
#endif
}

extern "C" __global__ void __launch_bounds__(128 * (WG64 + 1), 1)
    attention_hopper_forward_d64(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                 const __grid_constant__ CUtensorMap v_map, __nv_bfloat16* o, long long o_stride, float* lse,
                                 const int4* tiles, int tile_count, int tokens, int heads, int group, float scale) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    forward<64, WG64, 2>(q_map, k_map, v_map, o, o_stride, lse, tiles, tile_count, tokens, heads, group, scale);
#else
    __trap();
#endif
}
