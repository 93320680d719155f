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

// Where the columns of a projection lie in a tall matrix, and the small matrix that they are multiplied with.
struct Product {
    const bf16* tall;
    long long tall_stride;
    // The first column is a multiple of 8.
    int first_column, end_column;
    const bf16* small;
    long long small_stride;
    int tokens;
};

// Two places for one result; the second may be null.
struct Places {
    bf16* first;
    long long first_stride;
    bf16* second;
    long long second_stride;
};

__device__ __forceinline__ void write(const Places& places, int row, int column, const float (&values)[GROUP]) {
    bf16* to = places.first + row * size_t(places.first_stride) + column;
    store_part(to, GROUP, is_aligned(to), values);
    if (places.second != nullptr) {
        to = places.second + row * size_t(places.second_stride) + column;
        store_part(to, GROUP, is_aligned(to), values);
    }
}

// 16-byte units of a row of a step of the tall matrix, in device memory and in shared memory.
constexpr int UNITS = STEP / GROUP, TALL_UNITS = row_units(STEP);
// Rows that the threads of a block copy at a time.
constexpr int ROWS_AT_ONCE = LORA_THREADS / UNITS;
static_assert(TILE % ROWS_AT_ONCE == 0, "every thread copies as many units");

// Rows of a step of the small matrix, and 16-byte units of one in shared memory.
template <int GROUPS, bool TRANSPOSED>
struct Small {
    static constexpr int ROWS = TRANSPOSED ? STEP : GROUPS * GROUP;
    static constexpr int UNITS = row_units(TRANSPOSED ? GROUPS * GROUP : STEP);
};

// Writes the tile: the sums of its parts.
template <int GROUPS>
__device__ __forceinline__ void write_tile(const Places& places, const float* partials, int first_row, int tokens, int width) {
    constexpr int WIDTH = GROUPS * GROUP;
    for (int i = threadIdx.x; i < TILE * GROUPS; i += LORA_THREADS) {
        const int row = i / GROUPS, column = i % GROUPS * GROUP, at = row * WIDTH + column;
        if (first_row + row < tokens && column < width) {
            const float4 low = total<SPLIT>(partials, at, TILE * WIDTH), high = total<SPLIT>(partials, at + 4, TILE * WIDTH);
            write(places, first_row + row, column, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w});
        }
    }
}

