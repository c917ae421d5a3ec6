// The sampler under every call at once, for the thread sanitizer: reader threads assemble, one thread pushes and takes
// back pushes, one asks for state, main reads steps and closes; where shards are fed, one attaches them, detaches them and
// releases steps. What was read must be what one thread reads that is told the same pushes beforehand.
// `tests/fuzz/sanitize.py` builds it:  push_race STEPS [SEED]
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "errors.h"
#include "packing.h"
#include "sampler.h"
#include "token_stream.h"

using namespace velopath;

namespace {

constexpr u64 ROWS = 4, ROW_TOKENS = 16, TOKENS = ROWS * (ROW_TOKENS + 1);

struct Push {
    u64 step;
    std::vector<u64> shares;
};

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "violated: %s\n", what);
    std::abort();
}

void put(std::string& out, u64 value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
}

// A shard of `documents` documents of 8 to 72 tokens, in memory.
ShardSpec shard(unsigned documents, unsigned salt) {
    std::string table, body;
    const u64 first = 4 + 4 * (documents + 1) + 2;
    put(table, documents, 4);
    for (unsigned d = 0; d < documents; ++d) {
        put(table, first + body.size(), 4);
        const u64 tokens = 8 + (d * 37 + salt) % 65;
        put(body, 2 + 2 * tokens, 4);
        put(body, 4, 1);
        put(body, tokens, 1);
        for (u64 t = 0; t < tokens; ++t) put(body, (d * 131 + t * 7 + salt) & 0xFFFF, 2);
    }
    put(table, first + body.size(), 4);
    const std::string content = table + "{}" + body;
    const int file = ::memfd_create("shard", 0);
    require(::write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()), "the shard is written");
    const std::string path = "/proc/self/fd/" + std::to_string(file);
    return {path, documents, content.size(), {"tokens"}, {-1}, 0, {false, Type::uint16, {}}};
}

// How rows are made: of joined documents in the order of whole domains or of windows, of bins, of shards that are fed, of
// bins of single shards that are fed.
enum class Kind { full, windowed, packed, fed, fed_packed };

bool is_fed(Kind kind) { return kind == Kind::fed || kind == Kind::fed_packed; }

struct Domains {
    std::vector<std::vector<ShardSpec>> shards;

    Domains() {
        for (const unsigned documents : {60u, 9u, 200u})
            shards.push_back({shard(documents, documents), shard(5, documents + 7), shard(3, documents + 9)});
    }

    std::vector<std::shared_ptr<TokenStream>> streams(bool fed) const {
        std::vector<std::shared_ptr<TokenStream>> result;
        for (const std::vector<ShardSpec>& specs : shards) {
            std::vector<u64> counts;
            for (const ShardSpec& spec : specs) counts.push_back(TokenStream({spec}, {}).tokens());
            result.push_back(fed ? std::make_shared<TokenStream>(specs, 0, counts) : std::make_shared<TokenStream>(specs, 0));
        }
        return result;
    }
};

// Bins of a domain whose shards are mapped: its documents one behind the other, cut where a bin is full or a shard ends.
std::shared_ptr<const Packing> bins_of(const TokenStream& stream) {
    struct Arrays {
        std::vector<u64> starts{0};
        std::vector<Piece> pieces;
    };
    auto arrays = std::make_shared<Arrays>();
    const auto lengths = stream.lengths();
    const auto shards = stream.shard_documents();
    std::vector<u64> groups;
    u64 room = ROW_TOKENS + 1;
    for (std::uint32_t d = 0; d < lengths.size(); ++d) {
        if (groups.size() < shards.size() && shards[groups.size()] == d) {
            if (d > 0) arrays->starts.push_back(arrays->pieces.size()), room = ROW_TOKENS + 1;
            groups.push_back(arrays->starts.size() - 1);
        }
        for (std::uint32_t first = 0; first < lengths[d];) {
            if (room == 0) arrays->starts.push_back(arrays->pieces.size()), room = ROW_TOKENS + 1;
            const auto take = static_cast<std::uint32_t>(std::min<u64>(room, lengths[d] - first));
            arrays->pieces.push_back({d, first, take});
            first += take, room -= take;
        }
    }
    arrays->starts.push_back(arrays->pieces.size());
    return std::make_shared<const Packing>(arrays->starts.data(), arrays->starts.size() - 1, arrays->pieces.data(), arrays->pieces.size(),
                                           ROW_TOKENS + 1, groups, "bins", arrays);
}

