#include "token_stream.h"

#include <algorithm>
#include <utility>

#include "errors.h"

namespace velopath {

TokenStream::TokenStream(std::vector<ShardSpec> specs, std::optional<std::int32_t> eos) : eos_(eos) {
    parts_.reserve(specs.size());
    std::size_t marks = 0;
    for (const ShardSpec& spec : specs) marks += (std::min(spec.samples, spec.raw_bytes / 4) + STRIDE - 1) / STRIDE;
    marks_.reserve(marks);
    for (ShardSpec& spec : specs) {
        Shard shard(std::move(spec));
        const std::uint64_t first_token = tokens_;
        const std::size_t first_mark = marks_.size();
        for (std::uint64_t begin = 0; begin < shard.samples(); begin += STRIDE) {
            marks_.push_back(tokens_);
            const std::uint64_t end = std::min(begin + STRIDE, shard.samples());
            tokens_ += shard.tokens(begin, end) + (eos_ ? end - begin : 0);
        }
        const std::uint64_t first_document = documents_;
        documents_ += shard.samples();
        if (tokens_ == first_token) marks_.resize(first_mark);
        else parts_.push_back({std::move(shard), first_token, first_document, first_mark});
    }
}

void TokenStream::read(std::uint64_t position, std::uint64_t count, std::int32_t* out, std::vector<std::int32_t>* begins) const {
    const std::int32_t* const row = out;
    const auto part_at = std::upper_bound(parts_.begin(), parts_.end(), position,
                                          [](std::uint64_t p, const Part& part) { return p < part.first_token; });
    auto part = part_at - 1;
    const auto marks_end = part_at == parts_.end() ? marks_.end() : marks_.begin() + static_cast<std::ptrdiff_t>(part_at->first_mark);
    const auto marks_begin = marks_.begin() + static_cast<std::ptrdiff_t>(part->first_mark);
    const auto mark = std::upper_bound(marks_begin, marks_end, position) - 1;
    std::uint64_t i = static_cast<std::uint64_t>(mark - marks_begin) * STRIDE;
    std::uint64_t skip = position - *mark;  // tokens between the start of document i and the position
    for (std::uint64_t here = length(part->shard, i); skip >= here; here = length(part->shard, ++i)) skip -= here;

    part->shard.check_whole();
    while (count > 0) {
        const Document document = part->shard.document(i);
        if (begins != nullptr && skip < document.tokens + (eos_ ? 1 : 0)) begins->push_back(static_cast<std::int32_t>(out - row));
        if (skip < document.tokens) {
            const std::uint64_t take = std::min(count, document.tokens - skip);
            part->shard.copy(i, document, skip, take, out);
            out += take;
            count -= take;
            skip += take;
        }
        if (eos_ && count > 0 && skip == document.tokens) {
            *out++ = *eos_;
            --count;
        }
        skip = 0;
        if (++i == part->shard.samples()) {
            i = 0;
            if (++part == parts_.end()) part = parts_.begin();
            part->shard.check_whole();
        }
    }
}

void TokenStream::read_document(std::uint64_t document, std::uint64_t first, std::uint64_t count, std::int32_t* out) const {
    const auto after = std::upper_bound(parts_.begin(), parts_.end(), document,
                                        [](std::uint64_t d, const Part& part) { return d < part.first_document; });
    if (after == parts_.begin() || document - (after - 1)->first_document >= (after - 1)->shard.samples())
        throw DataError("a bin asks for document " + std::to_string(document) + ", which is not there or has no tokens; the bins are of "
                        "other data, remove their file", parts_.empty() ? std::string() : parts_.front().shard.path());
    const Part& part = *(after - 1);
    const std::uint64_t i = document - part.first_document;
    part.shard.check_whole();
    const std::uint64_t here = length(part.shard, i);
    if (first > here || count > here - first)
        throw DataError("a bin asks for tokens " + std::to_string(first) + " to " + std::to_string(first + count) +
                            " of a document of " + std::to_string(here) + "; the bins are of other data, remove their file",
                        part.shard.path(), static_cast<std::int64_t>(i));
    const Document found = part.shard.document(i);
    const std::uint64_t take = first < found.tokens ? std::min(count, found.tokens - first) : 0;
    if (take > 0) part.shard.copy(i, found, first, take, out);
    if (take < count) out[take] = *eos_;  // count is within the length, so that only the end-of-text token is missing
}

std::vector<std::uint32_t> TokenStream::lengths() const {
    std::vector<std::uint32_t> result(documents_, 0);
    for (const Part& part : parts_)
        for (std::uint64_t i = 0; i < part.shard.samples(); ++i)
            result[part.first_document + i] = static_cast<std::uint32_t>(length(part.shard, i));  // below a shard's 2^32 bytes
    return result;
}

std::vector<std::uint64_t> TokenStream::shard_positions() const {
    std::vector<std::uint64_t> result;
    for (const Part& part : parts_) result.push_back(part.first_token);
    return result;
}

}  // namespace velopath
