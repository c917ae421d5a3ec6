#include "sampler.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "errors.h"

namespace velopath {

namespace {

std::vector<Domain> describe(const std::vector<Source>& sources, const std::vector<u64>& keys) {
    std::vector<Domain> domains;
    for (std::size_t k = 0; k < sources.size(); ++k) {
        const auto& [stream, packing] = sources[k];
        const u64 rows = packing ? packing->bins() : 0;
        domains.push_back({keys.at(k), stream->tokens(), rows, packing != nullptr, packing ? packing->groups() : stream->shard_positions()});
    }
    return domains;
}

}  // namespace

Sampler::Sampler(std::vector<Source> sources, std::vector<u64> keys, const Settings& settings, std::vector<u64> shares,
                 std::vector<Buffer*> buffers)
    : sources_(std::move(sources)), settings_(settings),
      planner_(describe(sources_, keys), settings.seed, settings.rows * settings.world, settings.row_tokens,
               settings.exhaustion, settings.window),
      slots_(ring_size(settings)), handed_(settings.start_step), planned_(settings.start_step),
      released_(settings.staged ? settings.start_step : ~u64{0}) {
    for (std::size_t k = 0; k < sources_.size(); ++k)
        if (planner_.epoch_rows(k) == 0) throw ConfigError("a domain has fewer tokens than a row");
    for (const Source& source : sources_)
        if (settings.window > 0 && source.packing && source.packing->groups().empty())
            throw ConfigError("bins that reach over all shards have no order in windows; group them");
    for (std::size_t i = 0; i < slots_.size(); ++i) slots_[i].buffer = buffers.at(i);
    cursors_.push_back({settings.start_step, std::vector<u64>(sources_.size(), 0), std::vector<i64>(sources_.size(), 0)});
    mixes_.push_back({0, settings.start_step, std::move(shares)});
    const Lock lock(mutex_);
    for (u64 i = 0; i < settings.threads; ++i, ++living_) threads_.emplace_back([this] { work(); });
}

Sampler::~Sampler() { close(); }

bool Sampler::close() {
    Lock lock(mutex_);
    stopping_ = true;
    space_.notify_all();
    ready_.notify_all();
    if (threads_.empty()) return living_ == 0;
    const bool ended = ready_.wait_for(lock, std::chrono::duration<double>(settings_.stall_seconds), [this] { return living_ == 0; });
    std::vector<std::thread> threads;
    threads.swap(threads_);
    lock.unlock();
    for (std::thread& thread : threads) {
        if (ended) thread.join();
        else thread.detach();
    }
    return ended;
}

void Sampler::check_open() const {
    if (stopping_) throw VelopathError("the sampler is closed");
    if (fatal_) std::rethrow_exception(fatal_);
}

// ---- planning and assembling: called with the mutex held

const Mix& Sampler::mix_at(u64 step) const {
    std::size_t i = mixes_.size() - 1;
    while (i > 0 && mixes_[i].from_step > step) --i;
    return mixes_[i];
}

bool Sampler::can_plan() {
    return !ended_ && planned_ < released_ && planned_ < handed_ + slots_.size() && slot_of(planned_).state == State::empty;
}

void Sampler::plan_one(Slot& slot) {
    Cursor cursor = cursors_.back();
    const Mix& mix = mix_at(planned_);
    if (!planner_.draw(cursor, mix.shares, drawn_)) {
        ended_ = true;
        ready_.notify_all();
        return;
    }
    const auto begin = drawn_.begin() + static_cast<std::ptrdiff_t>(settings_.rank * settings_.rows);
    slot.plan.assign(begin, begin + static_cast<std::ptrdiff_t>(settings_.rows));
    slot.content.step = planned_++;
    slot.content.weights_id = mix.id;
    slot.state = State::busy;
    slot.stale = false;
    slot.error = nullptr;
    cursors_.push_back(std::move(cursor));
}

void Sampler::assemble(Slot& slot) const {
    slot.content.domains.resize(slot.plan.size());
    slot.content.row_ids.resize(slot.plan.size());
    slot.content.counts.assign(slot.plan.size(), static_cast<std::int32_t>(settings_.row_tokens + 1));
    slot.content.cu_seqlens.clear();
    std::vector<std::int32_t> places;
    std::vector<std::int32_t>* const begins = settings_.boundaries ? &places : nullptr;
    std::int32_t* out = slot.buffer->tokens;
    for (std::size_t r = 0; r < slot.plan.size(); ++r, out += settings_.row_tokens + 1) {
        const Place place = planner_.place(slot.plan[r]);
        const auto& [stream, packing] = sources_[slot.plan[r].domain];
        places.clear();
        if (packing)
            slot.content.counts[r] = static_cast<std::int32_t>(packing->read(*stream, place.position, settings_.padding, out, begins));
        else
            stream->read(place.position, settings_.row_tokens + 1, out, begins);
        if (begins != nullptr) mark(slot, r, places);
        slot.content.domains[r] = static_cast<std::int32_t>(slot.plan[r].domain);
        slot.content.row_ids[r] = static_cast<std::int64_t>(place.id);
    }
}

// Documents, positions and sequences of a row whose documents begin at `begins`. Padding is a sequence of document -1.
void Sampler::mark(Slot& slot, std::size_t row, const std::vector<std::int32_t>& begins) const {
    const auto width = static_cast<std::int32_t>(settings_.row_tokens + 1), filled = slot.content.counts[row];
    std::int32_t* const documents = slot.buffer->documents + row * static_cast<std::size_t>(width);
    std::int32_t* const positions = slot.buffer->positions + row * static_cast<std::size_t>(width);
    std::vector<std::int32_t>& sequences = slot.content.cu_seqlens;
    const std::int32_t first = static_cast<std::int32_t>(row) * (width - 1);
    const auto sequence = [&](std::int32_t begin, std::int32_t end, std::int32_t document) {
        for (std::int32_t i = begin; i < end; ++i) documents[i] = document;
        for (std::int32_t i = begin; i < end; ++i) positions[i] = i - begin;
        if (begin < width - 1 && begin < end) sequences.push_back(first + begin);  // of inputs: without the last token
    };
    for (std::size_t i = 0; i < begins.size(); ++i)
        sequence(begins[i], i + 1 < begins.size() ? begins[i + 1] : filled, static_cast<std::int32_t>(i));
    sequence(filled, width, -1);
    if (row + 1 == slot.plan.size()) sequences.push_back(first + width - 1);
}

// Plans up to `most` steps and assembles them one by one, without the mutex. Several steps for one wake-up: a thread's
// wake-up takes about as long as assembling one.
void Sampler::run_ahead(Lock& lock, u64 most) {
    const u64 first = planned_;
    while (planned_ < first + most && can_plan()) plan_one(slot_of(planned_));
    const u64 behind = planned_;
    bool freed = false;
    for (u64 step = first; step < behind; ++step) {
        Slot& slot = slot_of(step);  // busy, so nobody else uses it, whatever happens to planned_
        if (!slot.stale && !stopping_) {
            lock.unlock();
            try {
                assemble(slot);
            } catch (...) {
                slot.error = std::current_exception();
            }
            lock.lock();
        }
        slot.state = slot.stale ? State::empty : slot.error ? State::failed : State::ready;
        freed = freed || slot.stale;
        ++done_;
        ready_.notify_all();
    }
    if (freed) space_.notify_all();
}

void Sampler::work() {
    Lock lock(mutex_);
    try {
        while (!stopping_) {
            run_ahead(lock, std::max<u64>(1, slots_.size() / (2 * settings_.threads)));
            space_.wait(lock, [this] { return stopping_ || can_plan(); });
        }
    } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        fatal_ = std::current_exception();
    }
    --living_;
    ready_.notify_all();
}

