// One raw MDS shard (version 2) as read-only memory: map, check every bound, find sample i and its tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
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
    explicit Shard(ShardSpec spec);  // throws DataError
    Shard(Shard&& other) noexcept;
    Shard(const Shard&) = delete;
    Shard& operator=(const Shard&) = delete;
    Shard& operator=(Shard&&) = delete;
    ~Shard();

    std::uint64_t samples() const { return samples_; }

    // Tokens of sample i. Known from the offset table alone where the token column is the only variable one and
    // its type is in the encoding, so that counting a corpus touches no payload page.
    std::uint64_t tokens(std::uint64_t i) const { return lean_ ? tokens_of_size(i, payload_of_size(i)) : document(i).tokens; }

    // Sample i, checked against its stored sizes and shape.
    Document document(std::uint64_t i) const;

    // Writes tokens [first, first + count) of sample i. Throws DataError on an id outside [0, 2^31).
    void copy(std::uint64_t i, const Document& document, std::uint64_t first, std::uint64_t count, std::int32_t* out) const;

    [[noreturn]] void fail(const std::string& problem, std::uint64_t sample) const;

private:
    std::uint32_t offset(std::uint64_t i) const;
    std::uint64_t payload_of_size(std::uint64_t i) const;
    std::uint64_t tokens_of_size(std::uint64_t i, std::uint64_t payload) const;
    void check_table() const;

    ShardSpec spec_;
    bool lean_ = false;           // tokens() needs the offset table only
    std::uint64_t overhead_ = 0;  // bytes of a sample that are not the token column, where lean
    std::uint64_t samples_ = 0;
    const unsigned char* data_ = nullptr;
    std::uint64_t bytes_ = 0;
};

}  // namespace velopath
