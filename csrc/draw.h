// Pure drawing: counter-based random numbers, a bijection on [0, n), share rounding. Integers only, no state.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

namespace velopath {

using u64 = std::uint64_t;
using i64 = std::int64_t;
__extension__ typedef unsigned __int128 u128;  // GCC and Clang; -Wpedantic would refuse the bare name
__extension__ typedef __int128 i128;

constexpr u64 SHARE_ONE = u64{1} << 32;  // integer shares of a mix sum to this
constexpr u64 GOLDEN = 0x9E3779B97F4A7C15u;

// What a key is for: the same (seed, domain, epoch) must give unrelated numbers for different uses.
enum class Use : u64 { order = 1, offset = 2, shuffle = 3, window = 4 };

// One step of splitmix64 (Steele, Lea, Flood 2014; constants of Stafford's mix 13): a bijection on 64 bits.
inline u64 mix(u64 x) {
    x += GOLDEN;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

inline u64 make_key(Use use, u64 seed, u64 a, u64 b = 0) {
    return mix(mix(mix(mix(static_cast<u64>(use)) ^ seed) ^ a) ^ b);
}

// The i-th 64 random bits of a key, and a number in [0, n) from 64 bits (bias below n / 2^64).
inline u64 bits(u64 key, u64 i) { return mix(key + i * GOLDEN); }
inline u64 below(u64 random, u64 n) { return static_cast<u64>((static_cast<u128>(random) * n) >> 64); }

// A pseudo-random bijection on [0, n) for 1 <= n < 2^62 without a table.
//
// Eight rounds of a Feistel network on the grid left x right, with left = ceil(sqrt n) and right = ceil(n / left)
// (Black and Rogaway 2002): addition modulo the side instead of XOR, so that the grid is hardly larger than n and
// cycle walking (apply again while the result is >= n) hardly ever walks.
class Bijection {
public:
    Bijection(u64 n, u64 key) : n_(n) {
        left_ = static_cast<u64>(std::sqrt(static_cast<double>(n)));
        while (left_ * left_ < n) ++left_;  // sqrt of a rounded double may be off by one either way
        while (left_ > 1 && (left_ - 1) * (left_ - 1) >= n) --left_;
        right_ = (n + left_ - 1) / left_;
        for (std::size_t i = 0; i < keys_.size(); ++i) keys_[i] = bits(key, i);
    }

    u64 operator()(u64 x) const {
        do x = rounds(x);
        while (x >= n_);
        return x;
    }

private:
    static u64 add(u64 a, u64 b, u64 modulus) { return a + b < modulus ? a + b : a + b - modulus; }

    u64 rounds(u64 x) const {
        u64 l = x / right_, r = x % right_;
        for (std::size_t i = 0; i < keys_.size(); i += 2) {
            l = add(l, below(mix(keys_[i] ^ r), left_), left_);
            r = add(r, below(mix(keys_[i + 1] ^ l), right_), right_);
        }
        return l * right_ + r;
    }

    u64 n_, left_, right_;
    std::array<u64, 8> keys_;
};

// Shuffles items by the random numbers of key (Fisher and Yates).
template <class T>
void shuffle(std::vector<T>& items, u64 key) {
    for (u64 i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(bits(key, i), i)]);
}

// The domain that gets the next row, by Tijdeman's chairman assignment (1980), or K where every share is 0.
//
// error[k] = asked - given rows of domain k, times 2^32. It grows by the domain's share; among the domains with
// e_k >= 1/(2K-2) the one whose deadline (1 - 1/(2K-2) - e_k) / w_k comes first is given the row, ties to the lower
// index. From zero errors and under constant shares |e_k| <= 1 - 1/(2K-2) at every row. Errors carried over from
// other shares can leave no such domain: then the one with the largest error. A domain with share 0 is never given a row.
inline std::size_t give_row(const std::vector<u64>& shares, std::vector<i64>& error) {
    const std::size_t n = shares.size();
    const i64 one = static_cast<i64>(SHARE_ONE);
    const i64 scale = n > 1 ? 2 * static_cast<i64>(n) - 2 : 1;  // everything below is times 2K-2: no division
    std::size_t best = n, fullest = n;
    i64 best_slack = 0;
    for (std::size_t k = 0; k < n; ++k) {
        if (shares[k] == 0) continue;
        error[k] += static_cast<i64>(shares[k]);
        if (fullest == n || error[k] > error[fullest]) fullest = k;
        const i64 scaled = error[k] * scale;
        if (scaled < one) continue;
        const i64 slack = one * (scale - 1) - scaled;
        // slack_k / w_k < slack_best / w_best, exactly
        if (best == n || static_cast<i128>(slack) * static_cast<i128>(shares[best]) <
                             static_cast<i128>(best_slack) * static_cast<i128>(shares[k])) {
            best = k;
            best_slack = slack;
        }
    }
    if (best == n) best = fullest;
    if (best < n) error[best] -= one;
    return best;
}

// give_row for many rows in a row, with the same outcome: for many domains in O(log K) a row instead of O(K).
//
// While shares stay, a domain reaches e_k >= 1/(2K-2) at a row known beforehand, and from then on until it is given a row
// the order of deadlines among the domains does not change. So two heaps do: of those that wait for their row, and of those
// that are ready, by deadline. Where none is ready, which only errors carried over from other shares can cause, the
// domain with the largest error is looked for among all.
class RowGiver {
public:
    // settle() is to be called before anyone else looks at `error`.
    RowGiver(const std::vector<u64>& shares, std::vector<i64>& error, u64 rows) : shares_(shares), error_(error) {
        const std::size_t n = shares.size();
        if (n < 32 || rows < 16) return;
        scale_ = 2 * static_cast<i64>(n) - 2;
        for (std::size_t k = 0; k < n; ++k)
            if (shares[k] > 0) wait(k);
    }