// A step of the small matrix to shared memory: its rows from `column` on where it is transposed, else its columns, of which this thread
// copies `left` values.
template <int GROUPS, bool TRANSPOSED>
__device__ __forceinline__ void load_small(uint32_t stage_small, const Product& product, bool small_aligned, int column, int left,
                                           int width) {
    using Rows = Small<GROUPS, TRANSPOSED>;
    const int thread = threadIdx.x, own_unit = thread % UNITS, own_row = thread / UNITS, end_column = product.end_column;
    if constexpr (TRANSPOSED) {
#pragma unroll
        for (int i = 0; i < (STEP * GROUPS + LORA_THREADS - 1) / LORA_THREADS; i++) {
            const int index = i * LORA_THREADS + thread, row = index / GROUPS, unit = index % GROUPS;
            const bool is_there = column + row < end_column && unit * GROUP < width;
            const bf16* from = product.small + (is_there ? (column + row) * size_t(product.small_stride) + unit * GROUP : 0);
            const uint32_t to = stage_small + 16 * (row * Rows::UNITS + unit);
            if (index < STEP * GROUPS) {
                copy_group(to, from, is_there ? GROUP : 0, small_aligned);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < (Rows::ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; i++) {
            const int row = own_row + i * ROWS_AT_ONCE;
            const bool is_there = row < width && left > 0;
            const bf16* from = product.small + (is_there ? row * size_t(product.small_stride) + column + own_unit * GROUP : 0);
            if (row < Rows::ROWS) {
                copy_group(stage_small + 16 * (row * Rows::UNITS + own_unit), from, is_there ? left : 0);
            }
        }
    }
}

// Half a step of the small matrix as operands.
template <int GROUPS, bool TRANSPOSED>
__device__ __forceinline__ void read_small(uint32_t (&right)[GROUPS][4], uint32_t stage_small, int half, int lane) {
    constexpr int SMALL_UNITS = Small<GROUPS, TRANSPOSED>::UNITS;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        if (TRANSPOSED) {
            load_transposed(right[group], stage_small + 16 * ((half * 32 + lane) * SMALL_UNITS + group));
        } else {
            load_matrices(right[group], stage_small + 16 * ((group * GROUP + lane % 8) * SMALL_UNITS + half * 4 + lane / 8));
        }
    }
}

// tall[:, first_column:end_column] small^T for small (width, columns) with `TRANSPOSED` false; tall[...] small for small (columns, width)
// with true. Of the result, `width` columns are written.
template <int GROUPS, bool TRANSPOSED>
__device__ __forceinline__ void project(const Places& places, const Product& product, float* partials, int tile, int width) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int STAGE_BYTES = 16 * (TILE * TALL_UNITS + Small<GROUPS, TRANSPOSED>::ROWS * Small<GROUPS, TRANSPOSED>::UNITS);
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int first_row = tile * TILE;
    const int end_column = product.end_column;
    const uint32_t base = shared_address(shared);
    const bool small_aligned = is_aligned(product.small);
    // The blocks of a tile take turns, so that together they read long runs of a row.
    const int all_steps = (end_column - product.first_column + STEP - 1) / STEP, steps = (all_steps - own_part() + SPLIT - 1) / SPLIT;

    // A thread copies one unit of every ROWS_AT_ONCE-th row. Rows beyond the last are copies of it: their results are not written.
    const int own_unit = thread % UNITS, own_row = thread / UNITS;
    const bf16* tall_rows[TILE / ROWS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < TILE / ROWS_AT_ONCE; i++) {
        const int row = min(first_row + own_row + i * ROWS_AT_ONCE, product.tokens - 1);
        tall_rows[i] = product.tall + row * size_t(product.tall_stride) + own_unit * GROUP;
    }
    const auto load_step = [&](int step) {
        const uint32_t stage = base + step % STAGES * STAGE_BYTES, stage_small = stage + 16 * TILE * TALL_UNITS;
        const int column = product.first_column + (step * SPLIT + own_part()) * STEP, left = end_column - column - own_unit * GROUP;
#pragma unroll
        for (int i = 0; i < TILE / ROWS_AT_ONCE; i++) {
            const int row = own_row + i * ROWS_AT_ONCE;
            copy_group(stage + 16 * (row * TALL_UNITS + own_unit), left > 0 ? tall_rows[i] + column : product.tall, left);
        }
        load_small<GROUPS, TRANSPOSED>(stage_small, product, small_aligned, column, left, width);
    };

    float sums[GROUPS][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) {
            load_step(step);
        }
        commit_copies();
    }
    for (int step = 0; step < steps; step++) {
        await_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) {
            load_step(step + STAGES - 1);
        }
        commit_copies();
        const uint32_t stage = base + step % STAGES * STAGE_BYTES, stage_small = stage + 16 * TILE * TALL_UNITS;
#pragma unroll
        for (int half = 0; half < STEP / 32; half++) {
            uint32_t left[2][4];
            load_matrices(left[0], stage + 16 * ((warp * 16 + lane % 16) * TALL_UNITS + 4 * half + lane / 16));
            load_matrices(left[1], stage + 16 * ((warp * 16 + lane % 16) * TALL_UNITS + 4 * half + 2 + lane / 16));
            uint32_t right[GROUPS][4];
            read_small<GROUPS, TRANSPOSED>(right, stage_small, half, lane);
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                multiply(sums[group], left[0], right[group][0], right[group][1]);
            }
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                multiply(sums[group], left[1], right[group][2], right[group][3]);
            }
        }
    }

    constexpr int WIDTH = GROUPS * GROUP;
    float* part = part_of_tile(partials, own_part(), TILE * WIDTH) + (warp * 16 + lane / 4) * WIDTH + lane % 4 * 2;
    store_sums(part, sums);
    if (is_last_of_tile<SPLIT>()) {
        write_tile<GROUPS>(places, partials, first_row, product.tokens, width);
    }
}

}  // namespace

