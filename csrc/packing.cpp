#include "packing.h"

#include <algorithm>
#include <utility>

#include "errors.h"

namespace velopath {

Packing::Packing(const std::uint64_t* starts, std::uint64_t bins, const Piece* pieces, std::uint64_t piece_count, std::uint64_t width,
                 std::vector<std::uint64_t> groups, std::string path, std::shared_ptr<const void> owner)
    : starts_(starts), bins_(bins), pieces_(pieces), width_(width), groups_(std::move(groups)), path_(std::move(path)),
      owner_(std::move(owner)) {
    bool sound = starts[0] == 0 && starts[bins] == piece_count;
    for (std::uint64_t b = 0; b < bins && sound; ++b) sound = starts[b] < starts[b + 1];
    for (std::uint64_t b = 0; b < bins && sound; ++b) sound = tokens(b) - 1 < width;
    for (std::size_t i = 0; i < groups_.size() && sound; ++i)
        sound = i == 0 ? groups_[0] == 0 : groups_[i - 1] < groups_[i] && groups_[i] < bins;
    if (!sound) throw DataError("the bins do not fit each other; remove the file, it is computed anew", path_);
}

std::uint64_t Packing::tokens(std::uint64_t bin) const {
    std::uint64_t sum = 0;
    for (std::uint64_t p = starts_[bin]; p < starts_[bin + 1]; ++p) sum += pieces_[p].tokens;
    return sum;
}

std::uint64_t Packing::read(const TokenStream& stream, std::uint64_t bin, std::int32_t padding, std::int32_t* out,
                            std::vector<std::int32_t>* begins) const {
    std::uint64_t filled = 0;
    for (std::uint64_t p = starts_[bin]; p < starts_[bin + 1]; ++p) {
        const Piece& piece = pieces_[p];
        if (begins != nullptr) begins->push_back(static_cast<std::int32_t>(filled));
        stream.read_document(piece.document, piece.first, piece.tokens, out + filled, path_);
        filled += piece.tokens;
    }
    std::fill(out + filled, out + width_, padding);
    return filled;
}

std::vector<std::uint32_t> Packing::shards_of(const TokenStream& stream, std::uint64_t bin) const {
    std::vector<std::uint32_t> result;
    for (std::uint64_t p = starts_[bin]; p < starts_[bin + 1]; ++p) result.push_back(stream.shard_of_document(pieces_[p].document, path_));
    return result;
}

}  // namespace velopath
