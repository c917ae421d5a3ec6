// The sampler under every call at once, for the thread sanitizer: reader threads assemble, one thread pushes and takes
// back pushes, one asks for state, main reads steps and closes. What was read must be what one thread reads that is
// told the same pushes beforehand. `tests/fuzz/sanitize.py` builds it:  push_race STEPS [SEED]
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "errors.h"
#include "sampler.h"
#include "token_stream.h"

using namespace velopath;

namespace {

constexpr u64 ROWS = 4, ROW_TOKENS = 16;

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

std::shared_ptr<const TokenStream> domain(unsigned documents, unsigned salt) {
    return std::make_shared<const TokenStream>(std::vector<ShardSpec>{shard(documents, salt), shard(5, salt + 7), shard(3, salt + 9)}, 0);
}

struct Reader {  // a sampler with its buffers
    std::vector<std::vector<std::int32_t>> memory;
    std::vector<Buffer> buffers;
    Buffer* spare;
    std::unique_ptr<Sampler> sampler;

    Reader(const std::vector<std::shared_ptr<const TokenStream>>& streams, u64 threads, u64 window) {
        Settings settings;
        settings.window = window;
        settings.seed = 5, settings.rows = ROWS, settings.row_tokens = ROW_TOKENS, settings.threads = threads, settings.prefetch = 8;
        const u64 ring = Sampler::ring_size(settings);
        memory.assign(ring + 1, std::vector<std::int32_t>(ROWS * (ROW_TOKENS + 1)));
        buffers.resize(ring + 1);
        std::vector<Buffer*> free;
        for (u64 i = 0; i <= ring; ++i) buffers[i].tokens = memory[i].data(), free.push_back(&buffers[i]);
        spare = free.back();
        free.pop_back();
        const std::vector<u64> shares{u64{1} << 31, u64{1} << 30, u64{1} << 30};
        sampler.reset(new Sampler({{streams[0]}, {streams[1]}, {streams[2]}}, {11, 22, 33}, settings, shares, std::move(free)));
    }

    // Hash of the next step: what was read of which domain under which weights.
    u64 next() {
        const auto handed = sampler->next(spare, [] {});
        require(handed.has_value(), "a stream that repeats goes on");
        u64 hash = handed->step * 31 + handed->weights_id;
        const auto add = [&hash](u64 value) { hash = (hash ^ value) * 0x100000001B3; };
        for (const std::int32_t d : handed->domains) add(static_cast<u64>(d));
        for (const std::int64_t id : handed->row_ids) add(static_cast<u64>(id));
        for (u64 i = 0; i < ROWS * (ROW_TOKENS + 1); ++i) add(static_cast<u64>(handed->buffer->tokens[i]));
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

// Pushes that took effect in `steps` steps, of an order over whole domains or, with `window`, over windows of shards.
std::size_t race(u64 steps, u64 seed, u64 window) {
    const std::vector<std::shared_ptr<const TokenStream>> streams{domain(60, 1), domain(9, 2), domain(200, 3)};
    std::vector<Push> pushed;
    std::vector<u64> read;
    {
        Reader reader(streams, 3, window);
        std::atomic<bool> done{false};
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
    }
    Reader alone(streams, 0, window);
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
    const std::size_t pushes = race(steps - steps / 2, seed, 0) + race(steps / 2, seed, 1);
    std::printf("%llu steps, %zu pushes, no finding\n", static_cast<unsigned long long>(steps), pushes);
}
