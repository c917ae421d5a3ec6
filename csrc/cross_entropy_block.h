// One block of a row on the CPU: maximum, sum of exp, product; fp32 or bf16 bits. Included by
// cross_entropy.cpp only.
//
// Everything is inlined into functions that carry a target attribute, and so compiled once per instruction
// set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a function that is not inlined
#endif

#define INLINE inline __attribute__((always_inline))

namespace velopath {
namespace {

constexpr int64_t BLOCK = 2048;  // 8 KiB of fp32: stays in the first-level cache between maximum and exp
constexpr float NONE = -std::numeric_limits<float>::infinity();

INLINE float round_to(float x, float*) { return x; }

INLINE uint16_t round_to(float x, uint16_t*) {  // bf16 to nearest even; a NaN stays one
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return x == x ? static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}

INLINE float value_of(float x) { return x; }

INLINE float value_of(uint16_t x) {
    const uint32_t u = static_cast<uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// Spelt out, because GCC takes vector_size only of a number and not of a template's parameter.
template <int64_t LANES>
struct Vectors;
#define VELOPATH_VECTORS(LANES)                                            \
    template <>                                                            \
    struct Vectors<LANES> {                                                \
        typedef float Floats __attribute__((vector_size(LANES * 4)));      \
        typedef int32_t Ints __attribute__((vector_size(LANES * 4)));      \
        typedef uint32_t Words __attribute__((vector_size(LANES * 4)));    \
        typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));   \
    };
VELOPATH_VECTORS(4)
VELOPATH_VECTORS(8)
VELOPATH_VECTORS(16)
#undef VELOPATH_VECTORS

// The work on one block with vectors of LANES floats, the register width of the instruction set: wider ones
// compile and run seven times slower.
template <int64_t LANES>
struct Simd {
    using Floats = typename Vectors<LANES>::Floats;
    using Ints = typename Vectors<LANES>::Ints;
    using Words = typename Vectors<LANES>::Words;
    using Halves = typename Vectors<LANES>::Halves;

    static INLINE void fill(Floats& v, float x) { v = Floats{} + x; }

    static INLINE void load(Floats& v, const float* p) { std::memcpy(&v, p, sizeof v); }

    static INLINE void load(Floats& v, const uint16_t* p) {
        Halves h;
        std::memcpy(&h, p, sizeof h);
        v = (Floats)(__builtin_convertvector(h, Words) << 16);
    }

    // n < LANES; the lanes beyond are -inf, of which exp gives 0.
    template <typename T>
    static INLINE void load_part(Floats& v, const T* p, int64_t n) {
        T part[LANES];
        for (int64_t i = 0; i < LANES; ++i) part[i] = round_to(NONE, part);
        std::memcpy(part, p, sizeof(T) * static_cast<size_t>(n));
        load(v, part);
    }

    static INLINE void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }

    static INLINE void store(uint16_t* p, const Floats& v) {  // as round_to
        const Words u = (Words)v;
        const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const Words number = (Words)(v == v);
        const Halves h = __builtin_convertvector((rounded & number) | (0x7fc0u & ~number), Halves);
        std::memcpy(p, &h, sizeof h);
    }

    template <typename T>
    static INLINE void store_part(T* p, const Floats& v, int64_t n) {
        T part[LANES];
        store(part, v);
        std::memcpy(p, part, sizeof(T) * static_cast<size_t>(n));
    }

    // exp(x) for x <= 0, about 1 ulp (Cephes' expf); 0 below -87.3, where fp32 turns subnormal; NaN stays
    // NaN. Adding 1.5 * 2^23 leaves the nearest integer in the low bits: no conversion, which for a NaN is
    // undefined.
    static INLINE void exponential(Floats& x) {
        Floats low{}, magic{};
        fill(low, -87.3f);
        fill(magic, 12582912.0f);
        const Ints bias = (Ints)magic - 127;
        const Ints keep = ~(Ints)(x < low);  // all ones for a NaN too
        const Floats clamped = x < low ? low : x;
        const Floats shifted = clamped * 1.44269504f + magic;
        const Floats n = shifted - magic;
        Floats f = clamped - n * 0.693359375f;
        f = f + n * 2.12194440e-4f;
        Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * f + 8.3334519073e-3f;
        p = p * f + 4.1665795894e-2f;
        p = p * f + 1.6666665459e-1f;
        p = p * f + 5.0000001201e-1f;
        p = (p * (f * f) + f) + 1.0f;
        // Multiplied, not added to p's exponent: a NaN with a payload must stay a NaN.
        p = p * (Floats)(((Ints)shifted - bias) << 23);
        x = (Floats)((Ints)p & keep);
    }

    static INLINE void raise(Floats& m, const Floats& x) { m = x > m ? x : m; }  // passes over a NaN in x

