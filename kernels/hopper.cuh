// Hopper (sm_90a) instructions as functions: mbarriers, the tensor memory accelerator (TMA), wgmma, register
// reallocation, named barriers and the matrix loads and stores between registers and shared memory.
// Source: PTX ISA 8.x, chapters "Asynchronous Warpgroup Level Matrix Multiply-Accumulate" and "cp.async.bulk.tensor".
//
// Shared addresses are the 32-bit addresses of `shared_address`. A function whose comment says "warpgroup" must be
// called by all 128 threads of 4 warps whose first warp index is a multiple of 4, converged.
#pragma once

#include <cuda.h>

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---------------------------------------------------------------------------------------------------------------------
// mbarriers: 8 bytes in shared memory each. A phase ends when `count` arrivals and all expected bytes came in.
// A waiter names the parity of the phase it waits for: 0 for the first, 1 for the second, and so on. Waiting for parity 1
// on a fresh barrier returns at once (the phase "before the first"), which is how a producer finds its first slots empty.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the TMA unit; by the initialising thread, before the block's first barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once and adds `bytes` to what the phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Whether the phase of this parity is over; may wait for a moment.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// The same; does not wait.
__device__ __forceinline__ bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// Slots that a producer fills and a consumer empties, one after the other, and the parity of the round.
template <int STAGES>
struct RingOf {
    int slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
        if (++slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// TMA. One thread issues. A box of a 2D map (columns fastest) lands in shared memory row after row without gaps; with
// SWIZZLE_128B a box is 64 bf16 columns wide, a row is 128 bytes, the destination must be 1024-byte aligned, and the
// 16-byte chunk c of row r lies at chunk (c ^ (r % 8)) of that row. Parts outside the tensor arrive as zeros and count as
// bytes all the same; parts outside are not stored.

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load_2d(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column,
                                            int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(destination), "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// The writer of `source` fences with `fence_async_proxy` and synchronises with this thread first.
__device__ __forceinline__ void tma_store_2d(const CUtensorMap* map, uint32_t source, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source),
                 "r"(column), "r"(row)
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the sources of all but the newest PENDING groups have been read, so that they may be overwritten.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Ordering, registers, named barriers.

// In each thread that wrote shared memory with ordinary stores, before the barrier after which wgmma or TMA reads it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Warpgroup: registers of each thread from here on (a multiple of 8). The kernel needs __launch_bounds__(threads, 1), and
// the sum over the warpgroups must not exceed what the kernel was launched with.
template <int REGISTERS>
__device__ __forceinline__ void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Barrier 0 is __syncthreads'; 1 to 15 are free. `threads` counts those that sync and those that arrive.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix stores and loads of a warp: four 8x8 matrices of 16-bit values. Lane l gives the address of the 16-byte row
// l % 8 of matrix l / 8. In a matrix, lane l holds elements (row l / 4, columns 2 * (l % 4) and the next); with _transposed
// (row 2 * (l % 4) and the next, column l / 4).

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c,
                                                       uint32_t& d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(address)
                 : "memory");
}

// Two floats as bf16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: D (64 x N, f32, registers) = or += A (64 x 16, bf16) * B (16 x N, bf16), asynchronous.
//
// Order of use by a warpgroup: wgmma_fence (the registers of D and A are ready), any number of wgmma, wgmma_commit,
// then wgmma_wait<P>: all but the newest P committed groups are done. Registers of an unfinished group must not be touched.
//
// D in thread t of the warpgroup (warp w = t / 32, lane l = t % 32): d[4 * i + j] is
//   row 16 * w + l / 4 + 8 * (j / 2), column 8 * i + 2 * (l % 4) + j % 2.
// A in registers, k-columns 0..16: a[0] row l / 4, columns 2 * (l % 4) and the next; a[1] the same columns, row + 8;
//   a[2] columns + 8; a[3] columns + 8, row + 8. So columns 16k..16k+16 of a result D are the A operand
//   pack(d[8k], d[8k+1]), pack(d[8k+2], d[8k+3]), pack(d[8k+4], d[8k+5]), pack(d[8k+6], d[8k+7]).
//
// Shared tiles, 128-byte swizzle (as TMA writes them): "panels" of rows of 64 bf16 (128 bytes), 1024-byte aligned, the
// 16-byte chunk c of row r at r * 128 + ((c ^ (r % 8)) * 16).
//
// K-major operand (the 64 panel columns are k; rows are m of A or n of B; e.g. Q and K in Q K^T):
//   SBO = 1024, the bytes from one group of 8 rows to the next; LBO is not used. The 16 columns from k0 (k0 % 16 == 0,
//   within a panel) start at panel + first_row * 128 + k0 * 2, first_row % 8 == 0: 32 bytes a k-step, the swizzle
//   goes by address bits. -> descriptor_k_major(panel + 128 * first_row + 32 * k_step)
//
// MN-major operand (the 64 panel columns are m or n; rows are k; e.g. V in P V: rows are keys, columns n; "transposed" bit
// set in the instruction):
//   SBO = 1024, the bytes from one group of 8 k-rows to the next; LBO = the bytes from one panel (64 columns of m or n) to
//   the next, not used where the operand is 64 wide. The 16 rows from k0 start at panel + k0 * 128: 2048 bytes a k-step.
//   -> descriptor_mn_major(panel + 2048 * k_step, panel_bytes)

__device__ __forceinline__ uint64_t descriptor_bits(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
    // Bits 0-13 address / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16, 62-63 swizzle (1: 128 bytes).
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(leading_bytes >> 4) << 16) |
           (static_cast<uint64_t>(stride_bytes >> 4) << 32) | (1ull << 62);
}

__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) { return descriptor_bits(address, 16, 1024); }

