// In which order an epoch reads the rows of a domain: shuffled over the whole domain, or inside windows of few shards.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "draw.h"

namespace velopath {

// The rows of an epoch, [0, rows) of `row_tokens` tokens each, laid on a circular stream of `tokens` from `offset` on.
struct Epoch {
    u64 tokens, row_tokens, rows, offset;
};

// The bijection on [0, rows) that shuffles the shards, cuts that order into windows of `window` shards and shuffles the
// rows inside each window. A row belongs to the shard that it begins in, so that while a window is read at most `window`
// shards and those right behind them (where a last row ends) are touched. Bins are rows of one "token", their groups
// "shards", laid from 0 on: then a window touches the shards of its groups alone. Pure in its arguments; 32 bytes a shard.
class WindowedOrder {
public:
    // shards: where each begins in the stream, ascending from 0.
    WindowedOrder(const Epoch& epoch, const std::vector<u64>& shards, u64 window, u64 key) : epoch_(epoch), window_(window), key_(key) {
        const Bijection shuffled(shards.size(), bits(key, 0));
        parts_.reserve(shards.size());
        u64 before = 0;
        for (u64 i = 0; i < shards.size(); ++i) {
            const u64 j = shuffled(i), end = j + 1 < shards.size() ? shards[j + 1] : epoch.tokens;
            // The stream goes round once at most: a shard has rows from `offset` on and rows of the second lap.
            const u64 first = behind(shards[j]), first_end = behind(end);
            const u64 second = behind(shards[j] + epoch.tokens), second_end = behind(end + epoch.tokens);
            parts_.push_back({before, first, first_end - first, second});
            before += first_end - first + second_end - second;
        }
    }

    // The row that comes as the i-th of the epoch.
    u64 operator()(u64 i) const {
        const u64 w = index(0, parts_.size(), i) / window_;
        const u64 begin = w * window_, end = std::min<u64>(begin + window_, parts_.size());
        const u64 before = parts_[begin].before, rows = (end < parts_.size() ? parts_[end].before : epoch_.rows) - before;
        const u64 place = before + Bijection(rows, bits(key_, w + 1))(i - before);
        const Part& part = parts_[index(begin, end, place)];
        const u64 within = place - part.before;
        return within < part.first_rows ? part.first + within : part.second + (within - part.first_rows);
    }

private:
    struct Part {  // of a shard, in shuffled order
        u64 before;  // rows of the shards before it
        u64 first, first_rows, second;
    };

    // The first row that begins at or behind position p, where positions of the second lap go on from `tokens`.
    u64 behind(u64 p) const {
        if (p <= epoch_.offset) return 0;
        return std::min(epoch_.rows, (p - epoch_.offset + epoch_.row_tokens - 1) / epoch_.row_tokens);
    }

    // The part in [begin, end) that holds place i; of parts without rows none does.
    std::size_t index(u64 begin, u64 end, u64 i) const {
        const auto from = parts_.begin();
        const auto found = std::upper_bound(from + static_cast<std::ptrdiff_t>(begin), from + static_cast<std::ptrdiff_t>(end), i,
                                            [](u64 place, const Part& part) { return place < part.before; });
        return static_cast<std::size_t>(found - from) - 1;
    }

    Epoch epoch_;
    u64 window_, key_;
    std::vector<Part> parts_;
};

}  // namespace velopath
