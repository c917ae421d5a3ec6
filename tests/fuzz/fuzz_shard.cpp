// Fuzz target: a raw shard and bins of its documents, whatever their bytes, give tokens or a DataError.
// `tests/fuzz/sanitize.py` builds it.
//
// Byte 0 of an input chooses the encoding and columns that the index states, byte 1 whether its sizes are true and the
// end-of-text token; the rest is the file. Beyond sanitizers it checks that all ways of reading agree. With clang's
// libFuzzer this is its target; else main() below mutates sound shards, each run from a seed of its own:
//     fuzz_shard RUNS [FIRST_SEED]          fuzz_shard 1 SEED repeats the run that failed
#include <sanitizer/common_interface_defs.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"
#include "packing.h"
#include "shard.h"
#include "token_stream.h"

using namespace velopath;
using Bytes = std::vector<std::uint8_t>;

// shard.cpp is built with these in the place of mmap and munmap: a heap block ends where the file does, so that the
// address sanitizer sees a read of one byte too many, which the last page of a map would allow.
extern "C" void* fuzz_mmap(void*, std::size_t bytes, int, int, int file, off_t) {
    void* block = std::malloc(bytes);
    if (block == nullptr || ::pread(file, block, bytes, 0) != static_cast<ssize_t>(bytes)) std::abort();
    return block;
}
extern "C" int fuzz_munmap(void* block, std::size_t) {
    std::free(block);
    return 0;
}

namespace {

constexpr unsigned LAYOUTS = 12;
const Type TYPES[] = {Type::uint8, Type::uint16, Type::uint32, Type::int32, Type::uint64, Type::int64};

struct Layout {
    Encoding encoding;
    std::vector<std::string> columns{"tokens"};
    std::vector<std::int64_t> bytes{-1};
    std::size_t token_column = 0;
};

Layout layout_of(std::uint8_t choice) {
    Layout layout;
    const Type type = TYPES[(choice / LAYOUTS) % 6];
    switch (choice % LAYOUTS) {
        case 0: case 1: case 2: layout.encoding = {false, type, {}}; break;
        case 3: layout.encoding = {false, {}, {}}; break;
        case 4: layout.encoding = {true, type, {}}; break;
        case 5: layout.encoding = {false, type, 3}; layout.bytes = {static_cast<std::int64_t>(3 * width(type))}; break;
        case 6: layout.encoding = {false, type, std::uint64_t{1} << 32}; layout.bytes = {std::int64_t{1} << 32}; break;
        case 7: layout = {{false, type, {}}, {"a", "tokens"}, {8, -1}, 1}; break;
        case 8: layout = {{false, type, {}}, {"a", "tokens"}, {-1, -1}, 1}; break;
        case 9: layout = {{true, type, {}}, {"a", "b", "tokens", "z"}, {-1, 4, -1, -1}, 2}; break;
        case 10: layout = {{false, {}, {}}, {"a", "tokens"}, {std::int64_t{1} << 32, -1}, 1}; break;
        default: layout = {{false, type, {}}, {"tokens", "z"}, {-1, 1}, 0}; break;
    }
    return layout;
}

std::uint64_t running = 0;  // seed of this run

void tell_seed() { std::fprintf(stderr, "in the run of seed %llu\n", static_cast<unsigned long long>(running)); }

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "violated: %s\n", what);
    tell_seed();
    std::abort();
}

ShardSpec spec_of(const std::string& path, const std::uint8_t* data, std::size_t size) {
    const Layout layout = layout_of(data[0]);
    std::uint32_t count = 0;
    std::memcpy(&count, data + 2, std::min<std::size_t>(4, size - 2));
    const bool truthful = data[1] & 1;
    return {path, truthful ? count : data[1] / 4, size - 2, layout.columns, layout.bytes, layout.token_column, layout.encoding};
}

