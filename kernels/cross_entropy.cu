// Cross-entropy over the logits of a chunk of tokens.
//
// For a token with label y: loss = log sum exp(z) - z_y, dz = scale * (softmax(z) - onehot(y)); correct where z_y is the largest of z.
// A row whose label is not in [0, vocabulary) has loss 0 and gradient 0.
// Shapes: logits, dlogits (rows, vocabulary); labels, loss_per_row, correct_per_row (rows). Logits in f32
// (the loss alone also of bf16 ones), dlogits in either; exp in f32, sums in f32 by thread and then over the block.
// The first pass over a row finds its maximum and sum together, the second writes the gradient. What the block's dynamic shared
// memory has room for is kept there in between, the rest is read again, the last read first: it is the likeliest to be in L2 still.
// Launch rules: cross_entropy_*: a block of 1024 threads a row; any dynamic shared memory is right, all that a block may have is best.
// loss_sum: one block of 1024 threads. gather_rows, scatter_rows: flat (common.cuh).
// CPU twin: engine/src/ops/cross_entropy.rs.

#include "common.cuh"

namespace {

// ---------------------------------------------------------------- device helpers

constexpr int THREADS = 1024;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr double LN_2 = 0.6931471805599453;

// Of some values x the maximum, `shift` = maximum * log2(e) as f32 has it, and the sum of 2^(x * log2(e) - shift): the logarithm of
// the sum of exp(x) is then ln(2) * (log2(sum) + shift), however the product was rounded.
struct Sum {
    // Not -inf: a row may begin with logits of -inf, and -inf - -inf is NaN. Not less: its shift must be finite.
    float max = -1e38f;
    float shift = -1e38f * LOG2_E;
    float sum = 0;

    __device__ __forceinline__ void raise(float other) {
        if (other > max) {
            const float raised = other * LOG2_E;
            sum *= exp2_fast(shift - raised);
            max = other;
            shift = raised;
        }
    }

    template <int COUNT>
    __device__ __forceinline__ void take(const float (&x)[COUNT]) {
        float largest = x[0];
#pragma unroll
        for (int i = 1; i < COUNT; i++) {
            largest = fmaxf(largest, x[i]);
        }
        raise(largest);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            sum += exp2_fast(fmaf(x[i], LOG2_E, -shift));
        }
    }
};

// Groups of a row that a block keeps in its dynamic shared memory, the halves of a f32 group apart: no two lanes of a
// 16-byte access meet in one bank.
template <typename L>
struct Kept {
    static constexpr int WORDS = sizeof(L) / 2;
    uint4* words;
    int groups;

    __device__ Kept() {
        extern __shared__ uint4 shared[];
        unsigned bytes;
        asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
        words = shared;
        groups = int(bytes / (16 * WORDS));
    }

    __device__ __forceinline__ void put(int group, const Eight<L>& value) const {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            words[i * groups + group] = value.words[i];
        }
    }

    __device__ __forceinline__ Eight<L> get(int group) const {
        Eight<L> value;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            value.words[i] = words[i * groups + group];
        }
        return value;
    }
};

// The gradient of a group: 2^(x * log2(e) - shift) * factor, less `scale` at the label; 0 where the row has no label.
template <typename L, typename T>
__device__ __forceinline__ void write_gradient(T* d, bool d_aligned, int group, const Eight<L>& read, int label, bool labelled,
                                               float shift, float factor, float scale, int vocabulary) {
    const int column = group * GROUP, at = label - column;
    float x[GROUP];
    unpack(read, x);
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
        x[i] = labelled ? exp2_fast(fmaf(x[i], LOG2_E, -shift)) * factor : 0.0f;
    }
    if (labelled && at >= 0 && at < GROUP) {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            x[i] -= i == at ? scale : 0.0f;
        }
    }
    const int left = vocabulary - column;
    if (d_aligned && left >= GROUP) {
        store_once(d + column, pack<T>(x));
    } else {
        store_part(d + column, left, false, x);
    }
}

