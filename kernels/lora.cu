// LoRA of a group of projections that share an input x: q, k and v, or gate and up, or one alone.
//
// Shapes: T tokens, K inputs, P projections of N_p outputs, N their sum, R ranks a projection (R_p padded to a multiple of 8), s scale.
// w_ext (N + P R, K + P R): W (N, K) at the top left, s B_p in block p of the right columns and zeros beside it, A_p in block p of the
// bottom rows. x and dy have P R more columns, for u and du: then
//   y  = [x | u] w_ext[:N, :]^T      u  = x A^T
//   dx = [dy | du] w_ext[:, :K]      du_p = dy_p (s B_p)
//   dB_p += s dy_p^T u_p             dA += du^T x
// so that the products with W do both. Sums in f32; u and du are rounded to the dtype, dA and dB are f32.
//
// CPU twin: engine/src/model/linear.rs. Source: LoRA (2106.09685); the side-by-side product is our own.

#include "lora.cuh"

// The LoRAs of a group: lora_a (rank, K) and lora_b (outputs, rank), null where a projection has none.
// engine/src/ops/cuda/lora.rs holds the same struct.
struct LoraGroup {
    const float* lora_a[MAX_PROJECTIONS];
    const float* lora_b[MAX_PROJECTIONS];
    int rank[MAX_PROJECTIONS];
    int outputs[MAX_PROJECTIONS];
    float scale[MAX_PROJECTIONS];
    int count;
};

// ---------------------------------------------------------------- fill

namespace {

template <typename T>
__device__ __forceinline__ void fill(T* w_ext, long long stride, const LoraGroup& group, int columns, int padded_rank) {
    const int width = group.count * padded_rank;
    const unsigned groups_of_a = unsigned(columns + GROUP - 1) / GROUP, groups_of_b = unsigned(width) / GROUP;
    unsigned index = blockIdx.x * FLAT_THREADS + threadIdx.x;
    int rows = 0;
    for (int p = 0; p < group.count; p++) {
        rows += group.outputs[p];
    }
    float values[GROUP] = {};
    if (index < width * groups_of_a) {
        const int row = index / groups_of_a, column = (index - row * groups_of_a) * GROUP;
        const int p = row / padded_rank, r = row - p * padded_rank;
        if (group.lora_a[p] != nullptr && r < group.rank[p]) {
            const float* from = group.lora_a[p] + size_t(r) * columns + column;
            load_part(from, columns - column, is_aligned(from), values);
        }
        store_part(w_ext + (size_t(rows) + row) * stride + column, columns - column, true, values);
        return;
    }
    index -= width * groups_of_a;
    if (index >= unsigned(rows) * groups_of_b) {
        return;
    }
    const int row = index / groups_of_b, column = (index - row * groups_of_b) * GROUP;
    int p = 0, first = 0;
    while (row >= first + group.outputs[p]) {
        first += group.outputs[p++];
    }
    const int r = column - p * padded_rank, rank = group.rank[p];
    if (group.lora_b[p] != nullptr && r >= 0 && r < rank) {
        const float* from = group.lora_b[p] + size_t(row - first) * rank + r;
        load_part(from, rank - r, is_aligned(from), values);
        for (float& value : values) {
            value *= group.scale[p];
        }
    }
    store_part(w_ext + row * size_t(stride) + columns + column, GROUP, columns % GROUP == 0, values);
}

}  // namespace

// Writes the right columns and bottom rows of w_ext. padded_rank is a multiple of 8 and at least every rank.
// Launch rule: ceil((P R ceil(K / 8) + N P R / 8) / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    lora_fill_bf16(bf16* w_ext, long long stride, const __grid_constant__ LoraGroup group, int columns, int padded_rank) {
    fill(w_ext, stride, group, columns, padded_rank);
}

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    lora_fill_f32(float* w_ext, long long stride, const __grid_constant__ LoraGroup group, int columns, int padded_rank) {
    fill(w_ext, stride, group, columns, padded_rank);
}

// ---------------------------------------------------------------- u and du

