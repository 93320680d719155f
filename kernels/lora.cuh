// What lora.cu and lora_gradient.cu share: the structs of a group, and the pipeline from device memory to the tensor cores.
//
// Both kinds of product stream a tall matrix once. The blocks of a tile of the result split the sum: on Hopper they are a cluster, add their
// parts through distributed shared memory in a fixed order, and the tile may be large; elsewhere each takes a part of the tile and the
// whole sum.

#pragma once

#include "common.cuh"

constexpr int MAX_PROJECTIONS = 3;
#ifndef LPRE
#define LPRE ""
#endif
#ifndef LSPLIT
#define LSPLIT 4
#endif
#ifndef LTILE
#define LTILE 128
#endif
#ifndef LSTEP
#define LSTEP 64
#endif
#ifndef LSTAGES
#define LSTAGES 4
#endif
// Blocks that share a tile of the result.
constexpr int SPLIT = LSPLIT;
// Rows (or columns) of the tall matrix in a tile; of them a block sums TILE_PART.
constexpr int TILE = LTILE;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int TILE_PART = TILE / SPLIT;
#define LORA_CLUSTER
#else
constexpr int TILE_PART = TILE;
#define LORA_CLUSTER __cluster_dims__(SPLIT, 1, 1)
#endif
// Depth of a step of the sum, and steps that are on their way at a time.
constexpr int STEP = LSTEP, STAGES = LSTAGES;
// Columns of the small operand that a pass covers at most, so that its sums stay in registers.
constexpr int MAX_WIDTH = 96;
// A warp has 16 rows (or columns) of a tile.
constexpr int LORA_THREADS = TILE / 16 * WARP;

namespace {

// 16-byte units of a row of a tile in shared memory: an odd number, so that eight rows lie in all banks.
__host__ __device__ constexpr int row_units(int values) { return values / GROUP | 1; }

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// Copies 8 values to shared memory in the background; those from `left` on are 0. `from` is 16-byte aligned.
__device__ __forceinline__ void copy_group(uint32_t to, const bf16* from, int left) {
    const int bytes = min(max(left, 0), GROUP) * int(sizeof(bf16));
    asm volatile("cp.async.cg.shared.global" LPRE " [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// As copy_group, for any address, at once.
__device__ __forceinline__ void copy_unaligned(uint32_t to, const bf16* from, int left) {
    float values[GROUP];
    load_part(from, left, false, values);
    const uint4 words = pack<bf16>(values).words[0];
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// sums (16, 8) += left (16, 16) right (16, 8).
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_low, uint32_t right_high) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_low), "r"(right_high));
}

// Which of the four blocks of a tile this is.
__device__ __forceinline__ int part_of_tile() { return blockIdx.x; }

// The steps of the sum that this block takes.
__device__ __forceinline__ void own_steps(int steps, int& begin, int& end) {
    begin = 0;
    end = steps;
    if (TILE_PART == TILE) {
        begin = int(size_t(steps) * part_of_tile() / SPLIT);
        end = int(size_t(steps) * (part_of_tile() + 1) / SPLIT);
    }
}

// All threads of the blocks of a tile; what they wrote to shared memory before is seen by all after.
__device__ __forceinline__ void sync_tile() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Four neighbouring sums of a tile over the blocks that share it, in the order of the blocks.
__device__ __forceinline__ float4 total(const float* own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    float4 parts[SPLIT];
#pragma unroll
    for (int block = 0; block < SPLIT; block++) {
        uint32_t at;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(own)), "r"(block));
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(parts[block].x), "=f"(parts[block].y), "=f"(parts[block].z), "=f"(parts[block].w)
                     : "r"(at)
                     : "memory");
    }
    float4 sum = parts[0];
#pragma unroll
    for (int block = 1; block < SPLIT; block++) {
        sum.x += parts[block].x;
        sum.y += parts[block].y;
        sum.z += parts[block].z;
        sum.w += parts[block].w;
    }
    return sum;
#else
    return *reinterpret_cast<const float4*>(own);
#endif
}

// Columns of a small operand of `width` that a pass covers: as many for each.
struct Pass {
    int count, first, width;
    // Groups of 8 columns that the kernel is compiled for.
    int groups;
};

__device__ __forceinline__ Pass pass_of(int index, int width) {
    const int count = (width + MAX_WIDTH - 1) / MAX_WIDTH, groups = (width / GROUP + count - 1) / count;
    const int first = index % count * groups * GROUP;
    return {count, first, min(groups * GROUP, width - first), groups <= 2 ? 2 : groups <= 4 ? 4 : groups <= 6 ? 6 : groups <= 8 ? 8 : 12};
}

template <int COUNT>
struct Constant {
    static constexpr int value = COUNT;
};

// Calls `run` with the pass's groups as a constant.
template <typename Run>
__device__ __forceinline__ void with_groups(int groups, const Run& run) {
    switch (groups) {
        case 2:
            return run(Constant<2>{});
        case 4:
            return run(Constant<4>{});
        case 6:
            return run(Constant<6>{});
        case 8:
            return run(Constant<8>{});
        default:
            return run(Constant<12>{});
    }
}

}  // namespace
