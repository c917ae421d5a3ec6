// What a step reads: a pure function of seed, shares and cursor, the same on every rank.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "draw.h"
#include "order.h"

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
    u64 key = 0;          // of its name: its rows do not depend on which other domains there are
    u64 tokens = 0;       // of its circular stream
    u64 rows = 0;         // of an epoch; 0: floor(tokens / row_tokens)
    bool packed = false;  // rows are bins, not parts of the stream
    std::vector<u64> shards = {};  // where each begins in the stream; of bins: where each group of shards begins in them
};

// The number-th row drawn of a domain, counting through all epochs.
struct Row {
    std::uint32_t domain;
    u64 number;
};

// Where a row begins in its domain's stream (its bin, where rows are bins), and epoch * rows per epoch + its place before
// shuffling: what was read.
struct Place {
    u64 position;
    u64 id;
};

class Planner {
public:
    // window: shards (of bins: groups) of a window of the order, 0 for the order over the whole domain.
    Planner(std::vector<Domain> domains, u64 seed, u64 global_rows, u64 row_tokens, Exhaustion exhaustion, u64 window = 0)
        : domains_(std::move(domains)), seed_(seed), global_rows_(global_rows), row_tokens_(row_tokens), exhaustion_(exhaustion),
          window_(window), windowed_(domains_.size()) {
        for (Domain& domain : domains_)
            if (domain.rows == 0) domain.rows = domain.tokens / row_tokens;
    }

    u64 epoch_rows(std::size_t k) const { return domains_[k].rows; }

    // Draws the global rows of step cursor.step in batch order and moves the cursor behind it. False, and the cursor is
    // not to be used, where the step cannot be filled.
    bool draw(Cursor& cursor, const std::vector<u64>& shares, std::vector<Row>& rows) const {
        rows.clear();
        const bool repeat = exhaustion_ == Exhaustion::repeat;
        std::vector<u64> now = exhaustion_ == Exhaustion::renormalise ? of_live(shares, cursor) : shares;
        std::optional<RowGiver> giver(std::in_place, now, cursor.error, global_rows_);
        while (rows.size() < global_rows_) {
            const std::size_t k = giver->next();
            if (k == now.size() || (!repeat && cursor.drawn[k] >= epoch_rows(k))) return false;
            rows.push_back({static_cast<std::uint32_t>(k), cursor.drawn[k]++});
            if (exhaustion_ == Exhaustion::renormalise && cursor.drawn[k] == epoch_rows(k)) {
                giver->settle();
                now = of_live(shares, cursor);
                giver.emplace(now, cursor.error, global_rows_ - rows.size());
            }
        }
        giver->settle();
        shuffle(rows, make_key(Use::shuffle, seed_, cursor.step));
        ++cursor.step;
        return true;
    }

    // An epoch is floor(tokens / row_tokens) rows of the stream from a drawn offset on, or every bin, in the order of a
    // bijection.
    Place place(const Row& row) const {
        const Domain& domain = domains_[row.domain];
        const u64 rows = epoch_rows(row.domain), epoch = row.number / rows;
        const u64 offset = below(make_key(Use::offset, seed_, domain.key, epoch), domain.tokens);
        const u64 number = window_ > 0 ? (*windowed(row.domain, epoch, offset))(row.number % rows)
                                       : Bijection(rows, make_key(Use::order, seed_, domain.key, epoch))(row.number % rows);
        if (domain.packed) return {number, epoch * rows + number};
        return {(offset + number * row_tokens_) % domain.tokens, epoch * rows + number};
    }

private:
    struct Kept {
        u64 epoch = 0;
        std::shared_ptr<const WindowedOrder> order;
    };

    // Made when an epoch is first read. Two epochs are kept, for steps ahead and steps planned again.
    std::shared_ptr<const WindowedOrder> windowed(std::size_t k, u64 epoch, u64 offset) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        Kept& kept = windowed_[k][epoch % 2];
        if (!kept.order || kept.epoch != epoch) {
            const Domain& domain = domains_[k];
            // Bins are a stream of themselves: each a row of one, which begins in its group.
            const Epoch laid = domain.packed ? Epoch{domain.rows, 1, domain.rows, 0} : Epoch{domain.tokens, row_tokens_, domain.rows, offset};
            kept = {epoch, std::make_shared<const WindowedOrder>(laid, domain.shards, window_, make_key(Use::window, seed_, domain.key, epoch))};
        }
        return kept.order;
    }

    std::vector<u64> of_live(const std::vector<u64>& shares, const Cursor& cursor) const {
        std::vector<bool> live(shares.size());
        for (std::size_t k = 0; k < live.size(); ++k) live[k] = cursor.drawn[k] < epoch_rows(k);
        return renormalise(shares, live);
    }

    std::vector<Domain> domains_;
    u64 seed_, global_rows_, row_tokens_;
    Exhaustion exhaustion_;
    u64 window_;
    mutable std::mutex mutex_;
    mutable std::vector<std::array<Kept, 2>> windowed_;
};

}  // namespace velopath
