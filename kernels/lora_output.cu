// du and dB of a group of projections in one pass over dy, for ranks up to 32, where a block may have 154 KB of shared memory (names and shapes as in lora.cu).
//
//   du_p (T, R) = dy_p (s_p B_p)        dB_p (N_p, rank) += s_p dy_p^T u_p
// A block has a strip of 256 columns of dy and an eighth of the tokens. Of each tile of 64 tokens it takes its part of dB's sum, and
// du's sum over its strip, which it leaves in device memory: 4 / 512 of dy's bytes a column of u. lora_du_sum_bf16 adds the strips.
//
// CPU twin: engine/src/model/linear.rs. Source: LoRA (2106.09685).

#include "lora.cuh"

// Columns of a strip, and blocks that share its tokens; engine/src/ops/cuda/lora.rs names them too.
constexpr int STRIP = 256, SHARES = 8;
constexpr int OUTPUT_STAGES = 3;
// 8 warps: 32 columns each for dB; 16 tokens and half of the strip each for du.
constexpr int OUTPUT_THREADS = 8 * WARP;
static_assert(STRIP == 8 * 32 && STEP == 4 * 16, "what the warps have");

// ---------------------------------------------------------------- device helpers

namespace {

// 16-byte units of a row of dy, and of u and s B, in shared memory.
constexpr int DY_UNITS = row_units(STRIP);
template <int GROUPS>
constexpr int U_UNITS = row_units(GROUPS * GROUP);

// A projection's strip.
struct Strip {
    // The first column is a multiple of 8.
    int projection, first_column;
    // Of dy, those that are the projection's.
    int first_output, end_output;
};

__device__ __forceinline__ int strips_of(int first_output, int outputs) { return (first_output % GROUP + outputs + STRIP - 1) / STRIP; }

__device__ __forceinline__ Strip strip_of(const LoraGradient& group, int index) {
    int p = 0, first = 0;
    for (;; p++) {
        const int strips = strips_of(first, group.outputs[p]);
        if (index < strips) {
            return {p, first / GROUP * GROUP + index * STRIP, first, first + group.outputs[p]};
        }
        index -= strips;
        first += group.outputs[p];
    }
}

// dB of a strip: the sum of its parts, to the gradient. By the last block of the strip.
template <int GROUPS>
__device__ __forceinline__ void add_db(const LoraGradient& group, const Strip& strip, const float* partials) {
    constexpr int WIDTH = GROUPS * GROUP;
    const int rank = group.rank[strip.projection];
    const float scale = group.scale[strip.projection];
    for (int i = threadIdx.x; i < STRIP * WIDTH / 4; i += OUTPUT_THREADS) {
        const int c = i / (WIDTH / 4), r = i % (WIDTH / 4) * 4, output = strip.first_column + c, count = rank - r;
        if (output < strip.first_output || output >= strip.end_output || count <= 0) {
            continue;
        }
        const float4 sum = total<SHARES>(partials, c * WIDTH + r, STRIP * WIDTH);
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        float* to = group.gradient[strip.projection] + size_t(output - strip.first_output) * rank + r;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j < count) {
                to[j] += scale * values[j];
            }
        }
    }
}

// Leaves this block's part of the strip's dB.
template <int GROUPS>
__device__ __forceinline__ void store_part_of_db(float* partials, const float (&sums)[2][GROUPS][4], int warp, int lane) {
    constexpr int WIDTH = GROUPS * GROUP;
    float* part = partials + (size_t(blockIdx.y) * SHARES + blockIdx.x) * STRIP * WIDTH + (warp * 32 + lane / 4) * WIDTH + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        store_sums(part + m * 16 * WIDTH, sums[m]);
    }
}

