// Gradients of the LoRAs of a group of projections (names and shapes as in lora.cu).
//
//   dB_p (N_p, rank) += s_p dy_p^T u_p        dA_p (rank, K) += du_p^T x        sums over tokens
// dy and x are read once, in tiles of 128 columns; gradients are f32.
//
// CPU twin: engine/src/model/linear.rs. Source: LoRA (2106.09685).

#include "lora.cuh"

// ---------------------------------------------------------------- device helpers

namespace {

// Columns of a tall matrix, and the small one that they are multiplied with, sums over tokens.
struct Product {
    const bf16* tall;
    long long tall_stride;
    // The first column is a multiple of 8; those from the end on are 0.
    int first_column, end_column;
    const bf16* small;
    long long small_stride;
    int tokens;
};

// A row of a tile of the tall matrix, and of the small one, in 16-byte units.
constexpr int UNITS = TILE / GROUP, TALL_UNITS = row_units(TILE);
template <int GROUPS>
constexpr int SMALL_UNITS = row_units(GROUPS * GROUP);
// Rows of the tall matrix that the threads of a block copy at a time.
constexpr int ROWS_AT_ONCE = LORA_THREADS / UNITS;
static_assert(STEP % ROWS_AT_ONCE == 0, "every thread copies as many units");

// A step of both matrices to shared memory, the small one behind the tall one. A thread copies one unit of every ROWS_AT_ONCE-th row of
// the tall one. Of the small one's columns, those from `width` on are 0.
template <int GROUPS>
__device__ __forceinline__ void load_step(uint32_t stage, const Product& product, bool small_aligned, int step, int width) {
    const int thread = threadIdx.x, own_unit = thread % UNITS, own_row = thread / UNITS;
    const int column = product.first_column + own_unit * GROUP, left = product.end_column - column;
    const uint32_t stage_small = stage + 16 * STEP * TALL_UNITS;
#pragma unroll
    for (int i = 0; i < STEP / ROWS_AT_ONCE; i++) {
        // Tokens beyond the last are copies of it here, and 0 in the small matrix.
        const int row = own_row + i * ROWS_AT_ONCE, token = min(step * STEP + row, product.tokens - 1);
        const bf16* from = product.tall + (left > 0 ? token * size_t(product.tall_stride) + column : 0);
        copy_group(stage + 16 * (row * TALL_UNITS + own_unit), from, left);
    }
    copy_tokens<GROUPS, LORA_THREADS>(stage_small, product.small, product.small_stride, small_aligned, step * STEP, product.tokens,
                                      width);
}

// The sums of this block to its part of the tile: [c][r], or [r][c] where `BY_RANK`.
template <int GROUPS, bool BY_RANK>
__device__ __forceinline__ void store_part(float* part, const float (&sums)[GROUPS][4], int warp, int lane) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const int c = warp * 16 + lane / 4, r = group * GROUP + lane % 4 * 2;
        if (BY_RANK) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                part[(r + i % 2) * TILE + c + i / 2 * 8] = sums[group][i];
            }
        } else {
            *reinterpret_cast<float2*>(part + c * GROUPS * GROUP + r) = make_float2(sums[group][0], sums[group][1]);
            *reinterpret_cast<float2*>(part + (c + 8) * GROUPS * GROUP + r) = make_float2(sums[group][2], sums[group][3]);
        }
    }
}

// The sums over tokens of tall[t][first_column + c] small[t][r] for the TILE columns c and 8 GROUPS columns r, as this block has them, to its
// part: [c][r], or [r][c] where `BY_RANK`. Of r, those from `width` on are of no use. True in the last block of the tile.
template <int GROUPS, bool BY_RANK>
__device__ __forceinline__ bool sum_over_tokens(const Product& product, float* partials, int width) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int STAGE_BYTES = 16 * STEP * (TALL_UNITS + SMALL_UNITS<GROUPS>);
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const uint32_t base = shared_address(shared);
    const bool small_aligned = is_aligned(product.small);
    const int all_steps = (product.tokens + STEP - 1) / STEP;
    const int begin = all_steps * own_part() / SPLIT, end = all_steps * (own_part() + 1) / SPLIT;

    const auto load = [&](int step) {
        load_step<GROUPS>(base + (step - begin) % STAGES * STAGE_BYTES, product, small_aligned, step, width);
    };

    float sums[GROUPS][4] = {};
    for (int step = begin; step < begin + STAGES - 1; step++) {
        if (step < end) {
            load(step);
        }
        commit_copies();
    }
    for (int step = begin; step < end; step++) {
        await_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < end) {
            load(step + STAGES - 1);
        }
        commit_copies();
        const uint32_t stage = base + (step - begin) % STAGES * STAGE_BYTES, stage_small = stage + 16 * STEP * TALL_UNITS;