// Reads FLIGHT groups and takes them; with `keep` those are kept that there is room for.
template <int FLIGHT, typename L>
__device__ __forceinline__ void take_flight(Sum& mine, const Kept<L>& kept, const L* row, int group, bool keep) {
    Eight<L> read[FLIGHT];
#pragma unroll
    for (int i = 0; i < FLIGHT; i++) {
        const L* from = row + size_t(group + i * THREADS) * GROUP;
        read[i] = group + i * THREADS < kept.groups ? load_once(from) : load(from);
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; i++) {
        if (keep && group + i * THREADS < kept.groups) {
            kept.put(group + i * THREADS, read[i]);
        }
        float x[GROUP];
        unpack(read[i], x);
        mine.take(x);
    }
}

// Reads FLIGHT groups, back from `group`, and writes their gradients.
template <int FLIGHT, typename L, typename Write>
__device__ __forceinline__ void write_flight(const Write& write, const L* row, int group) {
    Eight<L> read[FLIGHT];
#pragma unroll
    for (int i = 0; i < FLIGHT; i++) {
        read[i] = load_once(row + size_t(group - i * THREADS) * GROUP);
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; i++) {
        write(group - i * THREADS, read[i]);
    }
}

template <typename L, typename T>
__device__ __forceinline__ void forward_backward(T* dlogits, long long d_stride, const L* logits, long long stride,
                                                 const int* __restrict__ labels, float scale, float* __restrict__ loss_per_row,
                                                 int* __restrict__ correct_per_row, int vocabulary) {
    // Groups that a thread has in flight: 64 bytes.
    constexpr int FLIGHT = 8 / sizeof(L);
    const L* row = logits + size_t(blockIdx.x) * size_t(stride);
    T* d = dlogits == nullptr ? nullptr : dlogits + size_t(blockIdx.x) * size_t(d_stride);
    const bool aligned = is_aligned(row), d_aligned = is_aligned(d);
    const int label = labels[blockIdx.x], thread = int(threadIdx.x);
    const bool labelled = label >= 0 && label < vocabulary;
    const int groups = (vocabulary + GROUP - 1) / GROUP, whole = aligned ? vocabulary / GROUP : 0;
    const Kept<L> kept;
    const float target = labelled ? to_f32(row[label]) : 0.0f;

    Sum mine;
    int group = thread;
    if (labelled) {
        for (; group + (FLIGHT - 1) * THREADS < whole; group += FLIGHT * THREADS) {
            take_flight<FLIGHT>(mine, kept, row, group, d != nullptr);
        }
        for (; group < groups; group += THREADS) {
            const int left = vocabulary - group * GROUP;
            const Eight<L> read = load_part(row + size_t(group) * GROUP, left, aligned);
            if (d != nullptr && group < kept.groups) {
                kept.put(group, read);
            }
            float x[GROUP];
            unpack(read, x);
            // What is beyond the row must not count.
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                x[i] = i < left ? x[i] : -INFINITY;
            }
            mine.take(x);
        }
    }
    const float max = block_max(mine.max);
    mine.raise(max);
    const float shift = max * LOG2_E;
    const float sum = block_sum(mine.sum);
    if (thread == 0) {
        loss_per_row[blockIdx.x] = labelled ? float(log(double(sum)) + LN_2 * double(shift) - double(target)) : 0.0f;
        correct_per_row[blockIdx.x] = labelled && target >= max;
    }
    if (d == nullptr) {
        return;
    }

    const float factor = labelled ? scale / sum : 0.0f;
    const auto write = [&](int group, const Eight<L>& read) {
        write_gradient(d, d_aligned, group, read, label, labelled, shift, factor, scale, vocabulary);
    };
    if (!labelled) {
        for (group = thread; group < groups; group += THREADS) {
            write(group, Eight<L>{});
        }
        return;
    }
    group = (groups - 1 - thread) / THREADS * THREADS + thread;
    if (thread >= groups) {
        return;
    }
    for (; group >= whole && group >= kept.groups; group -= THREADS) {
        write(group, load_part(row + size_t(group) * GROUP, vocabulary - group * GROUP, aligned));
    }
    for (; group - (FLIGHT - 1) * THREADS >= kept.groups; group -= FLIGHT * THREADS) {
        write_flight<FLIGHT>(write, row, group);
    }
    for (; group >= kept.groups; group -= THREADS) {
        write(group, load_once(row + size_t(group) * GROUP));
    }
    for (; group >= 0; group -= THREADS) {
        write(group, kept.get(group));
    }
}