// du (16, 8 GROUPS) = dy (s B) of 16 tokens and half a strip: `dy` is where this lane's row of dy begins, b is s B.
template <int GROUPS>
__device__ __forceinline__ void multiply_du(float (&du)[GROUPS][4], const uint32_t (&b)[4][GROUPS][4], uint32_t dy) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            du[g][i] = 0.0f;
        }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t low[4], high[4];
        load_matrices(low, dy + 64 * k);
        load_matrices(high, dy + 64 * k + 32);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            multiply(du[g], low, b[k][g][0], b[k][g][1]);
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            multiply(du[g], high, b[k][g][2], b[k][g][3]);
        }
    }
}

// sums += dy^T u of a step, for the warp's 32 columns of dy.
template <int GROUPS>
__device__ __forceinline__ void multiply_db(float (&sums)[2][GROUPS][4], uint32_t stage, int warp, int lane) {
    const uint32_t stage_u = stage + 16 * STEP * DY_UNITS;
#pragma unroll
    for (int k = 0; k < STEP / 32; k++) {
        uint32_t right[GROUPS][4];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            load_transposed(right[g], stage_u + 16 * ((k * 32 + lane) * U_UNITS<GROUPS> + g));
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint32_t low[4], high[4];
            const int row = k * 32 + lane / 16 * 8 + lane % 8, unit = warp * 4 + m * 2 + lane / 8 % 2;
            load_transposed(low, stage + 16 * (row * DY_UNITS + unit));
            load_transposed(high, stage + 16 * ((row + 16) * DY_UNITS + unit));
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                multiply(sums[m][g], low, right[g][0], right[g][1]);
            }
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                multiply(sums[m][g], high, right[g][2], right[g][3]);
            }
        }
    }
}

// A step's dy, and u behind it, to shared memory. A thread copies one unit of every ROWS_AT_ONCE-th row of dy.
template <int GROUPS>
__device__ __forceinline__ void load_step(uint32_t stage, const bf16* dy, long long dy_stride, const bf16* u, long long u_stride,
                                          bool u_aligned, const Strip& strip, int step, int tokens, int padded_rank) {
    constexpr int UNITS = STRIP / GROUP, ROWS_AT_ONCE = OUTPUT_THREADS / UNITS;
    const int thread = threadIdx.x, own_unit = thread % UNITS, own_row = thread / UNITS;
    const int column = strip.first_column + own_unit * GROUP, left = strip.end_output - column;
    const uint32_t stage_u = stage + 16 * STEP * DY_UNITS;
#pragma unroll
    for (int i = 0; i < STEP / ROWS_AT_ONCE; i++) {
        // Tokens beyond the last are copies of it: 0 in u, and their du is not written.
        const int row = own_row + i * ROWS_AT_ONCE, token = min(step * STEP + row, tokens - 1);
        copy_group(stage + 16 * (row * DY_UNITS + own_unit), dy + (left > 0 ? token * size_t(dy_stride) + column : 0), left);
    }
    copy_tokens<GROUPS, OUTPUT_THREADS>(stage_u, u, u_stride, u_aligned, step * STEP, tokens, padded_rank);
}

// s B of a strip to shared memory.
template <int GROUPS>
__device__ __forceinline__ void load_sb(uint32_t sb_base, const bf16* sb, long long sb_stride, const Strip& strip, int padded_rank) {
    const bool sb_aligned = is_aligned(sb);
    for (int i = threadIdx.x; i < STRIP * GROUPS; i += OUTPUT_THREADS) {
        const int row = i / GROUPS, unit = i % GROUPS, column = strip.first_column + row;
        const int left = column < strip.end_output && unit * GROUP < padded_rank ? GROUP : 0;
        const bf16* from = sb + (left > 0 ? column * size_t(sb_stride) + unit * GROUP : 0);
        const uint32_t to = sb_base + 16 * (row * U_UNITS<GROUPS> + unit);
        copy_group(to, from, left, sb_aligned);
    }
}

