// Steps handed out in order, assembled ahead by threads that know no Python, and planned again when the shares change.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "packing.h"
#include "planner.h"
#include "token_stream.h"

namespace velopath {

// Memory for rows x (row_tokens + 1) tokens, owned by the caller; as much for the others where boundaries are asked for.
struct Buffer {
    std::int32_t* tokens = nullptr;
    std::int32_t* documents = nullptr;
    std::int32_t* positions = nullptr;
};

// A domain's documents, and its bins where rows are bins.
struct Source {
    std::shared_ptr<const TokenStream> stream;
    std::shared_ptr<const Packing> packing;
};

struct Settings {
    u64 seed = 0;
    u64 rank = 0, world = 1;
    u64 rows = 0, row_tokens = 0;  // rows of this rank in a step; a row holds row_tokens + 1 tokens
    Exhaustion exhaustion = Exhaustion::repeat;
    u64 start_step = 0;
    u64 threads = 1;   // 0: next() assembles
    u64 prefetch = 8;  // steps ahead
    double stall_seconds = 5;
    u64 window = 0;  // shards (of bins: groups) of a window of the order, 0: the order is over the whole domain
    bool boundaries = false;
    std::int32_t padding = 0;  // token behind the documents of a bin
    bool staged = false;       // no step is planned before release() names it: its shards may have to be fetched first
};

// A step of this rank, its tokens in `buffer`.
struct Handed {
    Buffer* buffer = nullptr;
    u64 step = 0, weights_id = 0;
    std::vector<std::int32_t> domains;
    std::vector<std::int64_t> row_ids;
    std::vector<std::int32_t> counts;      // tokens of each row that are no padding
    std::vector<std::int32_t> cu_seqlens;  // where boundaries are asked for
};

// What was read of a domain: the tokens that are labels of a row, those of them that differ.
struct Exposure {
    u64 rows, tokens, epoch_rows, unique_tokens;
};

// Which shards this rank reads in the steps [first, first + shards.size()), of streams whose shards are attached, and the
// cursor behind them. `plan` changes with every push and load.
struct Scouted {
    u64 plan = 0, first = 0;
    std::vector<std::vector<std::pair<std::uint32_t, std::uint32_t>>> shards;  // (domain, shard) of each step, sorted
    Cursor behind;
};

class Sampler {
public:
    // The buffers are for the ring, `ring_size(settings)` of them.
    Sampler(std::vector<Source> sources, std::vector<u64> keys, const Settings& settings,
            std::vector<u64> shares, std::vector<Buffer*> buffers);
    ~Sampler();
    static u64 ring_size(const Settings& s) { return s.threads > 0 ? s.prefetch : 1; }

    // The next step, or nothing where the stream ends. `spare` goes into the ring for the buffer that comes out; when
    // this throws or returns nothing it stays the caller's. `poll` is called about every 100 ms of waiting and may throw.
    std::optional<Handed> next(Buffer* spare, const std::function<void()>& poll);

    // A push in two parts, so that it can be put on record before it has an effect: no step is handed out in between.
    // begin_push checks and returns the step and the id of the new mix.
    std::pair<u64, u64> begin_push(std::optional<u64> at_step);
    void commit_push(std::vector<u64> shares);
    void abort_push();

    u64 domain_count() const { return sources_.size(); }
    u64 step() const;                     // the next step
    Cursor cursor_at(u64 step) const;     // the state before a step: the next one, or one of the last KEPT handed out
    std::vector<Mix> mixes_at(u64 step) const;  // the mix in force for that step, then those pushed for later ones
    u64 oldest_mix() const;
    std::vector<std::vector<u64>> count(u64 steps) const;  // rows of each domain in the coming steps; the cursor stays

    std::vector<std::pair<Row, Place>> rows_at(u64 step) const;  // of all ranks; steps as for cursor_at
    std::vector<Exposure> exposure() const;  // before the next step; bins are counted one by one, from the last call on

    // Of a staged sampler. scout looks up to `steps` steps ahead from `from` on, or from the next step; fewer where the
    // stream ends. release lets the steps before `until` be planned, unless the plan is no longer `plan` (false), and takes
    // back what fail said: what next() throws while the next step is not released, unless the plan is no longer `plan`.
    Scouted scout(std::optional<Cursor> from, u64 steps) const;
    bool release(u64 until, u64 plan);
    void fail(std::exception_ptr error, std::optional<u64> plan);
    bool waits() const;  // for release: the next step is not released
    u64 released() const;  // the first step that is not

    // Continues at `cursor`; `mixes` as from mixes_at. Everything assembled is dropped.
    void load(Cursor cursor, std::vector<Mix> mixes);

    // Ends the threads; every later call throws. False where a thread hangs for stall_seconds (in storage that does not
    // answer): it is left behind, and this object and its buffers must stay in memory for it.
    bool close();

    static constexpr u64 KEPT = 64;

private:
    enum class State { empty, busy, ready, failed };
    struct Slot {
        State state = State::empty;
        Buffer* buffer = nullptr;
        bool stale = false;  // busy for nothing: its step is to be planned again
        Handed content;
        std::vector<Row> plan;
        std::exception_ptr error;
    };
    using Lock = std::unique_lock<std::mutex>;

    void work();
    bool can_plan();
    void run_ahead(Lock& lock, u64 most);
    void plan_one(Slot& slot);
    void assemble(Slot& slot) const;
    void mark(Slot& slot, std::size_t row, const std::vector<std::int32_t>& begins) const;
    void drop_from(u64 step);
    void wait_briefly(Lock& lock) const;
    void check_open() const;
    void open_gate(Lock& lock);
    void replan_from(u64 step);
    const Mix& mix_at(u64 step) const;
    u64 labels_drawn(std::size_t k, u64 drawn) const;
    Slot& slot_of(u64 step) { return slots_[step % slots_.size()]; }

    const std::vector<Source> sources_;
    const Settings settings_;
    const Planner planner_;

    mutable std::mutex mutex_;
    std::condition_variable space_;  // for workers: steps may be planned
    std::condition_variable ready_;  // for next(): a step is done, or the gate opened
    std::deque<Cursor> cursors_;     // before each kept step; the last one is where planning stands
    std::vector<Mix> mixes_;         // by from_step; the first is in force at the oldest kept step
    std::vector<Slot> slots_;        // step s lives in slot s mod size
    std::vector<Row> drawn_;         // global rows of the step being planned
    u64 handed_;                     // the next step to hand out
    u64 planned_;                    // the next step to plan
    std::atomic<u64> done_{0};       // steps assembled: to tell slow from stalled, and to look for one without the mutex
    bool ended_ = false;              // step planned_ cannot be filled
    bool gate_ = false;               // a push is between begin and commit
    bool stopping_ = false;
    u64 living_ = 0;                  // threads that have not ended
    u64 pushed_step_ = 0;
    u64 released_;                    // steps before it may be planned
    u64 plan_ = 0;                    // how often the plan was changed
    std::exception_ptr unreleased_;   // why the next step is not released
    std::exception_ptr fatal_;
    std::vector<std::thread> threads_;

    // Labels of the bins drawn in the epoch that `until` lies in, up to there; of all bins of an epoch, once that is asked.
    struct Counted {
        u64 until = 0, labels = 0, epoch_labels = 0;
    };
    mutable std::mutex counting_;
    mutable std::vector<Counted> counted_;  // of each domain
};

}  // namespace velopath