    template <typename T>
    static INLINE float maximum(const T* x, int64_t n, float start) {
        Floats m[4] = {}, v{};
        for (int64_t u = 0; u < 4; ++u) fill(m[u], start);
        int64_t j = 0;
        for (; j + 4 * LANES <= n; j += 4 * LANES)
            for (int64_t u = 0; u < 4; ++u) {
                load(v, x + j + u * LANES);
                raise(m[u], v);
            }
        for (; j < n; j += LANES) {
            if (j + LANES <= n) {
                load(v, x + j);
            } else {
                load_part(v, x + j, n - j);
            }
            raise(m[0], v);
        }
        raise(m[0], m[1]);
        raise(m[2], m[3]);
        raise(m[0], m[2]);
        float best = start;
        for (int64_t i = 0; i < LANES; ++i) best = m[0][i] > best ? m[0][i] : best;
        return best;
    }

    // Sum of exp(x - m); with KEEP the terms are stored to `terms`, which may be x itself.
    template <bool KEEP, typename T>
    static INLINE double sum_exp(const T* x, float* terms, int64_t n, float m) {
        Floats sum[2] = {}, v{}, shift{};
        fill(shift, m);
        int64_t j = 0;
        for (; j + 2 * LANES <= n; j += 2 * LANES)
            for (int64_t u = 0; u < 2; ++u) {
                load(v, x + j + u * LANES);
                v = v - shift;
                exponential(v);
                if (KEEP) store(terms + j + u * LANES, v);
                sum[u] = sum[u] + v;
            }
        for (; j < n; j += LANES) {
            const bool whole = j + LANES <= n;
            if (whole) {
                load(v, x + j);
            } else {
                load_part(v, x + j, n - j);
            }
            v = v - shift;
            exponential(v);
            if (KEEP && whole) store(terms + j, v);
            if (KEEP && !whole) store_part(terms + j, v, n - j);
            sum[0] = sum[0] + v;
        }
        double total = 0.0;
        for (int64_t i = 0; i < LANES; ++i)
            total += static_cast<double>(sum[0][i]) + static_cast<double>(sum[1][i]);
        return total;
    }

    template <typename T>
    static INLINE void multiply(const float* terms, T* gradient, int64_t n, float factor) {
        Floats v{}, f{};
        fill(f, factor);
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES) {
            load(v, terms + j);
            v = v * f;
            store(gradient + j, v);
        }
        if (j < n) {
            load_part(v, terms + j, n - j);
            v = v * f;
            store_part(gradient + j, v, n - j);
        }
    }

    // tanh of any x (Cephes' tanhf): a polynomial near 0, where 1 - exp would cancel.
    static INLINE void hyperbolic_tangent(Floats& x) {
        Floats near{};
        fill(near, 0.625f);
        const Words sign = (Words)x & 0x80000000u;
        const Floats size = (Floats)((Words)x & 0x7fffffffu);
        Floats t = size * -2.0f;
        exponential(t);
        const Floats large = (Floats)((Words)((1.0f - t) / (1.0f + t)) | sign);
        const Floats z = x * x;
        Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
        p = p * z - 5.37397155531e-2f;
        p = p * z + 1.33314422036e-1f;
        p = p * z - 3.33332819422e-1f;
        x = size < near ? x + x * z * p : large;
    }

    // x = cap * tanh(scale * r / cap), without a cap scale * r; returns the sum of x.
    template <typename T>
    static INLINE double shape(const T* r, float* x, int64_t n, float scale, float cap) {
        Floats sum{}, v{};
        const float inverse = cap > 0.0f ? 1.0f / cap : 0.0f;
        double rest = 0.0;
        for (int64_t j = 0; j < n; j += LANES) {
            const bool whole = j + LANES <= n;
            if (whole) {
                load(v, r + j);
            } else {
                load_part(v, r + j, n - j);
            }
            v = v * scale;
            if (cap > 0.0f) {
                v = v * inverse;
                hyperbolic_tangent(v);
                v = v * cap;
            }
            if (whole) {
                store(x + j, v);
                sum = sum + v;
            } else {
                store_part(x + j, v, n - j);
                for (int64_t i = 0; i < n - j; ++i) rest += static_cast<double>(v[i]);
            }
        }
        for (int64_t i = 0; i < LANES; ++i) rest += static_cast<double>(sum[i]);
        return rest;
    }

    // (exp(x - m) * a - b) * scale * (1 - (x / cap)^2)
    template <typename T>
    static INLINE void derive(const float* x, T* gradient, int64_t n, float m, float a, float b, float scale,
                              float cap) {
        Floats v{}, shift{};
        fill(shift, m);
        const float inverse = cap > 0.0f ? 1.0f / cap : 0.0f;
        for (int64_t j = 0; j < n; j += LANES) {
            const bool whole = j + LANES <= n;
            if (whole) {
                load(v, x + j);
            } else {
                load_part(v, x + j, n - j);
            }
            Floats g = v - shift;
            exponential(g);
            g = g * a - b;
            if (cap > 0.0f) {
                v = v * inverse;
                g = g * (1.0f - v * v);
            }
            g = g * scale;
            if (whole) {
                store(gradient + j, g);
            } else {
                store_part(gradient + j, g, n - j);
            }
        }
    }
};

}  // namespace
}  // namespace velopath