// The whole circle at once, in pieces of all lengths and from the middle: the same tokens.
void read_all_ways(const ShardSpec& spec, std::optional<std::int32_t> eos) {
    const TokenStream stream({spec}, eos);
    if (stream.tokens() == 0) return;
    const std::uint64_t tokens = stream.tokens();
    std::vector<std::int32_t> whole(tokens), part;
    stream.read(0, tokens, whole.data());
    for (std::uint64_t at = 0, count = 1; at < tokens; at += count, count = count % 7 + 1) {
        part.assign(count, -1);
        stream.read(at, count, part.data());
        for (std::uint64_t i = 0; i < count; ++i) require(part[i] == whole[(at + i) % tokens], "a part has the tokens of the whole");
    }
    for (const std::int32_t token : whole) require(token >= 0, "tokens are in [0, 2^31)");
}

// Bins made of the last bytes of the input, so mostly wrong ones.
void read_bins(const ShardSpec& spec, std::optional<std::int32_t> eos, const std::uint8_t* data, std::size_t size) {
    const TokenStream stream({spec}, eos);
    if (size < 16) return;
    const std::uint8_t* const from = data + size - 16;
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < 4; ++i) {
        const std::uint32_t document = from[3 * i] > 250 ? 0xFFFFFFFF : from[3 * i] % 8u;
        pieces.push_back({document, from[3 * i + 1] % 70u, from[3 * i + 2] > 250 ? 0xFFFFFFFF : from[3 * i + 2] % 70u});
    }
    const std::vector<std::uint64_t> starts{from[12] % 8u == 7 ? 1u : 0u, 1 + from[13] % 3u, from[13] % 2u ? 4u : 3u, 4};
    const std::uint64_t width = 1 + from[14], bins = from[15] % 8u ? 3 : 2;
    const Packing packing(starts.data(), bins, pieces.data(), pieces.size(), width, {}, spec.path, nullptr);
    for (std::uint64_t bin = 0; bin < packing.bins(); ++bin) {
        std::vector<std::int32_t> row(width), begins;
        require(packing.read(stream, bin, 9, row.data(), &begins) == packing.tokens(bin), "a bin has the tokens of its pieces");
    }
}

