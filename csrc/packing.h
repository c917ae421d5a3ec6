// Rows of whole documents: bins found offline, each a list of pieces of documents.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "token_stream.h"

namespace velopath {

// `tokens` tokens of document `document` (of the domain, in index order, its end-of-text token included) from `first` on.
struct Piece {
    std::uint32_t document, first, tokens;
};

class Packing {
public:
    // Bin b holds pieces[starts[b]] .. pieces[starts[b + 1] - 1]; `owner` keeps both arrays in memory. The bins of one group
    // of shards stand together, from groups[i] on; `groups` is empty where bins reach over all shards. Throws DataError,
    // naming `path`, where they do not fit each other, or a bin holds no token or more than `width`.
    Packing(const std::uint64_t* starts, std::uint64_t bins, const Piece* pieces, std::uint64_t piece_count, std::uint64_t width,
            std::vector<std::uint64_t> groups, std::string path, std::shared_ptr<const void> owner);

    std::uint64_t bins() const { return bins_; }
    const std::vector<std::uint64_t>& groups() const { return groups_; }
    std::uint64_t tokens(std::uint64_t bin) const;

    // Writes the tokens of a bin, `padding` behind them up to `width`, and where each piece begins to `begins`, if asked.
    // Returns the tokens that are no padding. Throws DataError.
    std::uint64_t read(const TokenStream& stream, std::uint64_t bin, std::int32_t padding, std::int32_t* out,
                       std::vector<std::int32_t>* begins) const;

    // Numbers of the shards that read() of this bin touches, some more than once. Throws DataError.
    std::vector<std::uint32_t> shards_of(const TokenStream& stream, std::uint64_t bin) const;

private:
    const std::uint64_t* starts_;
    std::uint64_t bins_;
    const Piece* pieces_;
    std::uint64_t width_;
    std::vector<std::uint64_t> groups_;
    std::string path_;
    std::shared_ptr<const void> owner_;
};

}  // namespace velopath