// du of this lane's two tokens, `token` and the eighth behind it: this warp's half and the other, which is in shared memory.
template <int GROUPS>
__device__ __forceinline__ void store_du(float* to, const float (&du)[GROUPS][4], const float4* other_half, int token, int tokens) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const float4 other = other_half[g * WARP];
        if (token < tokens) {
            *reinterpret_cast<float2*>(to + g * GROUP) = make_float2(du[g][0] + other.x, du[g][1] + other.y);
        }
        if (token + 8 < tokens) {
            *reinterpret_cast<float2*>(to + g * GROUP + 8 * GROUPS * GROUP) = make_float2(du[g][2] + other.z, du[g][3] + other.w);
        }
    }
}

// s B of half a strip to registers.
template <int GROUPS>
__device__ __forceinline__ void read_sb(uint32_t (&b)[4][GROUPS][4], uint32_t sb_base, int half, int lane) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            load_transposed(b[k][g], sb_base + 16 * ((half * (STRIP / 2) + k * 32 + lane) * U_UNITS<GROUPS> + g));
        }
    }
}

template <int GROUPS>
__device__ __forceinline__ void du_and_db(const LoraGradient& group, const bf16* dy, long long dy_stride, const bf16* u, long long u_stride,
                                          const bf16* sb, long long sb_stride, float* du_partials, float* partials, int tokens,
                                          int padded_rank) {
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int WIDTH = GROUPS * GROUP;
    constexpr int STAGE_BYTES = 16 * STEP * (DY_UNITS + U_UNITS<GROUPS>);
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const Strip strip = strip_of(group, blockIdx.y);
    const uint32_t base = shared_address(shared), sb_base = base + OUTPUT_STAGES * STAGE_BYTES;
    // The second halves of du, double-buffered.
    float4* halves = reinterpret_cast<float4*>(shared + OUTPUT_STAGES * STAGE_BYTES + 16 * STRIP * U_UNITS<GROUPS>);
    const int all_steps = (tokens + STEP - 1) / STEP;
    const int begin = all_steps * blockIdx.x / SHARES, end = all_steps * (blockIdx.x + 1) / SHARES;
    u += strip.projection * padded_rank;
    sb += strip.projection * padded_rank;

    const bool u_aligned = is_aligned(u);
    load_sb<GROUPS>(sb_base, sb, sb_stride, strip, padded_rank);
    commit_copies();

    const auto stage_of = [&](int step) { return base + (step - begin) % OUTPUT_STAGES * STAGE_BYTES; };
    const auto load = [&](int step) {
        load_step<GROUPS>(stage_of(step), dy, dy_stride, u, u_stride, u_aligned, strip, step, tokens, padded_rank);
    };
    for (int step = begin; step < begin + OUTPUT_STAGES - 1; step++) {
        if (step < end) {
            load(step);
        }
        commit_copies();
    }

    // s B of this warp's half of the strip stays in registers.
    const int tile = warp % 4, half = warp / 4;
    uint32_t b[4][GROUPS][4];
    await_copies<OUTPUT_STAGES - 1>();
    __syncthreads();
    read_sb(b, sb_base, half, lane);

    float sums[2][GROUPS][4] = {}, du[GROUPS][4];
    // Adds the other half of the last step's du, which is in shared memory since the last barrier.
    const auto write_du = [&](int step) {
        const int token = step * STEP + tile * 16 + lane / 4;
        float* to = du_partials + (size_t(blockIdx.y) * tokens + token) * WIDTH + lane % 4 * 2;
        store_du(to, du, halves + (step % 2 * 4 + tile) * GROUPS * WARP + lane, token, tokens);
    };
    for (int step = begin; step < end; step++) {
        await_copies<OUTPUT_STAGES - 2>();
        __syncthreads();
        if (step + OUTPUT_STAGES - 1 < end) {
            load(step + OUTPUT_STAGES - 1);
        }
        commit_copies();
        if (half == 0 && step > begin) {
            write_du(step - 1);
        }
        const uint32_t stage = stage_of(step);
        multiply_du(du, b, stage + 16 * ((tile * 16 + lane % 16) * DY_UNITS + half * (STRIP / 2 / GROUP) + lane / 16));
        if (half == 1) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                halves[((step % 2 * 4 + tile) * GROUPS + g) * WARP + lane] = make_float4(du[g][0], du[g][1], du[g][2], du[g][3]);
            }
        }
        multiply_db(sums, stage, warp, lane);
    }
    __syncthreads();
    if (half == 0 && end > begin) {
        write_du(end - 1);
    }

    if (group.gradient[strip.projection] == nullptr) {
        return;
    }
    store_part_of_db(partials, sums, warp, lane);
    if (is_last_of_tile<SHARES>()) {
        add_db<GROUPS>(group, strip, partials);
    }
}

}  // namespace

