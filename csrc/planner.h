// What a step reads: a pure function of seed, shares and cursor, the same on every rank.
#pragma once

#include <cstdint>
#include <vector>

#include "draw.h"

namespace velopath {

// What happens when a domain has been read once: read it again in a new order, leave it out and share its part
// among the others, or end the stream before the first step that would need more of it.
enum class Exhaustion { repeat, renormalise, stop };

// Shares (summing to 2^32) in force from a step on.
struct Mix {
    std::uint64_t id = 0;
    std::uint64_t from_step = 0;
    std::vector<u64> shares;
};

// State before a step: rows drawn of every domain, and asked - given rows times 2^32. The errors sum to 0.
struct Cursor {
    std::uint64_t step = 0;
    std::vector<u64> drawn;
    std::vector<i64> error;
};

struct Domain {
    u64 key = 0;     // of its name: its rows do not depend on which other domains there are
    u64 tokens = 0;  // of its circular stream
};

// The number-th row drawn of a domain, counting through all epochs.
struct Row {
    std::uint32_t domain;
    u64 number;
};

// Where a row begins in its domain's stream, and epoch * rows per epoch + its place before shuffling: what was read.
struct Place {
    u64 position;
    u64 id;
};

class Planner {
public:
    Planner(std::vector<Domain> domains, u64 seed, u64 global_rows, u64 row_tokens, Exhaustion exhaustion)
        : domains_(std::move(domains)), seed_(seed), global_rows_(global_rows), row_tokens_(row_tokens), exhaustion_(exhaustion) {}

    u64 epoch_rows(std::size_t k) const { return domains_[k].tokens / row_tokens_; }

    // Draws the global rows of step cursor.step in batch order and moves the cursor behind it. False, and the cursor is
    // not to be used, where the step cannot be filled.
    bool draw(Cursor& cursor, const std::vector<u64>& shares, std::vector<Row>& rows) const {
        rows.clear();
        const bool repeat = exhaustion_ == Exhaustion::repeat;
        std::vector<u64> now = exhaustion_ == Exhaustion::renormalise ? of_live(shares, cursor) : shares;
        while (rows.size() < global_rows_) {
            const std::size_t k = give_row(now, cursor.error);
            if (k == now.size() || (!repeat && cursor.drawn[k] >= epoch_rows(k))) return false;
            rows.push_back({static_cast<std::uint32_t>(k), cursor.drawn[k]++});
            if (exhaustion_ == Exhaustion::renormalise && cursor.drawn[k] == epoch_rows(k)) now = of_live(shares, cursor);
        }
        shuffle(rows, make_key(Use::shuffle, seed_, cursor.step));
        ++cursor.step;
        return true;
    }

    // An epoch is floor(tokens / row_tokens) rows of the stream from a drawn offset on, in the order of a bijection.
    Place place(const Row& row) const {
        const Domain& domain = domains_[row.domain];
        const u64 rows = epoch_rows(row.domain), epoch = row.number / rows;
        const u64 number = Bijection(rows, make_key(Use::order, seed_, domain.key, epoch))(row.number % rows);
        const u64 offset = below(make_key(Use::offset, seed_, domain.key, epoch), domain.tokens);
        return {(offset + number * row_tokens_) % domain.tokens, epoch * rows + number};
    }

private:
    std::vector<u64> of_live(const std::vector<u64>& shares, const Cursor& cursor) const {
        std::vector<bool> live(shares.size());
        for (std::size_t k = 0; k < live.size(); ++k) live[k] = cursor.drawn[k] < epoch_rows(k);
        return renormalise(shares, live);
    }

    std::vector<Domain> domains_;
    u64 seed_, global_rows_, row_tokens_;
    Exhaustion exhaustion_;
};

}  // namespace velopath
