// AdamW over all LoRA parameters at once, with moments in f32 or in 8 bits, and the global norm of their gradient.
//
// With g the gradient times its clip factor: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
// p = p * decay - rate * m / (sqrt(v) / correction_2 + epsilon), where the host computes decay = 1 - lr * weight_decay,
// rate = lr / (1 - b1^t), correction_2 = sqrt(1 - b2^t) in f64. Each operation is rounded by itself, as on the CPU: the same bits.
//
// In 8 bits each block of 256 values of a tensor has one factor, its absolute maximum, and a code a value:
// value = table[code] * factor, encoded to the nearest of the table, whose middles between two values each tell which.
// Shapes: parameters, gradient, m, v (n) in f32. In 8 bits `places` (blocks + 1) holds where each block begins: x among the
// parameters, y among the codes; of the last one, the end, only y is read. Codes of m and v (values of the large tensors) in u8,
// factors (blocks) in f32.
// Launch rules: adamw_step: ceil(n / 4 / 256) blocks of 256 threads. adamw_8bit_step: a warp takes a block of values, at most 4
// blocks of 256 threads a multiprocessor; any other grid is right as well. squared_norm: always 1024 blocks of 256 threads, so
// that the sum is the same on every device; squared_norm_finish: one block of 1024.
// CPU twins: engine/src/ops/adamw.rs, engine/src/ops/adamw_8bit.rs. Sources: Loshchilov and Hutter, "Decoupled Weight Decay
// Regularization", 2019; Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

// The same as in engine/src/ops/adamw.rs.
constexpr double BETA_1 = 0.9, BETA_2 = 0.999;
constexpr float EPSILON = 1e-8f;
// The same as in engine/src/ops/adamw_8bit.rs.
constexpr int BLOCK = 256;

constexpr int THREADS = 256;

struct Rule {
    float decay, rate, correction_2, clip;

    __device__ __forceinline__ void apply(float& p, float& m, float& v, float g) const {
        constexpr float KEEP_1 = float(BETA_1), KEEP_2 = float(BETA_2), TAKE_1 = float(1 - BETA_1), TAKE_2 = float(1 - BETA_2);
        g = __fmul_rn(g, clip);
        m = __fadd_rn(__fmul_rn(KEEP_1, m), __fmul_rn(TAKE_1, g));
        v = __fadd_rn(__fmul_rn(KEEP_2, v), __fmul_rn(__fmul_rn(TAKE_2, g), g));
        const float divisor = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), correction_2), EPSILON);
        p = __fsub_rn(__fmul_rn(p, decay), __fdiv_rn(__fmul_rn(rate, m), divisor));
    }
};

__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ void store4(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void load4(const float* from, float (&x)[4]) {
    const float4 values = load4(from);
    x[0] = values.x, x[1] = values.y, x[2] = values.z, x[3] = values.w;
}

// A table of codes in shared memory, and for every bucket of floats (sign, exponent, seven bits of mantissa) how many middles are
// below it. A bucket is narrower than the way from one middle to the next, so that it has one at most.
struct Table {
    // Bits of a float below its bucket's.
    static constexpr int SHIFT = 16;
    // Magnitudes below 2^-23 share the lowest bucket (the least middle is above 2^-23), those from 1 on the highest.
    static constexpr int LOWEST = (127 - 23) << (23 - SHIFT), HIGHEST = 127 << (23 - SHIFT);
    static constexpr int BUCKETS = HIGHEST - LOWEST + 1;

    float values[256];
    float middles[256];
    // From the lowest value's bucket up.
    uint8_t below[2 * BUCKETS];

    static __device__ __forceinline__ int bucket_of(float x) {
        const int bits = __float_as_int(x);
        const int magnitude = min(max((bits & 0x7fffffff) >> SHIFT, LOWEST), HIGHEST) - LOWEST;
        return BUCKETS + (magnitude ^ bits >> 31);
    }

    // By all threads of the block; a barrier must follow.
    __device__ void fill(const float* __restrict__ values_, const float* __restrict__ middles_) {
        for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x)) {
            values[i] = values_[i];
            // Nothing is above the last.
            middles[i] = i < 255 ? middles_[i] : INFINITY;
            const int first = i > 0 ? bucket_of(middles_[i - 1]) + 1 : 0;
            const int last = i < 255 ? bucket_of(middles_[i]) : 2 * BUCKETS - 1;
            for (int bucket = first; bucket <= last; bucket++) {
                below[bucket] = uint8_t(i);
            }
        }
    }

    // How many middles are below x.
    __device__ __forceinline__ uint32_t encode(float x) const {
        const uint32_t code = below[bucket_of(x)];
        return x == x ? code + (middles[code] < x) : 0;
    }
};