// u (tokens, width) = x a^T, to `u` and, where it is not null, to `u_kept`. x (tokens, columns); a (width, columns): the bottom rows of w_ext;
// width = P R, a multiple of 8.
// partials (tiles, SPLIT, TILE, 8 groups) f32, with anything in it.
// Launch rule: passes = ceil(width / 96), groups = ceil(width / 8 / passes) rounded up to 2, 4, 6, 8 or 12, tiles = ceil(tokens / TILE) * passes;
// grid (SPLIT, tiles), block (256), shared bytes STAGES * 144 * (TILE + 8 * groups).
extern "C" __global__ void __launch_bounds__(LORA_THREADS, 2)
    lora_u_bf16(bf16* u, long long u_stride, bf16* u_kept, long long kept_stride, const bf16* x, long long x_stride, const bf16* a,
                long long a_stride, float* partials, int tokens, int columns, int width) {
    const Pass pass = pass_of(blockIdx.y, width);
    const Product product = {x, x_stride, 0, columns, a + pass.first * size_t(a_stride), a_stride, tokens};
    const Places places = {u + pass.first, u_stride, u_kept == nullptr ? nullptr : u_kept + pass.first, kept_stride};
    with_groups(pass.groups, [&](auto groups) {
        project<decltype(groups)::value, false>(places, product, partials, blockIdx.y / pass.count, pass.width);
    });
}

// du_p = dy_p (s B_p), as lora_u_bf16. dy (tokens, N); sb (N, P R): the top right of w_ext. `projections` tells their outputs.
// Launch rule: as lora_u_bf16 with width = padded_rank, but tiles = ceil(tokens / TILE) * P * passes and shared bytes
// STAGES * 16 * (9 * TILE + 64 * (groups + 1)).
extern "C" __global__ void __launch_bounds__(LORA_THREADS, 2)
    lora_du_bf16(bf16* du, long long du_stride, bf16* du_kept, long long kept_stride, const bf16* dy, long long dy_stride, const bf16* sb,
                 long long sb_stride, float* partials, const __grid_constant__ LoraGroup projections, int tokens, int padded_rank) {
    const Pass pass = pass_of(blockIdx.y, padded_rank);
    const int tiles = (tokens + TILE - 1) / TILE, index = blockIdx.y / pass.count, p = index / tiles;
    int first = 0;
    for (int i = 0; i < p; i++) {
        first += projections.outputs[i];
    }
    // Where a projection begins between two multiples of 8, what stands before it in its columns of sb is 0.
    const int column = p * padded_rank + pass.first;
    const Product product = {dy, dy_stride, first / GROUP * GROUP, first + projections.outputs[p], sb + column, sb_stride, tokens};
    const Places places = {du + column, du_stride, du_kept == nullptr ? nullptr : du_kept + column, kept_stride};
    with_groups(pass.groups, [&](auto groups) {
        project<decltype(groups)::value, true>(places, product, partials, index - p * tiles, pass.width);
    });
}

// As lora_u_bf16. Launch rule: grid (tokens), block (256).
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    lora_u_f32(float* u, long long u_stride, float* u_kept, long long kept_stride, const float* x, long long x_stride, const float* a,
               long long a_stride, int tokens, int columns, int width) {
    const float* row = x + blockIdx.x * size_t(x_stride);
    for (int r = threadIdx.x / WARP; r < width; r += FLAT_THREADS / WARP) {
        float sum = 0.0f;
        for (int k = threadIdx.x % WARP; k < columns; k += WARP) {
            sum += row[k] * a[r * size_t(a_stride) + k];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) {
            u[blockIdx.x * size_t(u_stride) + r] = sum;
            if (u_kept != nullptr) {
                u_kept[blockIdx.x * size_t(kept_stride) + r] = sum;
            }
        }
    }
}

// As lora_du_bf16. Launch rule: grid (tokens), block (256).
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    lora_du_f32(float* du, long long du_stride, float* du_kept, long long kept_stride, const float* dy, long long dy_stride,
                const float* sb, long long sb_stride, const __grid_constant__ LoraGroup projections, int tokens, int padded_rank) {
    const float* row = dy + blockIdx.x * size_t(dy_stride);
    for (int r = threadIdx.x / WARP; r < projections.count * padded_rank; r += FLAT_THREADS / WARP) {
        const int p = r / padded_rank;
        int first = 0;
        for (int i = 0; i < p; i++) {
            first += projections.outputs[i];
        }
        float sum = 0.0f;
        for (int n = first + threadIdx.x % WARP; n < first + projections.outputs[p]; n += WARP) {
            sum += row[n] * sb[n * size_t(sb_stride) + r];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) {
            du[blockIdx.x * size_t(du_stride) + r] = sum;
            if (du_kept != nullptr) {
                du_kept[blockIdx.x * size_t(kept_stride) + r] = sum;
            }
        }
    }
}