#pragma unroll
        for (int half = 0; half < STEP / 32; half++) {
            uint32_t left_low[4], left_high[4], right[GROUPS][4];
            const int row = half * 32 + lane / 16 * 8 + lane % 8, unit = warp * 2 + lane / 8 % 2;
            load_transposed(left_low, stage + 16 * (row * TALL_UNITS + unit));
            load_transposed(left_high, stage + 16 * ((row + 16) * TALL_UNITS + unit));
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                load_transposed(right[group], stage_small + 16 * ((half * 32 + lane) * SMALL_UNITS<GROUPS> + group));
            }
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                multiply(sums[group], left_low, right[group][0], right[group][1]);
            }
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                multiply(sums[group], left_high, right[group][2], right[group][3]);
            }
        }
    }

    float* part = part_of_tile(partials, own_part(), TILE * GROUPS * GROUP);
    store_part<GROUPS, BY_RANK>(part, sums, warp, lane);
    return is_last_of_tile<SPLIT>();
}

// dB of a tile of columns, from rank `pass.first` on: `gradient` is the row of column 0.
template <int GROUPS>
__device__ __forceinline__ void add_db(float* gradient, int rank, float scale, const Product& product, float* partials, int first_output,
                                       const Pass& pass) {
    constexpr int WIDTH = GROUPS * GROUP, FOURS = WIDTH / 4;
    if (!sum_over_tokens<GROUPS, false>(product, partials, pass.width)) {
        return;
    }
    for (int i = threadIdx.x; i < TILE * FOURS; i += LORA_THREADS) {
        const int c = i / FOURS, r = i % FOURS * 4, column = product.first_column + c, left = rank - pass.first - r;
        if (column < first_output || column >= product.end_column || r >= pass.width || left <= 0) {
            continue;
        }
        const float4 sum = total<SPLIT>(partials, c * WIDTH + r, TILE * WIDTH);
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        float* to = gradient + size_t(column - first_output) * rank + pass.first + r;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j < left) {
                to[j] += scale * values[j];
            }
        }
    }
}

// dA of a tile of columns.
template <int GROUPS>
__device__ __forceinline__ void add_da(const LoraGradient& group, const Product& product, float* partials, int padded_rank,
                                       const Pass& pass) {
    constexpr int FOURS = TILE / 4;
    if (!sum_over_tokens<GROUPS, true>(product, partials, pass.width)) {
        return;
    }
    const int columns = product.end_column;
    for (int i = threadIdx.x; i < pass.width * FOURS; i += LORA_THREADS) {
        const int r = i / FOURS, c = i % FOURS * 4, column = product.first_column + c;
        const int p = (pass.first + r) / padded_rank, row = pass.first + r - p * padded_rank;
        if (group.gradient[p] == nullptr || row >= group.rank[p] || column >= columns) {
            continue;
        }
        const float4 sum = total<SPLIT>(partials, r * TILE + c, TILE * GROUPS * GROUP);
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        float* to = group.gradient[p] + size_t(row) * columns + column;
        if (column + 4 <= columns && is_aligned(to)) {
            const float4 old = *reinterpret_cast<float4*>(to);
            *reinterpret_cast<float4*>(to) = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (column + j < columns) {
                    to[j] += values[j];
                }
            }
        }
    }
}

}  // namespace

// ---------------------------------------------------------------- kernels