// A lane's share of a block: four values at `lane * 4` and four at 128 + `lane * 4`.
constexpr int HALVES = 2, QUARTER = 4;

__device__ __forceinline__ int place_of(int lane, int half) { return half * (BLOCK / HALVES) + lane * QUARTER; }

// Encodes what the lanes of a warp have and returns the factor.
__device__ __forceinline__ float encode_block(const Table& table, const float (&x)[HALVES][QUARTER],
                                              uint32_t (&codes)[HALVES]) {
    float factor = 0;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
#pragma unroll
        for (int i = 0; i < QUARTER; i++) {
            factor = fmaxf(factor, fabsf(x[half][i]));
        }
    }
    factor = warp_max(factor);
    const float inverse = factor > 0 ? __fdiv_rn(1.0f, factor) : 0.0f;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        codes[half] = 0;
#pragma unroll
        for (int i = 0; i < QUARTER; i++) {
            codes[half] |= table.encode(__fmul_rn(x[half][i], inverse)) << (8 * i);
        }
    }
    return factor;
}

__device__ __forceinline__ uint32_t load_codes(const uint8_t* from, int left, bool aligned) {
    if (aligned) {
        return *reinterpret_cast<const uint32_t*>(from);
    }
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < QUARTER; i++) {
        codes |= i < left ? uint32_t(from[i]) << (8 * i) : 0;
    }
    return codes;
}

__device__ __forceinline__ void store_codes(uint8_t* to, uint32_t codes, int left, bool aligned) {
    if (aligned) {
        *reinterpret_cast<uint32_t*>(to) = codes;
        return;
    }
#pragma unroll
    for (int i = 0; i < QUARTER; i++) {
        if (i < left) {
            to[i] = uint8_t(codes >> (8 * i));
        }
    }
}

