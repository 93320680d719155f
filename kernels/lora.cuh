// What lora.cu, lora_gradient.cu and lora_output.cu share: the structs of a group, and the pipeline from device memory to the tensor cores.
//
// Both kinds of product stream a tall matrix once. SPLIT blocks share a tile of the result, each with a part of the sum; the last one to
// arrive adds the parts in their order, so that the result is the same in every run. (Clusters would add them without device memory. But
// an H100 takes 30 clusters of four such blocks at a time, so that the 32 tiles of 4096 tokens took two turns: measured.)

#pragma once

#include "mma.cuh"

// engine/src/ops/cuda/lora.rs names all of these too.
constexpr int MAX_PROJECTIONS = 3;
// Blocks that share a tile of the result.
constexpr int SPLIT = 4;
// Rows (or columns) of the tall matrix in a tile.
constexpr int TILE = 128;
// Depth of a step of the sum, and steps that are on their way at a time.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int STEP = 64, STAGES = 4;
#else
// Some of these have 99 KiB of shared memory for a block, and code for sm_80 runs on all of 8.x.
constexpr int STEP = 64, STAGES = 3;
#endif
// Columns of the small operand that a pass covers at most, so that its sums stay in registers.
constexpr int MAX_WIDTH = 96;
// A warp has 16 rows (or columns) of a tile.
constexpr int LORA_THREADS = TILE / 16 * WARP;
// Tiles of a launch at most.
constexpr int MAX_TILES = 1 << 15;

// Where the gradients of a group stand: dB (outputs, rank) or dA (rank, K), null where a projection has none.
// engine/src/ops/cuda/lora.rs holds the same struct.
struct LoraGradient {
    float* gradient[MAX_PROJECTIONS];
    int rank[MAX_PROJECTIONS];
    int outputs[MAX_PROJECTIONS];
    // Of dB only.
    float scale[MAX_PROJECTIONS];
    int count;
};

namespace {

// 16-byte units of a row of a tile in shared memory: an odd number, so that eight rows lie in all banks.
__host__ __device__ constexpr int row_units(int values) { return values / GROUP | 1; }

// Copies 8 values to shared memory in the background; those from `left` on are 0. `from` is 16-byte aligned.
__device__ __forceinline__ void copy_group(uint32_t to, const bf16* from, int left) {
    const int bytes = min(max(left, 0), GROUP) * int(sizeof(bf16));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// As copy_group, for any address, at once.
__device__ __forceinline__ void copy_unaligned(uint32_t to, const bf16* from, int left) {
    float values[GROUP];
    load_part(from, left, false, values);
    const uint4 words = pack<bf16>(values).words[0];
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

// Either of the two.
__device__ __forceinline__ void copy_group(uint32_t to, const bf16* from, int left, bool aligned) {
    aligned ? copy_group(to, from, left) : copy_unaligned(to, from, left);
}

// Copies a step of a small matrix with a row for each token, those from `first` on, by the THREADS threads of a block: GROUPS units of each,
// 0 from `tokens` and from `width` values on.
template <int GROUPS, int THREADS>
__device__ __forceinline__ void copy_tokens(uint32_t stage, const bf16* small, long long stride, bool aligned, int first, int tokens, int width) {
#pragma unroll
    for (int i = 0; i < (STEP * GROUPS + THREADS - 1) / THREADS; i++) {
        const int index = i * THREADS + int(threadIdx.x), row = index / GROUPS, unit = index % GROUPS, token = first + row;
        const bool is_there = token < tokens && unit * GROUP < width;
        const bf16* from = small + (is_there ? token * size_t(stride) + unit * GROUP : 0);
        if (index < STEP * GROUPS) {
            copy_group(stage + 16 * (row * row_units(GROUPS * GROUP) + unit), from, is_there ? GROUP : 0, aligned);
        }
    }
}

// Blocks of each tile that have left their part: 0 before and after every launch.
__device__ int arrivals[MAX_TILES];

// Which part of the tile's sum this block has.
__device__ __forceinline__ int own_part() { return blockIdx.x; }

// Where that part is left: `values` floats, a multiple of 4.
__device__ __forceinline__ float* part_of_tile(float* partials, int part, int values) {
    return partials + (size_t(blockIdx.y) * SPLIT + part) * values;
}

// Writes 16 rows of 8 GROUPS columns, as `multiply` leaves them; `to`: row lane / 4, column lane % 4 * 2.
template <int GROUPS>
__device__ __forceinline__ void store_sums(float* to, const float (&sums)[GROUPS][4]) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        *reinterpret_cast<float2*>(to + group * GROUP) = make_float2(sums[group][0], sums[group][1]);
        *reinterpret_cast<float2*>(to + group * GROUP + 8 * GROUPS * GROUP) = make_float2(sums[group][2], sums[group][3]);
    }
}

// Whether this block is the last of the BLOCKS of its tile to get here; it sees what all have written before.
template <int BLOCKS>
__device__ __forceinline__ bool is_last_of_tile() {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&arrivals[blockIdx.y], 1) == BLOCKS - 1;
        if (is_last) {
            arrivals[blockIdx.y] = 0;
        }
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

// Four neighbouring values of a tile, summed over its parts in their order.
template <int PARTS>
__device__ __forceinline__ float4 total(const float* partials, int at, int values) {
    float4 parts[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        parts[part] = __ldcg(reinterpret_cast<const float4*>(partials + (size_t(blockIdx.y) * PARTS + part) * values + at));
    }
    float4 sum = parts[0];
#pragma unroll
    for (int part = 1; part < PARTS; part++) {
        sum.x += parts[part].x;
        sum.y += parts[part].y;
        sum.z += parts[part].z;
        sum.w += parts[part].w;
    }
    return sum;
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
