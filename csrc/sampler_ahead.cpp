// What a sampler says of its plan, behind and ahead, and the release of steps whose shards are there.
#include <algorithm>
#include <utility>

#include "sampler.h"

namespace velopath {

std::vector<Mix> Sampler::mixes_at(u64 step) const {
    const Lock lock(mutex_);
    std::vector<Mix> result{mix_at(step)};
    for (const Mix& mix : mixes_)
        if (mix.from_step > step && mix.id > result.front().id) result.push_back(mix);
    return result;
}

u64 Sampler::oldest_mix() const {
    const Lock lock(mutex_);
    return mixes_.front().id;
}

Scouted Sampler::scout(std::optional<Cursor> from, u64 steps) const {
    Lock lock(mutex_);
    Scouted result;
    result.plan = plan_;
    Cursor cursor = from ? std::move(*from) : cursors_[handed_ - cursors_.front().step];
    const std::vector<Mix> mixes = mixes_;
    lock.unlock();
    result.first = cursor.step;
    std::vector<Row> rows;
    for (u64 i = 0; i < steps; ++i) {
        std::size_t m = mixes.size() - 1;
        while (m > 0 && mixes[m].from_step > cursor.step) --m;
        Cursor next = cursor;
        if (!planner_.draw(next, mixes[m].shares, rows)) break;
        cursor = std::move(next);
        auto& needed = result.shards.emplace_back();
        for (u64 r = settings_.rank * settings_.rows; r < (settings_.rank + 1) * settings_.rows; ++r) {
            const auto& [stream, packing] = sources_[rows[r].domain];
            if (!stream->attachable()) continue;
            const u64 at = planner_.place(rows[r]).position;
            for (const std::uint32_t shard : packing ? packing->shards_of(*stream, at) : stream->shards_of(at, settings_.row_tokens + 1))
                needed.emplace_back(rows[r].domain, shard);
        }
        std::sort(needed.begin(), needed.end());
        needed.erase(std::unique(needed.begin(), needed.end()), needed.end());
    }
    result.behind = std::move(cursor);
    return result;
}

bool Sampler::release(u64 until, u64 plan) {
    Lock lock(mutex_);
    if (plan != plan_ || !settings_.staged) return false;
    unreleased_ = nullptr;
    if (until <= released_) return true;
    released_ = until;
    lock.unlock();
    space_.notify_all();
    ready_.notify_all();
    return true;
}

void Sampler::fail(std::exception_ptr error, std::optional<u64> plan) {
    const Lock lock(mutex_);
    if (plan && *plan != plan_) return;
    unreleased_ = std::move(error);
    ready_.notify_all();
}

bool Sampler::waits() const {
    const Lock lock(mutex_);
    return handed_ >= released_;
}

u64 Sampler::released() const {
    const Lock lock(mutex_);
    return released_;
}

std::vector<std::vector<u64>> Sampler::count(u64 steps) const {
    Lock lock(mutex_);
    Cursor cursor = cursors_[handed_ - cursors_.front().step];
    const std::vector<Mix> mixes = mixes_;
    lock.unlock();
    std::vector<std::vector<u64>> result;
    std::vector<Row> rows;
    for (u64 i = 0; i < steps; ++i) {
        std::size_t m = mixes.size() - 1;
        while (m > 0 && mixes[m].from_step > cursor.step) --m;
        const std::vector<u64> before = cursor.drawn;
        if (!planner_.draw(cursor, mixes[m].shares, rows)) break;
        result.push_back(cursor.drawn);
        for (std::size_t k = 0; k < before.size(); ++k) result.back()[k] -= before[k];
    }
    return result;
}

std::vector<std::pair<Row, Place>> Sampler::rows_at(u64 step) const {
    Cursor cursor = cursor_at(step);
    const std::vector<u64> shares = mixes_at(step).front().shares;
    std::vector<Row> rows;
    std::vector<std::pair<Row, Place>> result;
    if (!planner_.draw(cursor, shares, rows)) return result;
    for (const Row& row : rows) result.emplace_back(row, planner_.place(row));
    return result;
}

std::vector<Exposure> Sampler::exposure() const {
    Lock lock(mutex_);
    const std::vector<u64> drawn = cursors_[handed_ - cursors_.front().step].drawn;
    lock.unlock();
    std::vector<Exposure> result;
    for (std::size_t k = 0; k < drawn.size(); ++k) {
        const u64 rows = planner_.epoch_rows(k), epochs = drawn[k] / rows, most = settings_.row_tokens;
        if (!sources_[k].packing) {
            result.push_back({drawn[k], drawn[k] * most, rows, std::min(drawn[k], rows) * most});
            continue;
        }
        const std::lock_guard<std::mutex> counting(counting_);
        const u64 labels = labels_drawn(k, drawn[k]), whole = counted_[k].epoch_labels;
        result.push_back({drawn[k], epochs * whole + labels, rows, epochs > 0 ? whole : labels});
    }
    return result;
}

// Labels of the bins drawn in the epoch that the drawn-th one lies in. Goes on from where it was asked last.
u64 Sampler::labels_drawn(std::size_t k, u64 drawn) const {
    const Packing& packing = *sources_[k].packing;
    const u64 rows = planner_.epoch_rows(k), begin = drawn / rows * rows;
    counted_.resize(sources_.size());
    Counted& counted = counted_[k];
    if (begin > 0 && counted.epoch_labels == 0)
        for (u64 b = 0; b < rows; ++b) counted.epoch_labels += packing.tokens(b) - 1;
    if (counted.until < begin || counted.until > drawn) counted.until = begin, counted.labels = 0;
    for (; counted.until < drawn; ++counted.until)
        counted.labels += packing.tokens(planner_.place({static_cast<std::uint32_t>(k), counted.until}).position) - 1;
    return counted.labels;
}

}  // namespace velopath