// ---------------------------------------------------------------- kernels

// dB_p += s_p dy_p^T u_p, and du by strips to du_partials. dy (tokens, N); u (tokens, P R); sb (N, P R): the top right of w_ext.
// padded_rank is a multiple of 8, 32 at most; width is it rounded up to 16 or 32.
// du_partials (strips, tokens, width); partials (strips, SHARES, STRIP, width).
// Launch rule: a projection whose outputs are columns f .. l of dy has ceil((l - f / 8 * 8) / STRIP) strips;
// grid (SHARES, strips of all projections), block (256), shared bytes 16 * (3 * 64 * (33 + (width / 8 | 1)) + 256 * (width / 8 | 1) + 32 * width).
extern "C" __global__ void __launch_bounds__(OUTPUT_THREADS, 1)
    lora_du_db_bf16(const __grid_constant__ LoraGradient group, const bf16* dy, long long dy_stride, const bf16* u, long long u_stride,
                    const bf16* sb, long long sb_stride, float* du_partials, float* partials, int tokens, int padded_rank) {
    if (padded_rank <= 16) {
        du_and_db<2>(group, dy, dy_stride, u, u_stride, sb, sb_stride, du_partials, partials, tokens, padded_rank);
    } else {
        du_and_db<4>(group, dy, dy_stride, u, u_stride, sb, sb_stride, du_partials, partials, tokens, padded_rank);
    }
}

// du (tokens, P R) = the sums of lora_du_db_bf16's strips, in their order.
// Launch rule: ceil(tokens * P * width / 4 / 128) blocks of 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    lora_du_sum_bf16(bf16* du, long long du_stride, const float* du_partials, const __grid_constant__ LoraGradient group, int tokens,
                     int padded_rank) {
    const int fours = padded_rank <= 16 ? 4 : 8;
    const unsigned index = blockIdx.x * 128 + threadIdx.x, per_projection = unsigned(tokens) * fours;
    const int p = index / per_projection;
    if (p >= group.count) {
        return;
    }
    int strip = 0, first = 0;
    for (int i = 0; i < p; i++) {
        strip += strips_of(first, group.outputs[i]);
        first += group.outputs[i];
    }
    const int strips = strips_of(first, group.outputs[p]);
    const unsigned place = index - p * per_projection;
    const int token = place / fours, r = place % fours * 4;
    const float4* from = reinterpret_cast<const float4*>(du_partials) + size_t(strip) * per_projection + place;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int i = 0; i < strips; i++) {
        const float4 part = __ldcs(from + size_t(i) * per_projection);
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
    }
    if (r < padded_rank) {
        bf16* to = du + token * size_t(du_stride) + p * padded_rank + r;
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        if ((reinterpret_cast<uintptr_t>(to) & 7) == 0) {
            *reinterpret_cast<uint2*>(to) = make_uint2(bf16_pair(sum.x, sum.y), bf16_pair(sum.z, sum.w));
        } else {
            for (int j = 0; j < 4; j++) {
                to[j] = from_f32<bf16>(values[j]);
            }
        }
    }
}
