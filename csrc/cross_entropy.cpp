// One pass over each row, in place. A block of the row is read once from memory: its maximum first, then
// exp(x - m) with m the maximum so far, which is stored over x (fp32) and summed. The second pass finds the
// row in cache and only multiplies each block by exp(m_block - m_row) * scale / sum, so exp is taken once
// per logit. bf16 rows would lose digits that way, so they go through a row of fp32 scratch per thread. So do
// rows whose logits are scaled or capped, or whose labels are smoothed: their gradient needs the shaped
// logits again, and takes exp twice.
//
// The same source is compiled for several instruction sets by target attributes and picked at run time, so
// a wheel built without -march=native is as fast.
#include "cross_entropy.h"

#include <cmath>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cross_entropy_block.h"

#if defined(__x86_64__)
#define VELOPATH_X86 1
#endif

namespace velopath {
namespace {

// What a row needs beyond itself; `terms` (vocab) for bf16 and for shaped logits.
struct Scratch {
    float* maxima;  // one per block
    float* terms;
};

// What is asked of one row. The pointers may be null; lse and loss are so together.
struct Task {
    const RowOptions& options;
    float scale;
    bool gradient;
    float* lse;
    float* loss;
    float* correct;
};

bool is_shaped(const RowOptions& o) {
    return o.logit_scale != 1.0 || o.softcap > 0.0 || o.label_smoothing > 0.0;
}

struct Statistics {
    double max, sum_exp, at_target, sum;
};

// The statistics of shaped logits, which stay in `terms`; a target beyond the columns has a logit of 0.
template <int64_t LANES, typename T>
INLINE Statistics statistics_of(const T* x, int64_t vocab, int64_t target, const RowOptions& o, float* terms) {
    float m = NONE;
    Statistics s{0.0, 0.0, 0.0, 0.0};
    for (int64_t b = 0; b < vocab; b += BLOCK) {
        const int64_t n = vocab - b < BLOCK ? vocab - b : BLOCK;
        s.sum += Simd<LANES>::shape(x + b, terms + b, n, static_cast<float>(o.logit_scale),
                                    static_cast<float>(o.softcap));
        const float higher = Simd<LANES>::maximum(terms + b, n, m);
        if (higher > m) {
            s.sum_exp *= std::exp(static_cast<double>(m) - static_cast<double>(higher));
            m = higher;
        }
        // Without a finite logit so far: exp(-inf - 0) = 0, not exp(-inf + inf).
        s.sum_exp += Simd<LANES>::template sum_exp<false>(terms + b, terms, n, m == NONE ? 0.0f : m);
    }
    s.max = m;
    s.at_target = target >= 0 && target < vocab ? terms[target] : 0.0;
    return s;
}

// (exp(x - m) a - b - [target] t) dx/dr over the logits, from the shaped ones in `terms`.
template <int64_t LANES, typename T>
INLINE void write_gradient(T* x, int64_t vocab, int64_t target, const RowOptions& o, const float* terms, double m,
                           double a, double b, double t) {
    const double cap = o.softcap;
    Simd<LANES>::derive(terms, x, vocab, static_cast<float>(m), static_cast<float>(a), static_cast<float>(b),
                        static_cast<float>(o.logit_scale), static_cast<float>(cap));
    if (target < 0 || target >= vocab) return;
    // Rounded once, from the difference in fp64.
    const double at = terms[target];
    double g = (std::exp(at - m) * a - b - t) * o.logit_scale;
    if (cap > 0.0) g *= 1.0 - at / cap * (at / cap);
    x[target] = round_to(static_cast<float>(g), static_cast<T*>(nullptr));
}

// Writes what the task asks for; returns the nats.
INLINE float finish(const Task& task, double nats, double lse, double smooth) {
    if (task.lse) {
        const RowOptions& o = task.options;
        *task.lse = static_cast<float>(lse);
        const double loss = nats + o.label_smoothing * smooth + o.z_loss * lse * lse;
        *task.loss = static_cast<float>(loss * static_cast<double>(task.scale));
    }
    return static_cast<float>(nats);
}

template <int64_t LANES, typename T>
INLINE float shaped_row(T* x, int64_t vocab, int64_t target, const Task& task, Scratch scratch) {
    const RowOptions& o = task.options;
    const double scale = task.scale, e = o.label_smoothing, columns = static_cast<double>(vocab);
    const Statistics s = statistics_of<LANES>(x, vocab, target, o, scratch.terms);
    // Not (m + log sum) - x in fp32: with logits of 1e4 that would cost four digits.
    const double log_sum = std::log(s.sum_exp);
    const double nats = (s.max - s.at_target) + log_sum, lse = s.max + log_sum;
    if (task.gradient)
        write_gradient<LANES>(x, vocab, target, o, scratch.terms, s.max,
                              scale * (1.0 + 2.0 * o.z_loss * lse) / s.sum_exp, scale * e / columns,
                              scale * (1.0 - e));
    // Smoothing replaces e (lse - x_t) by e (lse - mean x). Without it no zero meets an infinite mean.
    return finish(task, nats, lse, e > 0.0 ? s.at_target - s.sum / columns : 0.0);
}

template <int64_t LANES, typename T>
INLINE float row(T* x, int64_t vocab, int64_t target, const Task& task, Scratch scratch) {
    if (task.correct) {
        const float here = value_of(x[target]);
        const bool first = Simd<LANES>::maximum(x, target, NONE) < here || target == 0;
        *task.correct = first && Simd<LANES>::maximum(x, vocab, NONE) == here ? 1.0f : 0.0f;
    }
    if (is_shaped(task.options)) return shaped_row<LANES>(x, vocab, target, task, scratch);
    const double scale = task.scale;
    const float at_target = value_of(x[target]);
    float m = NONE;
    double sum = 0.0;
    float* terms = sizeof(T) == 4 ? reinterpret_cast<float*>(x) : scratch.terms;
    for (int64_t b = 0, k = 0; b < vocab; b += BLOCK, ++k) {
        const int64_t n = vocab - b < BLOCK ? vocab - b : BLOCK;
        const float higher = Simd<LANES>::maximum(x + b, n, m);
        if (higher > m) {
            sum *= std::exp(static_cast<double>(m) - static_cast<double>(higher));  // exp(-inf) = 0 at the first
            m = higher;
        }
        sum += task.gradient ? Simd<LANES>::template sum_exp<true>(x + b, terms + b, n, m)
                             : Simd<LANES>::template sum_exp<false>(x + b, terms, n, m);
        scratch.maxima[k] = m;
    }
    const double top = m, log_sum = std::log(sum);
    if (task.gradient) {
        const double share = 1.0 + 2.0 * task.options.z_loss * (top + log_sum);
        for (int64_t b = 0, k = 0; b < vocab; b += BLOCK, ++k) {
            const int64_t n = vocab - b < BLOCK ? vocab - b : BLOCK;
            const double factor = std::exp(static_cast<double>(scratch.maxima[k]) - top) * scale / sum * share;
            Simd<LANES>::multiply(terms + b, x + b, n, static_cast<float>(factor));
        }
        // Rounded once, from p - 1 in fp64: near p = 1 the rounded p would have lost the digits.
        const double p = std::exp(static_cast<double>(at_target) - top) / sum * share;
        x[target] = round_to(static_cast<float>((p - 1.0) * scale), static_cast<T*>(nullptr));
    }
    return finish(task, (top - static_cast<double>(at_target)) + log_sum, top + log_sum, 0.0);
}

// The row r of a shard: its statistics, or its gradient.
template <int64_t LANES, typename T>
INLINE void shard_row(const ShardRows& w, int64_t r, float* terms) {
    T* x = static_cast<T*>(w.logits) + r * w.stride;
    const int64_t target = w.targets[r];
    if (w.factors && target == NOT_COUNTED) {
        std::memset(static_cast<void*>(x), 0, sizeof(T) * static_cast<size_t>(w.vocab));
        return;
    }
    if (w.factors) {
        const double* f = w.factors + r;
        Simd<LANES>::shape(x, terms, w.vocab, static_cast<float>(w.options.logit_scale),
                           static_cast<float>(w.options.softcap));
        write_gradient<LANES>(x, w.vocab, target, w.options, terms, f[0], f[w.rows], f[2 * w.rows],
                              f[3 * w.rows]);
        return;
    }
    const Statistics s = statistics_of<LANES>(x, w.vocab, target, w.options, terms);
    const bool own = target >= 0 && target < w.vocab;
    const int64_t left = target < 0 ? 0 : target;
    double* out = w.statistics + r;
    out[0] = s.max;
    out[w.rows] = static_cast<double>(Simd<LANES>::maximum(x, w.vocab, NONE));
    out[2 * w.rows] = static_cast<double>(Simd<LANES>::maximum(x, left, NONE));
    out[3 * w.rows] = s.sum_exp;
    out[4 * w.rows] = s.at_target;
    out[5 * w.rows] = own ? static_cast<double>(value_of(x[target])) : 0.0;
    out[6 * w.rows] = s.sum;
}

// One row by one instruction set.
struct Rows {
    float (*row32)(float*, int64_t, int64_t, const Task&, Scratch);
    float (*row16)(uint16_t*, int64_t, int64_t, const Task&, Scratch);
    void (*shard32)(const ShardRows&, int64_t, float*);
    void (*shard16)(const ShardRows&, int64_t, float*);
};

#define ROWS(NAME, LANES, TARGET)                                                                      \
    TARGET float row32_##NAME(float* x, int64_t v, int64_t t, const Task& task, Scratch w) {           \
        return row<LANES>(x, v, t, task, w);                                                           \
    }                                                                                                  \
    TARGET float row16_##NAME(uint16_t* x, int64_t v, int64_t t, const Task& task, Scratch w) {        \
        return row<LANES>(x, v, t, task, w);                                                           \
    }                                                                                                  \
    TARGET void shard32_##NAME(const ShardRows& w, int64_t r, float* terms) {                          \
        shard_row<LANES, float>(w, r, terms);                                                          \
    }                                                                                                  \
    TARGET void shard16_##NAME(const ShardRows& w, int64_t r, float* terms) {                          \
        shard_row<LANES, uint16_t>(w, r, terms);                                                       \
    }                                                                                                  \
    constexpr Rows NAME##_rows{row32_##NAME, row16_##NAME, shard32_##NAME, shard16_##NAME};

