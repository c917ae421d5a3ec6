// One raw MDS shard (version 2) as read-only memory: map, check every bound, find sample i and its tokens.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace velopath {

// Number types of MDS by their codes in a stored ndarray: bits, +0 unsigned, +1 signed (+2 is a float: refused).
enum class Type : std::uint8_t { uint8 = 8, int8 = 9, uint16 = 16, int16 = 17, uint32 = 32, int32 = 33, uint64 = 64, int64 = 65 };
inline std::uint64_t width(Type type) { return static_cast<std::uint64_t>(type) >> 3; }
std::optional<Type> type_of_code(unsigned code);

// How the token column is stored: plain `bytes` of a type, or `ndarray[:DTYPE[:LENGTH]]`.
struct Encoding {
    bool plain = false;
    std::optional<Type> type;             // absent: each sample stores its own
    std::optional<std::uint64_t> length;  // present: the shape is in the encoding, samples store none
};

// What index.json says about one shard.
struct ShardSpec {
    std::string path;
    std::uint64_t samples = 0;
    std::uint64_t raw_bytes = 0;
    std::vector<std::string> columns;          // sorted, as stored
    std::vector<std::int64_t> column_bytes;    // -1: variable, each sample stores its size
    std::size_t token_column = 0;
    Encoding encoding;
};

// The tokens of one sample inside the map; unaligned.
struct Document {
    const unsigned char* values;
    std::uint64_t tokens;
    Type type;
};

class Shard {
public:
    explicit Shard(ShardSpec spec) : Shard(std::move(spec), {}) {}  // throws DataError
    Shard(ShardSpec spec, std::string file);  // maps `file`; errors name spec.path
    Shard(Shard&& other) noexcept;
    Shard(const Shard&) = delete;
    Shard& operator=(const Shard&) = delete;
    Shard& operator=(Shard&&) = delete;
    ~Shard();

    std::uint64_t samples() const { return samples_; }
    const std::string& path() const { return spec_.path; }

    // Tokens of sample i. Known from the offset table alone where the token column is the only variable one and
    // its type is in the encoding, so that counting a corpus touches no payload page.
    std::uint64_t tokens(std::uint64_t i) const {
        if (!lean_) return document(i).tokens;
        const std::uint64_t payload = offset(i + 1) - offset(i) - overhead_;  // a too small sample wraps to too large
        const std::uint64_t head = head_of(payload), values = payload - head;
        const bool sound = payload <= bytes_ && payload >= head && (values & ((std::uint64_t{1} << shift_) - 1)) == 0;
        return sound && !spec_.encoding.length ? values >> shift_ : tokens_of_size(i, payload_of_size(i));
    }

    // The sum of tokens(i) over [begin, end), for counting a corpus: several samples at a time where they are lean.
    std::uint64_t tokens(std::uint64_t begin, std::uint64_t end) const;

    // Sample i, checked against its stored sizes and shape.
    Document document(std::uint64_t i) const;

    // Writes tokens [first, first + count) of sample i. Throws DataError on an id outside [0, 2^31).
    void copy(std::uint64_t i, const Document& document, std::uint64_t first, std::uint64_t count, std::int32_t* out) const;

    // Reading a page of a map behind the end of its file kills the process (SIGBUS). Asks the file's size, at most
    // every 10 ms, and throws DataError where the file was cut; a file replaced or unlinked keeps its map whole.
    void check_whole() const;

    [[noreturn]] void fail(const std::string& problem, std::uint64_t sample) const;

private:
    std::uint32_t offset(std::uint64_t i) const {
        std::uint32_t value;
        std::memcpy(&value, data_ + 4 + 4 * i, sizeof value);
        return value;
    }

    // Bytes of the stored shape before the values of a 1-D array: 1 + w, w = 1, 2, 4 for fewer than 2^8, 2^16, 2^32
    // values, so the payload's bytes tell. document() compares with what is stored.
    std::uint64_t head_of(std::uint64_t payload) const {
        if (spec_.encoding.plain || spec_.encoding.length) return 0;
        return payload <= 2 + (std::uint64_t{0xFF} << shift_) ? 2 : payload <= 3 + (std::uint64_t{0xFFFF} << shift_) ? 3 : 5;
    }

    std::uint64_t payload_of_size(std::uint64_t i) const;
    std::uint64_t tokens_of_size(std::uint64_t i, std::uint64_t payload) const;
    void check_table() const;

    ShardSpec spec_;
    std::string file_;
    bool lean_ = false;           // tokens() needs the offset table only
    unsigned shift_ = 0;          // log2 of the bytes of a token, where the encoding has the type
    std::uint64_t overhead_ = 0;  // bytes of a sample that are not the token column, where lean
    std::uint64_t samples_ = 0;
    const unsigned char* data_ = nullptr;
    std::uint64_t bytes_ = 0;
    std::uint64_t device_ = 0, inode_ = 0;
    mutable std::atomic<std::int64_t> checked_ns_{0};  // when check_whole last asked
};

}  // namespace velopath