namespace {

// Which columns of the small operand are not zero in rows begin .. begin + STEP of the block-diagonal s B.
struct Diagonal {
    int outputs[MAX_PROJECTIONS];
    int count, padded_rank;
};

__device__ __forceinline__ void columns_of_step(const Diagonal& diagonal, int begin, const Pass& pass, int& from, int& to) {
    int first = 0, low = pass.width, high = 0;
    for (int p = 0; p < diagonal.count; p++) {
        const int last = first + diagonal.outputs[p];
        if (first < begin + STEP && last > begin) {
            low = min(low, p * diagonal.padded_rank - pass.first);
            high = max(high, (p + 1) * diagonal.padded_rank - pass.first);
        }
        first = last;
    }
    from = max(low, 0) / GROUP;
    to = min(high, pass.width) / GROUP;
}

// small (tokens, width) = tall[:, :columns] B, to `compact` and to the columns of `tall` behind them. B (columns, width) is read as its
// transpose (width, columns) for u; for du as it is, but for the zeros beside its blocks.
template <bool IS_DU>
__device__ __forceinline__ void project(bf16* compact, long long compact_stride, bf16* tall, long long tall_stride, const bf16* b,
                                        long long b_stride, const Diagonal& diagonal, int tokens, int columns, int width) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const Pass pass = pass_of(blockIdx.y, width);
    const int tile_row = blockIdx.y / pass.count * TILE;
    const int first_row = TILE_PART == TILE ? tile_row : tile_row + part_of_tile() * TILE_PART;
    constexpr int TALL_UNITS = row_units(STEP);
    const int b_units = IS_DU ? row_units(pass.stride) : TALL_UNITS;
    const int stage_bytes = 16 * (TILE_PART * TALL_UNITS + (IS_DU ? STEP : pass.stride) * b_units);
    const uint32_t base = shared_address(shared);
    const bool b_aligned = is_aligned(b);
    int begin, end;
    own_steps((columns + STEP - 1) / STEP, begin, end);

    const auto load_step = [&](int step) {
        const uint32_t stage = base + (step - begin) % STAGES * stage_bytes;
        const int first = step * STEP;
        for (int i = thread; i < TILE_PART * (STEP / GROUP); i += LORA_THREADS) {
            const int row = i / (STEP / GROUP), unit = i % (STEP / GROUP), column = first + unit * GROUP;
            const int left = first_row + row < tokens ? columns - column : 0;
            const bf16* from = left > 0 ? tall + size_t(first_row + row) * tall_stride + column : tall;
            copy_group(stage + 16 * (row * TALL_UNITS + unit), from, left);
        }
        const uint32_t stage_b = stage + 16 * TILE_PART * TALL_UNITS;
        if (IS_DU) {
            int from_tile, to_tile;
            columns_of_step(diagonal, first, pass, from_tile, to_tile);
            const int tiles = to_tile - from_tile;
            for (int i = thread; i < STEP * tiles; i += LORA_THREADS) {
                const int row = i / tiles, unit = from_tile + i % tiles;
                const int left = first + row < columns ? GROUP : 0;
                const bf16* from = left > 0 ? b + size_t(first + row) * b_stride + pass.first + unit * GROUP : b;
                const uint32_t to = stage_b + 16 * (row * b_units + unit);
                b_aligned ? copy_group(to, from, left) : copy_unaligned(to, from, left);
            }
        } else {
            for (int i = thread; i < pass.width * (STEP / GROUP); i += LORA_THREADS) {
                const int row = i / (STEP / GROUP), unit = i % (STEP / GROUP), column = first + unit * GROUP;
                const int left = columns - column;
                const bf16* from = left > 0 ? b + size_t(pass.first + row) * b_stride + column : b;
                copy_group(stage_b + 16 * (row * b_units + unit), from, left);
            }
        }
    };

    float sums[MAX_WIDTH / GROUP][4] = {};
    for (int step = begin; step < begin + STAGES - 1; step++) {
        if (step < end) {
            load_step(step);
        }
        commit_copies();
    }
    for (int step = begin; step < end; step++) {
        await_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < end) {
            load_step(step + STAGES - 1);
        }
        commit_copies();
        if (warp * 16 >= TILE_PART) {
            continue;
        }
        const uint32_t stage = base + (step - begin) % STAGES * stage_bytes;
        const uint32_t stage_b = stage + 16 * TILE_PART * TALL_UNITS;
        uint32_t left[STEP / 16][4];
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) {
            load_matrices(left[k], stage + 16 * ((warp * 16 + lane % 16) * TALL_UNITS + 2 * k + lane / 16));
        }
        int from_tile = 0, to_tile = pass.width / GROUP;
        if (IS_DU) {
            columns_of_step(diagonal, step * STEP, pass, from_tile, to_tile);
        }
