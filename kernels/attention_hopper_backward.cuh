// What attention_hopper_dq.cu and attention_hopper_dkdv.cu share: the backward of causal attention over packed sequences, for
// Hopper (sm_90a): TMA loads, wgmma products, no (T, T) matrix in memory, no atomics. The same input gives the same bits.
//
//   S = scale * q k^T,  P = exp(S - lse),  o = P v                      (forward; lse: log-sum-exp of a row of S)
//   delta = rowsum(do * o),  dP = do v^T,  dS = P * (dP - delta)
//   dv = P^T do,  dk = scale * dS^T q,  dq = scale * dS k
//
// Two kernels, dq first: it also computes delta, which dkdv reads. Each computes S and dP anew, so that dq is a sum over kv
// tiles and dk and dv are sums over q tiles, both in a fixed order inside one block.
//
// A block of either is a warpgroup that loads and two that compute. The tile of its work item stays in shared memory while
// tiles of 64 rows are streamed past it through a ring of slots, each with a barrier `full` and a barrier `empty`.
//
// CPU twin: engine/src/ops/attention.rs
// Source: Dao, "FlashAttention-2" (2023), section 3.1.2; Shah et al., "FlashAttention-3" (2024), for the use of wgmma.
#pragma once

#include "hopper.cuh"

namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr int THREADS = 384;
// What empties a tile or a slot: an arrival of each computing thread. One of each warp, behind a __syncwarp, made the backward 3 to 6%
// slower (H100, D = 128), and racecheck does not see what that orders.
constexpr int CONSUMER_ARRIVALS = 2 * 128;
// Rows of the tile of a work item: 64 for each of the two computing warpgroups.
constexpr int TILE_ROWS = 128;
// Rows of a tile that is streamed past it, and of a TMA box.
constexpr int STREAM_ROWS = 64;
// A panel is 64 columns wide.
constexpr int PANEL_ROW_BYTES = 128;
// Slots of the ring.
constexpr int STAGES = 4;

// Dynamic shared memory: TILES tiles of the work item, STAGES slots for two streamed tiles, lse and delta of the slots'
// q rows (dkdv), the barriers, and room to align all to the 1024 bytes of the swizzle.
template <int D, int TILES, bool STATISTICS>
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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

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

using Ring = RingOf<STAGES>;

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
            mbarrier_init(tile_empty(), CONSUMER_ARRIVALS);
            for (int slot = 0; slot < STAGES; slot++) {
                mbarrier_init(full(slot), arrivals);
                mbarrier_init(empty(slot), CONSUMER_ARRIVALS);
            }
            mbarrier_init_fence();
        }
        __syncthreads();
    }
};

#endif

}  // namespace
