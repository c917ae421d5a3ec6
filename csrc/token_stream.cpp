#include "token_stream.h"

#include <algorithm>
#include <utility>

#include "errors.h"

namespace velopath {

TokenStream::TokenStream(std::vector<ShardSpec> specs, std::optional<std::int32_t> eos) : eos_(eos) {
    parts_.reserve(specs.size());
    for (std::size_t s = 0; s < specs.size(); ++s) {
        Mapped mapped = map(Shard(std::move(specs[s])), tokens_);
        const std::uint64_t first_token = tokens_, first_document = documents_, documents = mapped.shard.samples();
        tokens_ += mapped.tokens;
        documents_ += documents;
        if (mapped.tokens > 0)
            parts_.push_back({std::make_shared<const Mapped>(std::move(mapped)), first_token, first_document, documents,
                              static_cast<std::uint32_t>(s)});
    }
}

TokenStream::TokenStream(std::vector<ShardSpec> specs, std::optional<std::int32_t> eos, const std::vector<std::uint64_t>& counts)
    : specs_(std::move(specs)), eos_(eos), attachable_(true) {
    if (counts.size() != specs_.size())
        throw ConfigError(std::to_string(counts.size()) + " counts of tokens for " + std::to_string(specs_.size()) + " shards");
    for (std::size_t s = 0; s < specs_.size(); ++s) {
        const std::uint64_t documents = specs_[s].samples, tokens = counts[s] + (eos_ ? documents : 0);
        if (tokens > 0) parts_.push_back({nullptr, tokens_, documents_, documents, static_cast<std::uint32_t>(s)});
        tokens_ += tokens;
        documents_ += documents;
    }
}

TokenStream::Mapped TokenStream::map(Shard shard, std::uint64_t first_token) const {
    std::vector<std::uint64_t> marks;
    marks.reserve((shard.samples() + STRIDE - 1) / STRIDE);
    std::uint64_t at = first_token;
    for (std::uint64_t begin = 0; begin < shard.samples(); begin += STRIDE) {
        marks.push_back(at);
        const std::uint64_t end = std::min(begin + STRIDE, shard.samples());
        at += shard.tokens(begin, end) + (eos_ ? end - begin : 0);
    }
    return {std::move(shard), std::move(marks), at - first_token};
}

TokenStream::Parts::const_iterator TokenStream::part_at(std::uint64_t position) const {
    return std::upper_bound(parts_.begin(), parts_.end(), position,
                            [](std::uint64_t p, const Part& part) { return p < part.first_token; }) - 1;
}

TokenStream::Part* TokenStream::part_of(std::size_t shard) {
    if (!attachable_ || shard >= specs_.size()) throw ConfigError("no shard " + std::to_string(shard) + " that can be attached");
    const auto found = std::lower_bound(parts_.begin(), parts_.end(), shard,
                                        [](const Part& part, std::size_t s) { return part.shard < s; });
    return found != parts_.end() && found->shard == shard ? &*found : nullptr;
}

std::uint64_t TokenStream::part_tokens(const Part& part) const {
    const Part* const next = &part + 1;
    return (next == parts_.data() + parts_.size() ? tokens_ : next->first_token) - part.first_token;
}

const TokenStream::Mapped& TokenStream::pinned(const Part& part, std::shared_ptr<const Mapped>& pin) const {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        pin = part.mapped;
    }
    if (!pin) throw VelopathError("a row was asked of shard " + specs_[part.shard].path + ", which is not attached");
    return *pin;
}

void TokenStream::attach(std::size_t shard, const std::string& file) {
    Part* const part = part_of(shard);
    if (part == nullptr) return;  // no token is ever read of it
    Mapped mapped = map(Shard(specs_[shard], file), part->first_token);
    if (mapped.tokens != part_tokens(*part))
        throw DataError("the shard holds " + std::to_string(mapped.tokens) + " tokens with their ends, " + std::to_string(part_tokens(*part)) +
                            " were counted; remove the counts, or write the folder again", specs_[shard].path);
    auto shared = std::make_shared<const Mapped>(std::move(mapped));
    const std::lock_guard<std::mutex> lock(mutex_);
    part->mapped.swap(shared);
}

void TokenStream::detach(std::size_t shard) {
    Part* const part = part_of(shard);
    if (part == nullptr) return;
    std::shared_ptr<const Mapped> last;  // unmapped without the mutex
    const std::lock_guard<std::mutex> lock(mutex_);
    part->mapped.swap(last);
}