ROWS(generic, 4, )

#ifdef VELOPATH_X86
ROWS(avx2, 8, __attribute__((target("avx2,fma"))))
ROWS(avx512, 16, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))

bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The rows of an instruction set, "" the best; null where it is not there.
const Rows* pick(const std::string& set) {
#ifdef VELOPATH_X86
    if ((set.empty() || set == "avx512") && runs_avx512()) return &avx512_rows;
    if ((set.empty() || set == "avx2") && runs_avx2()) return &avx2_rows;
#endif
    return set.empty() || set == "generic" ? &generic_rows : nullptr;
}

// Calls work(row, scratch of `floats` numbers) for every row, with torch's number of threads.
template <typename Work>
void for_rows(int64_t rows, int asked, size_t floats, Work work) {
    const int threads = asked < 1 ? 1 : asked;
    // Allocated before the threads start, so that a failed allocation is an exception and not the end.
    std::vector<std::vector<float>> scratch(static_cast<size_t>(threads), std::vector<float>(floats));
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t r = 0; r < rows; ++r) {
#ifdef _OPENMP
        work(r, scratch[static_cast<size_t>(omp_get_thread_num())].data());
#else
        work(r, scratch[0].data());
#endif
    }
}

template <typename T, typename Row>
void run(const CrossEntropyRows& w, Row one) {
    const size_t blocks = static_cast<size_t>((w.vocab + BLOCK - 1) / BLOCK);
    const bool needs_terms = is_shaped(w.options) || (sizeof(T) == 2 && w.gradient);
    const size_t terms = needs_terms ? static_cast<size_t>(w.vocab) : 0;
    for_rows(w.rows, w.threads, blocks + terms, [&](int64_t r, float* own) {
        T* x = static_cast<T*>(w.logits) + r * w.stride;
        float* lse = w.lse ? w.lse + r : nullptr;
        float* loss = w.lse ? w.losses + r : nullptr;
        float* correct = w.correct ? w.correct + r : nullptr;
        if (w.targets[r] == w.ignore_index) {
            w.nats[r] = 0.0f;
            if (lse) *lse = *loss = 0.0f;
            if (correct) *correct = 0.0f;
            if (w.gradient) std::memset(static_cast<void*>(x), 0, sizeof(T) * static_cast<size_t>(w.vocab));
        } else {
            const Task task{w.options, w.scales ? w.scales[r] : w.scale, w.gradient, lse, loss, correct};
            w.nats[r] = one(x, w.vocab, w.targets[r], task, Scratch{own, own + blocks});
            if (correct && w.nats[r] != w.nats[r]) *correct = 0.0f;  // maxima pass over a NaN
        }
    });
}

}  // namespace

std::string instruction_sets() {
    std::string sets;
#ifdef VELOPATH_X86
    if (runs_avx512()) sets += "avx512 ";
    if (runs_avx2()) sets += "avx2 ";
#endif
    return sets + "generic";
}

bool cross_entropy_rows(const CrossEntropyRows& work, const std::string& set) {
    const Rows* rows = pick(set);
    if (!rows) return false;
    if (work.half) {
        run<uint16_t>(work, rows->row16);
    } else {
        run<float>(work, rows->row32);
    }
    return true;
}

bool shard_rows(const ShardRows& work, const std::string& set) {
    const Rows* rows = pick(set);
    if (!rows) return false;
    const auto one = work.half ? rows->shard16 : rows->shard32;
    for_rows(work.rows, work.threads, static_cast<size_t>(work.vocab),
             [&](int64_t r, float* terms) { one(work, r, terms); });
    return true;
}

}  // namespace velopath