    std::size_t next() {
        if (scale_ == 0) return give_row(shares_, error_);
        ++row_;
        const auto later = [this](std::size_t a, std::size_t b) { return comes_later(a, b); };
        while (!waiting_.empty() && waiting_.front().first <= row_) {
            std::pop_heap(waiting_.begin(), waiting_.end(), std::greater<>());
            ready_.push_back(waiting_.back().second);
            waiting_.pop_back();
            std::push_heap(ready_.begin(), ready_.end(), later);
        }
        std::size_t k = shares_.size();
        if (!ready_.empty()) {
            std::pop_heap(ready_.begin(), ready_.end(), later);
            k = ready_.back();
            ready_.pop_back();
        } else if (!waiting_.empty()) {
            const auto fullest = std::min_element(waiting_.begin(), waiting_.end(), [this](const Wait& a, const Wait& b) {
                const i64 x = now(a.second), y = now(b.second);
                return x != y ? x > y : a.second < b.second;
            });
            k = fullest->second;
            waiting_.erase(fullest);
            std::make_heap(waiting_.begin(), waiting_.end(), std::greater<>());
        }
        if (k == shares_.size()) return k;
        error_[k] -= ONE;
        wait(k);
        return k;
    }

    // Brings all errors to the rows given so far.
    void settle() {
        for (std::size_t k = 0; k < shares_.size(); ++k) error_[k] = now(k);
        row_ = 0;
        waiting_.clear();
        ready_.clear();
        scale_ = 0;
    }

private:
    using Wait = std::pair<i64, std::size_t>;  // the row at which a domain gets ready
    static constexpr i64 ONE = static_cast<i64>(SHARE_ONE);

    // error_[k] is kept as of row 0.
    i64 now(std::size_t k) const { return error_[k] + row_ * static_cast<i64>(shares_[k]); }
    i64 slack(std::size_t k) const { return ONE * (scale_ - 1) - error_[k] * scale_; }

    // Of two ready domains, whether a's deadline (2K-3 - (2K-2) e_a) / w_a comes after b's.
    bool comes_later(std::size_t a, std::size_t b) const {
        const i128 x = static_cast<i128>(slack(a)) * static_cast<i128>(shares_[b]);
        const i128 y = static_cast<i128>(slack(b)) * static_cast<i128>(shares_[a]);
        return x != y ? x > y : a > b;
    }

    void wait(std::size_t k) {
        const i64 least = (ONE + scale_ - 1) / scale_, missing = least - error_[k], share = static_cast<i64>(shares_[k]);
        waiting_.emplace_back(missing <= 0 ? 0 : (missing + share - 1) / share, k);
        std::push_heap(waiting_.begin(), waiting_.end(), std::greater<>());
    }

    const std::vector<u64>& shares_;
    std::vector<i64>& error_;
    i64 scale_ = 0;  // 2K-2; 0: row by row
    i64 row_ = 0;
    std::vector<Wait> waiting_;
    std::vector<std::size_t> ready_;
};

// Integer shares proportional to those of the live domains that sum to 2^32 (largest remainder, ties to the lower
// index); all 0 where no live domain has a share.
inline std::vector<u64> renormalise(const std::vector<u64>& shares, const std::vector<bool>& live) {
    std::vector<u64> result(shares.size(), 0), remainder(shares.size(), 0);
    u64 total = 0, given = 0;
    for (std::size_t k = 0; k < shares.size(); ++k) total += live[k] ? shares[k] : 0;
    if (total == 0) return result;
    for (std::size_t k = 0; k < shares.size(); ++k) {
        if (!live[k]) continue;
        const u128 exact = static_cast<u128>(shares[k]) * SHARE_ONE;
        result[k] = static_cast<u64>(exact / total);
        remainder[k] = static_cast<u64>(exact % total);
        given += result[k];
    }
    std::vector<std::size_t> largest(shares.size());
    std::iota(largest.begin(), largest.end(), std::size_t{0});
    std::stable_sort(largest.begin(), largest.end(), [&](std::size_t a, std::size_t b) { return remainder[a] > remainder[b]; });
    for (std::size_t i = 0; given < SHARE_ONE; ++given) ++result[largest[i++]];  // fewer are missing than have a remainder
    return result;
}

}  // namespace velopath