__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t address, uint32_t panel_bytes) {
    return descriptor_bits(address, panel_bytes, 1024);
}

// The same operand `bytes` further on; cheaper than a descriptor from a new address.
__device__ __forceinline__ uint64_t descriptor_advance(uint64_t descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What the instruction takes: whether A or B is MN-major ("transposed").
enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

// Operand lists of the accumulators, eight at a time.
#define WGMMA_D8(i) \
    "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), "+f"(d[(i) + 5]), \
        "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define WGMMA_D32(i) WGMMA_D8(i), WGMMA_D8((i) + 8), WGMMA_D8((i) + 16), WGMMA_D8((i) + 24)

#define WGMMA_R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define WGMMA_R32                                                                                  \
    WGMMA_R8(0, 1, 2, 3, 4, 5, 6, 7) "," WGMMA_R8(8, 9, 10, 11, 12, 13, 14, 15) ","                \
    WGMMA_R8(16, 17, 18, 19, 20, 21, 22, 23) "," WGMMA_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define WGMMA_R40 WGMMA_R32 "," WGMMA_R8(32, 33, 34, 35, 36, 37, 38, 39)
#define WGMMA_R48 WGMMA_R40 "," WGMMA_R8(40, 41, 42, 43, 44, 45, 46, 47)
#define WGMMA_R64 \
    WGMMA_R48 "," WGMMA_R8(48, 49, 50, 51, 52, 53, 54, 55) "," WGMMA_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define WGMMA_R96                                                                                          \
    WGMMA_R64 "," WGMMA_R8(64, 65, 66, 67, 68, 69, 70, 71) "," WGMMA_R8(72, 73, 74, 75, 76, 77, 78, 79) "," \
    WGMMA_R8(80, 81, 82, 83, 84, 85, 86, 87) "," WGMMA_R8(88, 89, 90, 91, 92, 93, 94, 95)
#define WGMMA_R128                                                                                                     \
    WGMMA_R96 "," WGMMA_R8(96, 97, 98, 99, 100, 101, 102, 103) "," WGMMA_R8(104, 105, 106, 107, 108, 109, 110, 111) "," \
    WGMMA_R8(112, 113, 114, 115, 116, 117, 118, 119) "," WGMMA_R8(120, 121, 122, 123, 124, 125, 126, 127)

// D (+)= A B, both from shared memory. Warpgroup. `accumulate` 0: D = A B.
template <int N, Major A, Major B>
struct WgmmaShared;
// D (+)= A B, A from registers (as laid out above), B from shared memory. Warpgroup.
template <int N, Major B>
struct WgmmaRegisters;

// O0 to O6 are the numbers of the operands that follow the accumulators.
#define WGMMA_SHAPE(N, REGISTERS, ACCUMULATORS, O0, O1, O2, O3, O4, O5, O6)                                            \
    template <Major A, Major B>                                                                                        \
    struct WgmmaShared<N, A, B> {                                                                                      \
        static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {        \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, %" #O0 ", %" #O1   \
                         ", p, 1, 1, %" #O3 ", %" #O4 ";\n}\n"                                                         \
                         : ACCUMULATORS                                                                                \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(int(A)), "n"(int(B)));                                 \
        }                                                                                                              \
    };                                                                                                                 \
    template <Major B>                                                                                                 \
    struct WgmmaRegisters<N, B> {                                                                                      \
        static __device__ __forceinline__ void run(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2,           \
                                                   uint32_t a3, uint64_t b, int accumulate) {                          \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {%" #O0 ", %" #O1  \
                         ", %" #O2 ", %" #O3 "}, %" #O4 ", p, 1, 1, %" #O6 ";\n}\n"                                    \
                         : ACCUMULATORS                                                                                \
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(int(B)));                  \
        }                                                                                                              \
    };

#define WGMMA_ACC64 WGMMA_D32(0)
#define WGMMA_ACC80 WGMMA_D32(0), WGMMA_D8(32)
#define WGMMA_ACC96 WGMMA_D32(0), WGMMA_D8(32), WGMMA_D8(40)
#define WGMMA_ACC128 WGMMA_D32(0), WGMMA_D32(32)
#define WGMMA_ACC192 WGMMA_D32(0), WGMMA_D32(32), WGMMA_D32(64)
#define WGMMA_ACC256 WGMMA_D32(0), WGMMA_D32(32), WGMMA_D32(64), WGMMA_D32(96)

WGMMA_SHAPE(64, WGMMA_R32, WGMMA_ACC64, 32, 33, 34, 35, 36, 37, 38)
WGMMA_SHAPE(80, WGMMA_R40, WGMMA_ACC80, 40, 41, 42, 43, 44, 45, 46)
WGMMA_SHAPE(96, WGMMA_R48, WGMMA_ACC96, 48, 49, 50, 51, 52, 53, 54)
WGMMA_SHAPE(128, WGMMA_R64, WGMMA_ACC128, 64, 65, 66, 67, 68, 69, 70)
WGMMA_SHAPE(192, WGMMA_R96, WGMMA_ACC192, 96, 97, 98, 99, 100, 101, 102)
WGMMA_SHAPE(256, WGMMA_R128, WGMMA_ACC256, 128, 129, 130, 131, 132, 133, 134)

// The forms callers write: wgmma_shared<128, K_MAJOR, MN_MAJOR>(d, descriptor_a, descriptor_b, accumulate).
template <int N, Major A, Major B>
__device__ __forceinline__ void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    WgmmaShared<N, A, B>::run(d, a, b, accumulate);
}

template <int N, Major B>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                uint64_t b, int accumulate) {
    WgmmaRegisters<N, B>::run(d, a0, a1, a2, a3, b, accumulate);
}

#endif