__device__ __forceinline__ void load_values(const float* from, int left, bool aligned, float (&x)[QUARTER]) {
    if (aligned) {
        load4(from, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < QUARTER; i++) {
        x[i] = i < left ? from[i] : 0.0f;
    }
}

__device__ __forceinline__ void store_values(float* to, const float (&x)[QUARTER], int left, bool aligned) {
    if (aligned) {
        store4(to, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < QUARTER; i++) {
        if (i < left) {
            to[i] = x[i];
        }
    }
}

// Calls `take` for every value, four at a time as far as they go.
template <typename Take>
__device__ __forceinline__ void for_each(const float* __restrict__ x, size_t n, Take take) {
    const size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x, step = size_t(gridDim.x) * blockDim.x;
    const size_t groups = is_aligned(x) ? n / 4 : 0;
    size_t group = index;
    for (; group + 3 * step < groups; group += 4 * step) {
        float4 read[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            read[i] = load4(x + 4 * (group + i * step));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            take(read[i].x), take(read[i].y), take(read[i].z), take(read[i].w);
        }
    }
    for (; group < groups; group += step) {
        const float4 read = load4(x + 4 * group);
        take(read.x), take(read.y), take(read.z), take(read.w);
    }
    for (size_t i = 4 * groups + index; i < n; i += step) {
        take(x[i]);
    }
}

}  // namespace

// ---------------------------------------------------------------- kernels

extern "C" __global__ void __launch_bounds__(THREADS)
    adamw_step(float* __restrict__ p, float* __restrict__ m, float* __restrict__ v, const float* __restrict__ g, size_t n,
               float decay, float rate, float correction_2, float clip) {
    const Rule rule = {decay, rate, correction_2, clip};
    const size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x, step = size_t(gridDim.x) * blockDim.x;
    const size_t groups = is_aligned(p) && is_aligned(m) && is_aligned(v) && is_aligned(g) ? n / 4 : 0;
    for (size_t group = index; group < groups; group += step) {
        float p4[4], m4[4], v4[4], g4[4];
        load4(p + 4 * group, p4);
        load4(m + 4 * group, m4);
        load4(v + 4 * group, v4);
        load4(g + 4 * group, g4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            rule.apply(p4[i], m4[i], v4[i], g4[i]);
        }
        store4(p + 4 * group, p4);
        store4(m + 4 * group, m4);
        store4(v + 4 * group, v4);
    }
    for (size_t i = 4 * groups + index; i < n; i += step) {
        rule.apply(p[i], m[i], v[i], g[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    adamw_8bit_step(float* __restrict__ p, const float* __restrict__ g, uint8_t* __restrict__ m_codes,
                    uint8_t* __restrict__ v_codes, float* __restrict__ m_factors, float* __restrict__ v_factors,
                    const ulonglong2* __restrict__ places, int blocks, const float* __restrict__ signed_values,
                    const float* __restrict__ signed_middles, const float* __restrict__ unsigned_values,
                    const float* __restrict__ unsigned_middles, float decay, float rate, float correction_2, float clip) {
    __shared__ Table signed_table, unsigned_table;
    signed_table.fill(signed_values, signed_middles);
    unsigned_table.fill(unsigned_values, unsigned_middles);
    __syncthreads();
    const Rule rule = {decay, rate, correction_2, clip};
    const int lane = int(threadIdx.x) % WARP, warps = int(gridDim.x) * (THREADS / WARP);
    for (int block = int(blockIdx.x) * (THREADS / WARP) + int(threadIdx.x) / WARP; block < blocks; block += warps) {
        const ulonglong2 place = places[block];
        const int length = int(places[block + 1].y - place.y);
        float* p_at = p + place.x;
        const float* g_at = g + place.x;
        uint8_t *m_at = m_codes + place.y, *v_at = v_codes + place.y;
        const bool aligned = length == BLOCK && is_aligned(p_at) && is_aligned(g_at) &&
                             ((reinterpret_cast<uintptr_t>(m_at) | reinterpret_cast<uintptr_t>(v_at)) & 3) == 0;
        float p4[HALVES][QUARTER], g4[HALVES][QUARTER], m[HALVES][QUARTER], v[HALVES][QUARTER];
        uint32_t m_read[HALVES], v_read[HALVES];
        const float m_factor = m_factors[block], v_factor = v_factors[block];
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int at = place_of(lane, half), left = length - at;
            load_values(p_at + at, left, aligned, p4[half]);
            load_values(g_at + at, left, aligned, g4[half]);
            m_read[half] = load_codes(m_at + at, left, aligned);
            v_read[half] = load_codes(v_at + at, left, aligned);
        }
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int left = length - place_of(lane, half);
#pragma unroll
            for (int i = 0; i < QUARTER; i++) {
                m[half][i] = __fmul_rn(signed_table.values[m_read[half] >> (8 * i) & 255], m_factor);
                v[half][i] = __fmul_rn(unsigned_table.values[v_read[half] >> (8 * i) & 255], v_factor);
                rule.apply(p4[half][i], m[half][i], v[half][i], g4[half][i]);
                // Beyond the block's end nothing may count for its factors.
                m[half][i] = i < left ? m[half][i] : 0.0f;
                v[half][i] = i < left ? v[half][i] : 0.0f;
            }
        }
        uint32_t m_new[HALVES], v_new[HALVES];
        const float m_largest = encode_block(signed_table, m, m_new), v_largest = encode_block(unsigned_table, v, v_new);
        if (lane == 0) {
            m_factors[block] = m_largest;
            v_factors[block] = v_largest;
        }
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const int at = place_of(lane, half), left = length - at;
            store_values(p_at + at, p4[half], left, aligned);
            store_codes(m_at + at, m_new[half], left, aligned);
            store_codes(v_at + at, v_new[half], left, aligned);
        }
    }
}

// partial (1024): a sum of squares for each block.
extern "C" __global__ void __launch_bounds__(THREADS)
    squared_norm(double* __restrict__ partial, const float* __restrict__ x, size_t n) {
    double sum = 0;
    for_each(x, n, [&](float value) { sum += double(value) * double(value); });
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// norm = sqrt(sum of partial); it is finite exactly where every value was.
extern "C" __global__ void __launch_bounds__(1024)
    squared_norm_finish(double* __restrict__ norm, const double* __restrict__ partial, int count) {
    double sum = 0;
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
        sum += partial[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        *norm = sqrt(sum);
    }
}
