// The documents of one domain as one circular stream of tokens, each followed by the end-of-text token if there is one.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "shard.h"

namespace velopath {

class TokenStream {
public:
    // Maps every shard and counts its tokens. Throws DataError.
    TokenStream(std::vector<ShardSpec> specs, std::optional<std::int32_t> eos);

    // Maps none: `counts` are the tokens of each shard, without end-of-text tokens. A shard is read between attach() and
    // detach(); any other read of it throws VelopathError.
    TokenStream(std::vector<ShardSpec> specs, std::optional<std::int32_t> eos, const std::vector<std::uint64_t>& counts);

    std::uint64_t tokens() const { return tokens_; }
    std::uint64_t documents() const { return documents_; }
    bool attachable() const { return attachable_; }

    // Writes the `count` tokens from `position` < tokens() on, going round at the end, and to `begins`, if asked, the
    // places in `out` where a document begins: 0 and those behind the end of another one. Throws DataError.
    void read(std::uint64_t position, std::uint64_t count, std::int32_t* out, std::vector<std::int32_t>* begins = nullptr) const;

    // Writes tokens [first, first + count) of a document, the end-of-text token included. Throws DataError; `bins` is the
    // file that asks for them, named where they are not there.
    void read_document(std::uint64_t document, std::uint64_t first, std::uint64_t count, std::int32_t* out, const std::string& bins) const;

    std::vector<std::uint32_t> lengths() const;        // tokens of each document, the end-of-text token included
    std::vector<std::uint64_t> shard_positions() const;  // where each shard that holds tokens begins
    std::vector<std::uint64_t> shard_documents() const;  // the first document of each of them

    // Of an attachable stream, from any thread. attach maps `file` as the content of shard number `shard` and throws
    // DataError where it does not hold the tokens that were counted. After detach the map lives as long as it is read.
    void attach(std::size_t shard, const std::string& file);
    void detach(std::size_t shard);
    std::vector<std::uint32_t> shards_of(std::uint64_t position, std::uint64_t count) const;  // that read() would touch
    std::uint32_t shard_of_document(std::uint64_t document, const std::string& bins) const;  // throws as read_document() does

private:
    static constexpr std::uint64_t STRIDE = 64;  // documents per entry of the sparse index: 8 bytes in 64 documents

    struct Mapped {
        Shard shard;
        std::vector<std::uint64_t> marks;  // stream position of its documents 0, 64, 128 ..
        std::uint64_t tokens;
    };

    struct Part {
        std::shared_ptr<const Mapped> mapped;  // of an attachable stream: guarded by mutex_
        std::uint64_t first_token, first_document, documents;
        std::uint32_t shard;  // its number
    };

    using Parts = std::vector<Part>;

    std::uint64_t length(const Shard& shard, std::uint64_t i) const { return shard.tokens(i) + (eos_ ? 1 : 0); }
    Mapped map(Shard shard, std::uint64_t first_token) const;
    Parts::const_iterator part_at(std::uint64_t position) const;
    Part* part_of(std::size_t shard);
    const Part& part_of_document(std::uint64_t document, const std::string& bins) const;
    std::uint64_t part_tokens(const Part& part) const;

    // What is mapped of a part; `pin` keeps it in memory where it may be detached meanwhile. Throws VelopathError.
    const Mapped& use(const Part& part, std::shared_ptr<const Mapped>& pin) const {
        return attachable_ ? pinned(part, pin) : *part.mapped;
    }
    const Mapped& pinned(const Part& part, std::shared_ptr<const Mapped>& pin) const;

    Parts parts_;                   // of shards that hold tokens
    std::vector<ShardSpec> specs_;  // of an attachable stream, by shard number
    std::optional<std::int32_t> eos_;
    std::uint64_t tokens_ = 0;
    std::uint64_t documents_ = 0;
    bool attachable_ = false;
    mutable std::mutex mutex_;
};

}  // namespace velopath