struct Reader {  // a sampler with its buffers
    std::vector<std::vector<std::int32_t>> memory;
    std::vector<Buffer> buffers;
    Buffer* spare;
    std::unique_ptr<Sampler> sampler;

    // The order of fed shards is windowed; documents are marked in all but the first kind.
    Reader(const Domains& domains, const std::vector<std::shared_ptr<TokenStream>>& streams, u64 threads, Kind kind) {
        Settings settings;
        settings.window = kind == Kind::windowed || is_fed(kind) ? 1 : 0;
        settings.boundaries = kind != Kind::full;
        settings.staged = streams[0]->attachable();
        settings.seed = 5, settings.rows = ROWS, settings.row_tokens = ROW_TOKENS, settings.threads = threads, settings.prefetch = 8;
        const u64 ring = Sampler::ring_size(settings);
        memory.assign(3 * (ring + 1), std::vector<std::int32_t>(TOKENS));
        buffers.resize(ring + 1);
        std::vector<Buffer*> free;
        for (u64 i = 0; i <= ring; ++i) {
            buffers[i] = {memory[3 * i].data(), memory[3 * i + 1].data(), memory[3 * i + 2].data()};
            free.push_back(&buffers[i]);
        }
        spare = free.back();
        free.pop_back();
        const std::vector<u64> shares{u64{1} << 31, u64{1} << 30, u64{1} << 30};
        std::vector<Source> sources;
        for (std::size_t k = 0; k < streams.size(); ++k)
            sources.push_back({streams[k], kind == Kind::packed || kind == Kind::fed_packed ? bins_of(TokenStream(domains.shards[k], 0)) : nullptr});
        sampler.reset(new Sampler(std::move(sources), {11, 22, 33}, settings, shares, std::move(free)));
    }

    // Hash of the next step: what was read of which domain under which weights.
    u64 next() {
        std::optional<Handed> handed;
        for (bool failed = true; failed;) {
            try {
                handed = sampler->next(spare, [] {});
                failed = false;
            } catch (const DataError&) {  // a fetch that failed and comes later
            }
        }
        require(handed.has_value(), "a stream that repeats goes on");
        u64 hash = handed->step * 31 + handed->weights_id;
        const auto add = [&hash](u64 value) { hash = (hash ^ value) * 0x100000001B3; };
        for (const std::int32_t d : handed->domains) add(static_cast<u64>(d));
        for (const std::int64_t id : handed->row_ids) add(static_cast<u64>(id));
        for (const std::int32_t count : handed->counts) add(static_cast<u64>(count));
        for (const std::int32_t bound : handed->cu_seqlens) add(static_cast<u64>(bound));
        for (u64 i = 0; i < TOKENS; ++i) {
            add(static_cast<u64>(handed->buffer->tokens[i]));
            add(static_cast<u64>(handed->buffer->documents[i]));
            add(static_cast<u64>(handed->buffer->positions[i]));
        }
        spare = handed->buffer;
        return hash;
    }
};

void push_at_random(Sampler& sampler, u64 seed, const std::atomic<bool>& done, std::vector<Push>& pushed) {
    u64 state = seed;
    const auto random = [&state](u64 below) {
        state = state * 6364136223846793005 + 1442695040888963407;
        return (state >> 33) % below;
    };
    while (!done) {
        try {
            const auto [step, id] = sampler.begin_push(random(2) ? std::nullopt : std::optional<u64>(sampler.step() + random(6)));
            if (random(8) == 0) {
                sampler.abort_push();
                continue;
            }
            const u64 first = random(u64{1} << 31), second = random(u64{1} << 31);
            pushed.push_back({step, {first, second, (u64{1} << 32) - first - second}});
            require(id == pushed.size(), "ids follow one another");
            sampler.commit_push(pushed.back().shares);
        } catch (const PushRejectedError&) {
        }
        std::this_thread::yield();
    }
}