// Drops what is planned or assembled for `step` and later ones; a worker in the midst of one frees its slot itself.
void Sampler::drop_from(u64 step) {
    for (Slot& slot : slots_) {
        if (slot.state == State::empty || slot.content.step < step) continue;
        if (slot.state == State::busy) slot.stale = true;
        else slot.state = State::empty;
    }
    ended_ = false;
}

// ---- the caller's side

// A step takes tens of microseconds and so does going to sleep and being woken: first look whether one is done soon.
void Sampler::wait_briefly(Lock& lock) const {
    const u64 done = done_.load();
    lock.unlock();
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    while (done_.load() == done && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    lock.lock();
}

std::optional<Handed> Sampler::next(Buffer* spare, const std::function<void()>& poll) {
    using Clock = std::chrono::steady_clock;
    constexpr auto SLICE = std::chrono::milliseconds(100);
    Lock lock(mutex_);
    u64 done = done_;
    bool waited_briefly = false;
    double waited = 0;  // for a thread to finish a step; a wait in which this process was frozen counts as a slice
    auto begin = Clock::now(), polled = begin;
    while (true) {
        check_open();
        Slot& slot = slot_of(handed_);
        const bool here = handed_ < planned_ && !gate_;
        if (here && slot.state == State::failed) std::rethrow_exception(slot.error);
        if (here && slot.state == State::ready) break;
        if (ended_ && planned_ == handed_ && !gate_) return std::nullopt;
        const bool held = handed_ >= released_;
        if (held && unreleased_) std::rethrow_exception(unreleased_);
        if (settings_.threads == 0 && !gate_ && can_plan()) {
            run_ahead(lock, 1);
            continue;
        }
        space_.notify_one();
        if (!waited_briefly && !gate_) {
            wait_briefly(lock);
            waited_briefly = true;
            continue;
        }
        ready_.wait_for(lock, SLICE);
        const auto now = Clock::now();
        waited += std::min(std::chrono::duration<double>(now - begin).count(), 2 * std::chrono::duration<double>(SLICE).count());
        begin = now;
        if (done_ != done || held) done = done_, waited = 0;  // who releases steps watches over its own delays
        if (waited > settings_.stall_seconds)
            throw VelopathError("no reader thread finished a step for " + std::to_string(waited) + " s while waiting for step " +
                                std::to_string(handed_) + "; is the storage hanging? Calling next again goes on waiting");
        if (now - polled < SLICE) continue;
        lock.unlock();
        poll();
        lock.lock();
        polled = now;
    }
    Slot& slot = slot_of(handed_);
    Handed handed = slot.content;
    handed.buffer = std::exchange(slot.buffer, spare);
    slot.state = State::empty;
    ++handed_;
    while (cursors_.front().step + KEPT < handed_) cursors_.pop_front();
    while (mixes_.size() > 1 && mixes_[1].from_step <= cursors_.front().step) mixes_.erase(mixes_.begin());
    if (settings_.threads > 0 && 2 * (planned_ - handed_) <= slots_.size()) space_.notify_one();
    return handed;
}

// What was scouted of `step` and later ones no longer holds.
void Sampler::replan_from(u64 step) {
    ++plan_;
    unreleased_ = nullptr;
    if (settings_.staged) released_ = std::min(released_, step);
}

void Sampler::open_gate(Lock& lock) {
    gate_ = false;
    lock.unlock();  // first: a thread woken while the mutex is held sleeps again
    space_.notify_all();
    ready_.notify_all();
}

std::pair<u64, u64> Sampler::begin_push(std::optional<u64> at_step) {
    Lock lock(mutex_);
    check_open();
    if (gate_) throw PushRejectedError("another push is being recorded");
    const u64 step = at_step.value_or(handed_);
    const Mix& last = mixes_.back();
    const std::string at = "push for step " + std::to_string(step);
    if (step < handed_)
        throw PushRejectedError(at + " is late: the next step not handed out is " + std::to_string(handed_));
    if (last.id > 0 && step == last.from_step)
        throw PushRejectedError(at + " is a duplicate: weights " + std::to_string(last.id) + " take effect at that step");
    if (last.id > 0 && step < last.from_step)
        throw PushRejectedError(at + " is out of order: weights " + std::to_string(last.id) + " are pushed for step " +
                                std::to_string(last.from_step));
    gate_ = true;
    pushed_step_ = step;
    return {step, last.id + 1};
}

void Sampler::commit_push(std::vector<u64> shares) {
    Lock lock(mutex_);
    mixes_.push_back({mixes_.back().id + 1, pushed_step_, std::move(shares)});
    if (pushed_step_ <= planned_) {
        drop_from(pushed_step_);
        while (cursors_.back().step > pushed_step_) cursors_.pop_back();
        planned_ = pushed_step_;
    }
    replan_from(pushed_step_);
    open_gate(lock);
}

void Sampler::abort_push() {
    Lock lock(mutex_);
    open_gate(lock);
}

u64 Sampler::step() const {
    const Lock lock(mutex_);
    return handed_;
}

Cursor Sampler::cursor_at(u64 step) const {
    const Lock lock(mutex_);
    if (step > handed_)
        throw ConfigError("step " + std::to_string(step) + " is not reached; the next one is " + std::to_string(handed_));
    if (step < cursors_.front().step)
        throw ConfigError("the state before step " + std::to_string(step) + " is not kept; the oldest one is that before step " +
                          std::to_string(cursors_.front().step));
    return cursors_[step - cursors_.front().step];
}

void Sampler::load(Cursor cursor, std::vector<Mix> mixes) {
    Lock lock(mutex_);
    check_open();
    if (gate_) throw ConfigError("a push is being recorded");
    drop_from(0);
    handed_ = planned_ = cursor.step;
    cursors_.assign(1, std::move(cursor));
    mixes_ = std::move(mixes);
    replan_from(handed_);
    open_gate(lock);
}

}  // namespace velopath