#pragma unroll
        for (int tile = 0; tile < MAX_WIDTH / GROUP; tile++) {
            if (tile >= from_tile && tile < to_tile) {
#pragma unroll
                for (int half = 0; half < STEP / 32; half++) {
                    uint32_t right[4];
                    if (IS_DU) {
                        load_transposed(right, stage_b + 16 * ((half * 32 + lane) * b_units + tile));
                    } else {
                        load_matrices(right, stage_b + 16 * ((tile * GROUP + lane % 8) * b_units + half * 4 + lane / 8));
                    }
                    multiply(sums[tile], left[2 * half], right[0], right[1]);
                    multiply(sums[tile], left[2 * half + 1], right[2], right[3]);
                }
            }
        }
    }

    // The sums of the blocks meet where the stages were.
    await_copies<0>();
    __syncthreads();
    float* parts = reinterpret_cast<float*>(shared);
    if (warp * 16 < TILE_PART) {
#pragma unroll
        for (int tile = 0; tile < MAX_WIDTH / GROUP; tile++) {
            if (tile < pass.width / GROUP) {
                float* to = parts + (warp * 16 + lane / 4) * pass.width + tile * GROUP + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = make_float2(sums[tile][0], sums[tile][1]);
                *reinterpret_cast<float2*>(to + 8 * pass.width) = make_float2(sums[tile][2], sums[tile][3]);
            }
        }
    }
    sync_tile();
    const int own_row = TILE_PART == TILE ? part_of_tile() * (TILE / SPLIT) : 0, groups = pass.width / GROUP;
    for (int i = thread; i < TILE / SPLIT * groups; i += LORA_THREADS) {
        const int row = own_row + i / groups, column = i % groups * GROUP;
        if (first_row + row < tokens) {
            const float4 low = total(parts + row * pass.width + column), high = total(parts + row * pass.width + column + 4);
            const float values[GROUP] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            bf16* behind = tall + size_t(first_row + row) * tall_stride + columns + pass.first + column;
            store_part(behind, GROUP, columns % GROUP == 0, values);
            if (compact != nullptr) {
                store(compact + size_t(first_row + row) * compact_stride + pass.first + column, pack<bf16>(values));
            }
        }
    }
    // A block's shared memory stays until all have read it.
    sync_tile();
}

}  // namespace

// u (tokens, width) = x[:, :columns] a^T, to `u` where it is not null and to x[:, columns:]. a (width, columns): the bottom rows of w_ext;
// width = P R, a multiple of 8.
// Launch rule: passes = ceil(width / 96), pass_width = ceil(width / 8 / passes) * 8, rows = 128 (32 before Hopper);
// grid (4, ceil(tokens / 128) * passes), block (256), shared bytes 4 * 144 * (rows + pass_width).
extern "C" __global__ void LORA_CLUSTER __launch_bounds__(LORA_THREADS)
    lora_u_bf16(bf16* u, long long u_stride, bf16* x, long long x_stride, const bf16* a, long long a_stride, int tokens, int columns,
                int width) {
    project<false>(u, u_stride, x, x_stride, a, a_stride, {}, tokens, columns, width);
}

// du (tokens, P R) = dy[:, :N] sb, to `du` where it is not null and to dy[:, N:]. sb (N, P R): the top right of w_ext.
// Launch rule: as lora_u_bf16 with width = P R, but shared bytes 4 * (144 * rows + 1024 * (pass_width / 8 | 1)).
extern "C" __global__ void LORA_CLUSTER __launch_bounds__(LORA_THREADS)
    lora_du_bf16(bf16* du, long long du_stride, bf16* dy, long long dy_stride, const bf16* sb, long long sb_stride,
                 const __grid_constant__ LoraGroup group, int tokens, int padded_rank) {
    Diagonal diagonal = {{}, group.count, padded_rank};
    int columns = 0;
    for (int p = 0; p < group.count; p++) {
        diagonal.outputs[p] = group.outputs[p];
        columns += group.outputs[p];
    }
    project<true>(du, du_stride, dy, dy_stride, sb, sb_stride, diagonal, tokens, columns, group.count * padded_rank);
}

// As lora_u_bf16. Launch rule: grid (tokens), block (256).
extern "C" __global__ void __launch_bounds__(LORA_THREADS)
    lora_u_f32(float* u, long long u_stride, float* x, long long x_stride, const float* a, long long a_stride, int tokens, int columns,
               int width) {
    float* row = x + blockIdx.x * size_t(x_stride);
    for (int r = threadIdx.x / WARP; r < width; r += LORA_THREADS / WARP) {
        float sum = 0.0f;
        for (int k = threadIdx.x % WARP; k < columns; k += WARP) {
            sum += row[k] * a[r * size_t(a_stride) + k];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) {
            row[columns + r] = sum;
            if (u != nullptr) {
                u[blockIdx.x * size_t(u_stride) + r] = sum;
            }
        }
    }
}

// As lora_du_bf16. Launch rule: grid (tokens), block (256).
extern "C" __global__ void __launch_bounds__(LORA_THREADS)
    lora_du_f32(float* du, long long du_stride, float* dy, long long dy_stride, const float* sb, long long sb_stride,
                const __grid_constant__ LoraGroup group, int tokens, int padded_rank) {
    float* row = dy + blockIdx.x * size_t(dy_stride);
    int columns = 0;
    for (int p = 0; p < group.count; p++) {
        columns += group.outputs[p];
    }
    for (int r = threadIdx.x / WARP; r < group.count * padded_rank; r += LORA_THREADS / WARP) {
        int first = 0;
        for (int p = 0; p < r / padded_rank; p++) {
            first += group.outputs[p];
        }
        float sum = 0.0f;
        for (int n = first + threadIdx.x % WARP; n < first + group.outputs[r / padded_rank]; n += WARP) {
            sum += row[n] * sb[n * size_t(sb_stride) + r];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) {
            row[columns + r] = sum;
            if (du != nullptr) {
                du[blockIdx.x * size_t(du_stride) + r] = sum;
            }
        }
    }
}