void ask_at_random(const Sampler& sampler, const std::atomic<bool>& done) {
    while (!done) {
        try {
            const u64 step = sampler.step();
            const Cursor cursor = sampler.cursor_at(step);
            u64 drawn = 0;
            for (const u64 rows : cursor.drawn) drawn += rows;
            require(drawn == step * ROWS, "the rows drawn are those of the steps before");
            require(!sampler.mixes_at(step).empty() && sampler.count(3).size() == 3, "a mix is in force");
            static_cast<void>(sampler.oldest_mix());
        } catch (const ConfigError&) {  // the step was long ago by then
        }
        std::this_thread::yield();
    }
}

// Attaches what the next few steps need and nothing else, and now and then says that a fetch failed.
void feed(Sampler& sampler, const Domains& domains, const std::vector<std::shared_ptr<TokenStream>>& streams,
          const std::atomic<bool>& done) {
    std::set<std::pair<std::uint32_t, std::uint32_t>> attached;
    for (u64 turn = 0; !done; ++turn) {
        const Scouted seen = sampler.scout({}, 5);  // as far each time: what was released stays in sight
        std::set<std::pair<std::uint32_t, std::uint32_t>> needed;
        for (const auto& step : seen.shards) needed.insert(step.begin(), step.end());
        for (auto shard = attached.begin(); shard != attached.end();) {
            if (needed.count(*shard) == 0) streams[shard->first]->detach(shard->second), shard = attached.erase(shard);
            else ++shard;
        }
        for (const auto& [k, s] : needed)
            if (attached.insert({k, s}).second) streams[k]->attach(s, domains.shards[k][s].path);
        if (turn % 50 == 0) sampler.fail(std::make_exception_ptr(DataError("a fetch failed", "shard")), seen.plan);
        static_cast<void>(sampler.release(seen.first + 1 + turn % seen.shards.size(), seen.plan));
        std::this_thread::yield();
    }
}

// Pushes that took effect in `steps` steps.
std::size_t race(u64 steps, u64 seed, Kind kind) {
    const Domains domains;
    const auto streams = domains.streams(is_fed(kind));
    std::vector<Push> pushed;
    std::vector<u64> read;
    {
        Reader reader(domains, streams, 3, kind);
        std::atomic<bool> done{false}, closed{false};
        std::thread feeder([&] {
            if (is_fed(kind)) feed(*reader.sampler, domains, streams, closed);
        });
        std::thread pusher([&] { push_at_random(*reader.sampler, seed, done, pushed); });
        std::thread asker([&] { ask_at_random(*reader.sampler, done); });
        for (u64 s = 0; s < steps; ++s) read.push_back(reader.next());
        done = true;
        pusher.join();
        asker.join();
        const u64 step = reader.sampler->step();
        reader.sampler->load(reader.sampler->cursor_at(step), reader.sampler->mixes_at(step));
        std::thread closer([&] { reader.sampler->close(); });
        try {
            while (true) static_cast<void>(reader.next());
        } catch (const VelopathError&) {
        }
        closer.join();
        closed = true;
        feeder.join();
    }
    Reader alone(domains, domains.streams(false), 0, kind);
    for (const Push& push : pushed) {
        static_cast<void>(alone.sampler->begin_push(push.step));
        alone.sampler->commit_push(push.shares);
    }
    for (u64 s = 0; s < steps; ++s) require(read[s] == alone.next(), "threads read what one reads alone");
    return pushed.size();
}

}  // namespace

int main(int count, char** arguments) {
    const u64 steps = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 2000;
    const u64 seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
    std::size_t pushes = 0;
    for (const Kind kind : {Kind::full, Kind::windowed, Kind::packed, Kind::fed, Kind::fed_packed}) pushes += race(steps / 5, seed, kind);
    std::printf("%llu steps, %zu pushes, no finding\n", static_cast<unsigned long long>(steps), pushes);
}
