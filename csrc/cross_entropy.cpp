// One pass over each row, in place. A block of the row is read once from memory: its maximum first, then
// exp(x - m) with m the maximum so far, which is stored over x (fp32) and summed. The second pass finds the
// row in cache and only multiplies each block by exp(m_block - m_row) * scale / sum, so exp is taken once
// per logit. bf16 rows would lose digits that way, so they go through a row of fp32 scratch per thread.
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

// What a row needs beyond itself; `terms` (vocab) only for bf16.
struct Scratch {
    float* maxima;  // one per block
    float* terms;
};

template <int64_t LANES, typename T>
INLINE float row(T* x, int64_t vocab, int64_t target, float scale, bool gradient, Scratch scratch) {
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
        sum += gradient ? Simd<LANES>::template sum_exp<true>(x + b, terms + b, n, m)
                        : Simd<LANES>::template sum_exp<false>(x + b, terms, n, m);
        scratch.maxima[k] = m;
    }
    const double top = m;
    if (gradient) {
        for (int64_t b = 0, k = 0; b < vocab; b += BLOCK, ++k) {
            const int64_t n = vocab - b < BLOCK ? vocab - b : BLOCK;
            const double factor = std::exp(static_cast<double>(scratch.maxima[k]) - top) * scale / sum;
            Simd<LANES>::multiply(terms + b, x + b, n, static_cast<float>(factor));
        }
        // Rounded once, from p - 1 in fp64: near p = 1 the rounded p would have lost the digits.
        const double p = std::exp(static_cast<double>(at_target) - top) / sum;
        x[target] = round_to(static_cast<float>((p - 1.0) * scale), static_cast<T*>(nullptr));
    }
    // Not (m + log sum) - x in fp32: with logits of 1e4 that would cost four digits.
    return static_cast<float>((top - static_cast<double>(at_target)) + std::log(sum));
}

using Row32 = float (*)(float*, int64_t, int64_t, float, bool, Scratch);
using Row16 = float (*)(uint16_t*, int64_t, int64_t, float, bool, Scratch);

#define ROWS(NAME, LANES, TARGET)                                                                    \
    TARGET float row32_##NAME(float* x, int64_t v, int64_t t, float s, bool g, Scratch w) {          \
        return row<LANES>(x, v, t, s, g, w);                                                         \
    }                                                                                                \
    TARGET float row16_##NAME(uint16_t* x, int64_t v, int64_t t, float s, bool g, Scratch w) {       \
        return row<LANES>(x, v, t, s, g, w);                                                         \
    }

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

bool pick(const std::string& set, Row32& row32, Row16& row16) {
#ifdef VELOPATH_X86
    if ((set.empty() || set == "avx512") && runs_avx512()) {
        row32 = row32_avx512;
        row16 = row16_avx512;
        return true;
    }
    if ((set.empty() || set == "avx2") && runs_avx2()) {
        row32 = row32_avx2;
        row16 = row16_avx2;
        return true;
    }
#endif
    row32 = row32_generic;
    row16 = row16_generic;
    return set.empty() || set == "generic";
}

template <typename T, typename Row>
void run(const CrossEntropyRows& w, Row one) {
    const size_t blocks = static_cast<size_t>((w.vocab + BLOCK - 1) / BLOCK);
    const size_t terms = sizeof(T) == 4 || !w.gradient ? 0 : static_cast<size_t>(w.vocab);
    const int threads = w.threads < 1 ? 1 : w.threads;
    // Allocated before the threads start, so that a failed allocation is an exception and not the end.
    std::vector<std::vector<float>> scratch(static_cast<size_t>(threads), std::vector<float>(blocks + terms));
    T* logits = static_cast<T*>(w.logits);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t r = 0; r < w.rows; ++r) {
#ifdef _OPENMP
        float* own = scratch[static_cast<size_t>(omp_get_thread_num())].data();
#else
        float* own = scratch[0].data();
#endif
        T* x = logits + r * w.stride;
        if (w.targets[r] == w.ignore_index) {
            w.nats[r] = 0.0f;
            if (w.gradient) std::memset(static_cast<void*>(x), 0, sizeof(T) * static_cast<size_t>(w.vocab));
        } else {
            w.nats[r] = one(x, w.vocab, w.targets[r], w.scale, w.gradient, Scratch{own, own + blocks});
        }
    }
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
    Row32 row32 = nullptr;
    Row16 row16 = nullptr;
    if (!pick(set, row32, row16)) return false;
    if (work.half) {
        run<uint16_t>(work, row16);
    } else {
        run<float>(work, row32);
    }
    return true;
}

}  // namespace velopath