// dB_p += s_p dy_p^T u_p. dy (tokens, N); u (tokens, P R), projection p from column p * padded_rank on.
// partials, passes and groups as for lora_u_bf16 with width = padded_rank.
// Launch rule: a projection whose outputs are columns f .. l of dy has ceil((l - f / 8 * 8) / TILE) tiles a pass;
// grid (SPLIT, tiles of all projections), block (256), shared bytes STAGES * 1024 * (18 + groups).
extern "C" __global__ void __launch_bounds__(LORA_THREADS, 2)
    lora_db_bf16(const __grid_constant__ LoraGradient group, const bf16* dy, long long dy_stride, const bf16* u, long long u_stride,
                 float* partials, int tokens, int padded_rank) {
    const Pass pass = pass_of(blockIdx.y, padded_rank);
    int p = 0, first = 0, tile = blockIdx.y / pass.count;
    for (;; p++) {
        const int tiles = (first % GROUP + group.outputs[p] + TILE - 1) / TILE;
        if (tile < tiles) {
            break;
        }
        tile -= tiles;
        first += group.outputs[p];
    }
    // All blocks of the tile leave.
    if (group.gradient[p] == nullptr) {
        return;
    }
    const int first_column = first / GROUP * GROUP + tile * TILE;
    const bf16* u_p = u + p * padded_rank + pass.first;
    const Product product = {dy, dy_stride, first_column, first + group.outputs[p], u_p, u_stride, tokens};
    with_groups(pass.groups, [&](auto groups) {
        add_db<decltype(groups)::value>(group.gradient[p], group.rank[p], group.scale[p], product, partials, first, pass);
    });
}

// dA_p += du_p^T x. x (tokens, K = columns); du (tokens, P R), projection p from column p * padded_rank on.
// Launch rule: as lora_db_bf16 with width = P R, but tiles = ceil(columns / TILE) * passes.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, 2)
    lora_da_bf16(const __grid_constant__ LoraGradient group, const bf16* x, long long x_stride, const bf16* du, long long du_stride,
                 float* partials, int tokens, int columns, int padded_rank) {
    const Pass pass = pass_of(blockIdx.y, group.count * padded_rank);
    const int first_column = int(blockIdx.y) / pass.count * TILE;
    const Product product = {x, x_stride, first_column, columns, du + pass.first, du_stride, tokens};
    with_groups(pass.groups, [&](auto groups) { add_da<decltype(groups)::value>(group, product, partials, padded_rank, pass); });
}

// As lora_db_bf16. Launch rule: ceil(N * padded_rank / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    lora_db_f32(const __grid_constant__ LoraGradient group, const float* dy, long long dy_stride, const float* u, long long u_stride,
                int tokens, int padded_rank) {
    int rows = 0;
    for (int p = 0; p < group.count; p++) {
        rows += group.outputs[p];
    }
    const size_t index = blockIdx.x * size_t(FLAT_THREADS) + threadIdx.x;
    const int column = index % rows, r = index / rows;
    if (r >= padded_rank) {
        return;
    }
    int p = 0, first = 0;
    while (column >= first + group.outputs[p]) {
        first += group.outputs[p++];
    }
    if (group.gradient[p] == nullptr || r >= group.rank[p]) {
        return;
    }
    float sum = 0.0f;
    for (int t = 0; t < tokens; t++) {
        sum += dy[t * size_t(dy_stride) + column] * u[t * size_t(u_stride) + p * padded_rank + r];
    }
    group.gradient[p][size_t(column - first) * group.rank[p] + r] += group.scale[p] * sum;
}

// As lora_da_bf16. Launch rule: ceil(K * P R / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    lora_da_f32(const __grid_constant__ LoraGradient group, const float* x, long long x_stride, const float* du, long long du_stride,
                int tokens, int columns, int padded_rank) {
    const size_t index = blockIdx.x * size_t(FLAT_THREADS) + threadIdx.x;
    const int column = index % columns, row = index / columns;
    const int p = row / padded_rank, r = row - p * padded_rank;
    if (p >= group.count || group.gradient[p] == nullptr || r >= group.rank[p]) {
        return;
    }
    float sum = 0.0f;
    for (int t = 0; t < tokens; t++) {
        sum += du[t * size_t(du_stride) + row] * x[t * size_t(x_stride) + column];
    }
    group.gradient[p][size_t(r) * columns + column] += sum;
}
