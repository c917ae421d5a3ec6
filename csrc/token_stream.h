// The documents of one domain as one circular stream of tokens, each followed by the end-of-text token if there is one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "shard.h"

namespace velopath {

class TokenStream {
public:
    // Maps every shard and counts its tokens. Throws DataError.
    TokenStream(std::vector<ShardSpec> specs, std::optional<std::int32_t> eos);

    std::uint64_t tokens() const { return tokens_; }
    std::uint64_t documents() const { return documents_; }

    // Writes the `count` tokens from `position` < tokens() on, going round at the end, and to `begins`, if asked, the
    // places in `out` where a document begins: 0 and those behind the end of another one. Throws DataError.
    void read(std::uint64_t position, std::uint64_t count, std::int32_t* out, std::vector<std::int32_t>* begins = nullptr) const;

    // Writes tokens [first, first + count) of a document, the end-of-text token included. Throws DataError.
    void read_document(std::uint64_t document, std::uint64_t first, std::uint64_t count, std::int32_t* out) const;

    std::vector<std::uint32_t> lengths() const;        // tokens of each document, the end-of-text token included
    std::vector<std::uint64_t> shard_positions() const;  // where each shard that holds tokens begins

private:
    static constexpr std::uint64_t STRIDE = 64;  // documents per entry of the sparse index: 8 bytes in 64 documents

    struct Part {
        Shard shard;
        std::uint64_t first_token, first_document;
        std::size_t first_mark;
    };

    std::uint64_t length(const Shard& shard, std::uint64_t i) const { return shard.tokens(i) + (eos_ ? 1 : 0); }

    std::vector<Part> parts_;           // of shards that hold tokens
    std::vector<std::uint64_t> marks_;  // stream position of documents 0, 64, 128 .. of each part
    std::optional<std::int32_t> eos_;
    std::uint64_t tokens_ = 0;
    std::uint64_t documents_ = 0;
};

}  // namespace velopath