void lengths_agree(const ShardSpec& spec) {
    const Shard shard(spec);
    for (std::uint64_t i = 0; i < shard.samples(); ++i) {
        std::optional<std::uint64_t> counted;
        try {
            counted = shard.tokens(i);
        } catch (const DataError&) {
        }
        try {
            const Document document = shard.document(i);
            require(counted == document.tokens, "the counted tokens are those of the document");
        } catch (const DataError&) {
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const int file = ::memfd_create("shard", 0);
    static const std::string path = "/proc/self/fd/" + std::to_string(file);
    if (size < 2 || size > 1 << 16) return 0;
    if (::ftruncate(file, 0) != 0 || ::pwrite(file, data + 2, size - 2, 0) != static_cast<ssize_t>(size - 2)) std::abort();
    const ShardSpec spec = spec_of(path, data, size);
    const std::optional<std::int32_t> eos = data[1] & 2 ? std::optional<std::int32_t>(7) : std::nullopt;
    try {
        read_all_ways(spec, eos);
    } catch (const DataError&) {
    }
    try {
        lengths_agree(spec);
    } catch (const DataError&) {
    }
    try {
        read_bins(spec, eos, data, size);
    } catch (const DataError&) {
    }
    return 0;
}

#ifndef LIBFUZZER
namespace {

struct Random {
    std::uint64_t state;
    std::uint64_t operator()(std::uint64_t below) {  // splitmix64
        std::uint64_t z = (state += 0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return (z ^ (z >> 31)) % below;
    }
};

void put(Bytes& out, std::uint64_t value, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) out.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
}

// A sound shard of a few documents in the layout that `choice` names.
Bytes sound(std::uint8_t choice, Random& random) {
    const Layout layout = layout_of(choice);
    std::vector<Bytes> samples(random(6));
    for (Bytes& sample : samples) {
        std::vector<Bytes> columns(layout.columns.size());
        for (std::size_t c = 0; c < columns.size(); ++c) {
            if (c != layout.token_column) {
                columns[c].resize(layout.bytes[c] < 0 ? random(5) : static_cast<std::size_t>(std::min<std::int64_t>(layout.bytes[c], 8)));
                continue;
            }
            const Type type = layout.encoding.type.value_or(Type::uint16);
            const std::uint64_t tokens = layout.encoding.length ? 3 : random(3) ? random(9) : 250 + random(12);
            if (!layout.encoding.type) put(columns[c], static_cast<std::uint64_t>(type), 1);
            if (!layout.encoding.plain && !layout.encoding.length) {
                put(columns[c], tokens < 256 ? 4 : 5, 1);
                put(columns[c], tokens, tokens < 256 ? 1 : 2);
            }
            for (std::uint64_t t = 0; t < tokens; ++t) put(columns[c], random(200), width(type));
        }
        for (std::size_t c = 0; c < columns.size(); ++c)
            if (layout.bytes[c] < 0) put(sample, columns[c].size(), 4);
        for (const Bytes& column : columns) sample.insert(sample.end(), column.begin(), column.end());
    }
    Bytes out{choice, static_cast<std::uint8_t>(1 + 2 * random(2))};
    put(out, samples.size(), 4);
    std::uint64_t offset = 4 + 4 * (samples.size() + 1) + 2;
    put(out, offset, 4);
    for (const Bytes& sample : samples) put(out, offset += sample.size(), 4);
    put(out, 0x7D7B, 2);  // {}
    for (const Bytes& sample : samples) out.insert(out.end(), sample.begin(), sample.end());
    return out;
}

void mutate(Bytes& input, Random& random) {
    const std::size_t header = 2, size = input.size();
    const std::size_t at = header + random(size - header);
    const std::uint32_t extremes[] = {0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC, static_cast<std::uint32_t>(size - header),
                                      static_cast<std::uint32_t>(size - header - 1), static_cast<std::uint32_t>(random(size))};
    switch (random(8)) {
        case 0: input[at] = static_cast<std::uint8_t>(input[at] ^ (1u << random(8))); break;
        case 1: input[at] = static_cast<std::uint8_t>(random(256)); break;
        case 2: input.resize(header + random(size - header + 1)); break;
        case 3: input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), random(9), static_cast<std::uint8_t>(random(256))); break;
        case 4: input.erase(input.begin() + static_cast<std::ptrdiff_t>(at), input.begin() + static_cast<std::ptrdiff_t>(std::min(size, at + random(9)))); break;
        case 5: input[random(2)] = static_cast<std::uint8_t>(random(256)); break;
        default: {  // a number of table or header, more often in front
            const std::size_t place = header + 4 * random(std::max<std::size_t>(1, std::min<std::size_t>(8, (size - header) / 4)));
            const std::uint32_t value = extremes[random(9)];
            if (place + 4 <= size) std::memcpy(input.data() + place, &value, 4);
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    const std::uint64_t runs = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 100'000;
    const std::uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
    __sanitizer_set_death_callback(tell_seed);
    ::signal(SIGALRM, [](int) {
        tell_seed();
        ::_exit(14);
    });
    for (std::uint64_t seed = first; seed < first + runs; ++seed) {
        running = seed;
        ::alarm(20);  // an endless loop is a finding
        Random random{seed * 0x2545F4914F6CDD1D + 1};
        Bytes input = sound(static_cast<std::uint8_t>(random(LAYOUTS * 6)), random);
        for (std::uint64_t changes = random(5); changes > 0 && input.size() > 2; --changes) mutate(input, random);
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%llu runs, no finding\n", static_cast<unsigned long long>(runs));
}
#endif