template <typename T>
__device__ __forceinline__ void copy_row(T* __restrict__ y, const T* __restrict__ x, int left) {
    const bool y_aligned = is_aligned(y);
    float values[GROUP];
    load_part(x, left, is_aligned(x), values);
    store_part(y, left, y_aligned, values);
}

}  // namespace

// ---------------------------------------------------------------- kernels

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_forward_backward_bf16(bf16* __restrict__ dlogits, long long d_stride, const float* __restrict__ logits,
                                        long long stride, const int* labels, float scale, float* loss_per_row,
                                        int* correct_per_row, int rows, int vocabulary) {
    forward_backward(dlogits, d_stride, logits, stride, labels, scale, loss_per_row, correct_per_row, vocabulary);
}

// dlogits may be the logits themselves.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_forward_backward_f32(float* dlogits, long long d_stride, const float* logits, long long stride,
                                       const int* labels, float scale, float* loss_per_row, int* correct_per_row, int rows,
                                       int vocabulary) {
    forward_backward(dlogits, d_stride, logits, stride, labels, scale, loss_per_row, correct_per_row, vocabulary);
}

// Only the loss.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_forward_f32(const float* __restrict__ logits, long long stride, const int* labels, float* loss_per_row,
                              int* correct_per_row, int rows, int vocabulary) {
    forward_backward(static_cast<float*>(nullptr), 0, logits, stride, labels, 0.0f, loss_per_row, correct_per_row, vocabulary);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_forward_bf16(const bf16* __restrict__ logits, long long stride, const int* labels, float* loss_per_row,
                               int* correct_per_row, int rows, int vocabulary) {
    forward_backward(static_cast<bf16*>(nullptr), 0, logits, stride, labels, 0.0f, loss_per_row, correct_per_row, vocabulary);
}

// Adds to what stands in sum and correct.
extern "C" __global__ void __launch_bounds__(THREADS)
    loss_sum(double* sum, long long* correct, const float* __restrict__ loss_per_row, const int* __restrict__ correct_per_row,
             int rows) {
    double losses = 0;
    int hits = 0;
    for (int row = int(threadIdx.x); row < rows; row += THREADS) {
        losses += double(loss_per_row[row]);
        hits += correct_per_row[row];
    }
    losses = block_sum(losses);
    hits = block_sum(hits);
    if (threadIdx.x == 0) {
        *sum += losses;
        *correct += hits;
    }
}

#define ROWS(T, NAME)                                                                                                           \
    /* y[i] = x[rows_index[i]]. */                                                                                              \
    extern "C" __global__ void gather_rows_##NAME(T* y, long long y_stride, const T* x, long long x_stride,                     \
                                                  const int* rows_index, int rows, int width) {                                 \
        const Place place = flat_place(width);                                                                                  \
        if (place.row < unsigned(rows)) {                                                                                       \
            copy_row(y + place.row * size_t(y_stride) + place.column,                                                           \
                     x + size_t(rows_index[place.row]) * size_t(x_stride) + place.column, width - place.column);                \
        }                                                                                                                       \
    }                                                                                                                           \
    /* y[rows_index[i]] = x[i]; no index twice. */                                                                              \
    extern "C" __global__ void scatter_rows_##NAME(T* y, long long y_stride, const T* x, long long x_stride,                    \
                                                   const int* rows_index, int rows, int width) {                                \
        const Place place = flat_place(width);                                                                                  \
        if (place.row < unsigned(rows)) {                                                                                       \
            copy_row(y + size_t(rows_index[place.row]) * size_t(y_stride) + place.column,                                       \
                     x + place.row * size_t(x_stride) + place.column, width - place.column);                                    \
        }                                                                                                                       \
    }

ROWS(bf16, bf16)
ROWS(float, f32)