std::vector<std::uint32_t> TokenStream::shards_of(std::uint64_t position, std::uint64_t count) const {
    std::vector<std::uint32_t> result;
    auto part = part_at(position);
    for (std::uint64_t at = position - part->first_token; count > 0; at = 0) {
        result.push_back(part->shard);
        count -= std::min(count, part_tokens(*part) - at);
        if (++part == parts_.end()) part = parts_.begin();
    }
    return result;
}

void TokenStream::read(std::uint64_t position, std::uint64_t count, std::int32_t* out, std::vector<std::int32_t>* begins) const {
    const std::int32_t* const row = out;
    auto part = part_at(position);
    std::shared_ptr<const Mapped> pin;
    const Mapped* mapped = &use(*part, pin);
    const auto mark = std::upper_bound(mapped->marks.begin(), mapped->marks.end(), position) - 1;
    std::uint64_t i = static_cast<std::uint64_t>(mark - mapped->marks.begin()) * STRIDE;
    std::uint64_t skip = position - *mark;  // tokens between the start of document i and the position
    for (std::uint64_t here = length(mapped->shard, i); skip >= here; here = length(mapped->shard, ++i)) skip -= here;

    mapped->shard.check_whole();
    while (count > 0) {
        const Document document = mapped->shard.document(i);
        if (begins != nullptr && skip < document.tokens + (eos_ ? 1 : 0)) begins->push_back(static_cast<std::int32_t>(out - row));
        if (skip < document.tokens) {
            const std::uint64_t take = std::min(count, document.tokens - skip);
            mapped->shard.copy(i, document, skip, take, out);
            out += take;
            count -= take;
            skip += take;
        }
        if (eos_ && count > 0 && skip == document.tokens) {
            *out++ = *eos_;
            --count;
        }
        skip = 0;
        if (++i == mapped->shard.samples() && count > 0) {
            i = 0;
            if (++part == parts_.end()) part = parts_.begin();
            mapped = &use(*part, pin);
            mapped->shard.check_whole();
        }
    }
}

const TokenStream::Part& TokenStream::part_of_document(std::uint64_t document, const std::string& bins) const {
    const auto after = std::upper_bound(parts_.begin(), parts_.end(), document,
                                        [](std::uint64_t d, const Part& part) { return d < part.first_document; });
    if (after == parts_.begin() || document - (after - 1)->first_document >= (after - 1)->documents)
        throw DataError("a bin asks for document " + std::to_string(document) + ", which is not there or has no tokens; the bins are of "
                        "other data, remove their file", bins);
    return *(after - 1);
}

std::uint32_t TokenStream::shard_of_document(std::uint64_t document, const std::string& bins) const {
    return part_of_document(document, bins).shard;
}

void TokenStream::read_document(std::uint64_t document, std::uint64_t first, std::uint64_t count, std::int32_t* out,
                                const std::string& bins) const {
    const Part& part = part_of_document(document, bins);
    std::shared_ptr<const Mapped> pin;
    const Shard& shard = use(part, pin).shard;
    const std::uint64_t i = document - part.first_document;
    shard.check_whole();
    const std::uint64_t here = length(shard, i);
    if (first > here || count > here - first)
        throw DataError("a bin asks for tokens " + std::to_string(first) + " to " + std::to_string(first + count) +
                            " of a document of " + std::to_string(here) + "; the bins are of other data, remove " + bins,
                        shard.path(), static_cast<std::int64_t>(i));
    const Document found = shard.document(i);
    const std::uint64_t take = first < found.tokens ? std::min(count, found.tokens - first) : 0;
    if (take > 0) shard.copy(i, found, first, take, out);
    if (take < count) out[take] = *eos_;  // count is within the length, so that only the end-of-text token is missing
}

std::vector<std::uint32_t> TokenStream::lengths() const {
    std::vector<std::uint32_t> result(documents_, 0);
    std::shared_ptr<const Mapped> pin;
    for (const Part& part : parts_) {
        const Shard& shard = use(part, pin).shard;
        for (std::uint64_t i = 0; i < part.documents; ++i)
            result[part.first_document + i] = static_cast<std::uint32_t>(length(shard, i));  // below a shard's 2^32 bytes
    }
    return result;
}

std::vector<std::uint64_t> TokenStream::shard_positions() const {
    std::vector<std::uint64_t> result;
    for (const Part& part : parts_) result.push_back(part.first_token);
    return result;
}

std::vector<std::uint64_t> TokenStream::shard_documents() const {
    std::vector<std::uint64_t> result;
    for (const Part& part : parts_) result.push_back(part.first_document);
    return result;
}

}  // namespace velopath
