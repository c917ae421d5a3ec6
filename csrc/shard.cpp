#include "shard.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "errors.h"

namespace velopath {

namespace {

constexpr std::uint64_t MAX_TOKEN = 0x7FFFFFFF;
constexpr std::int64_t CHECK_NS = 10'000'000;

template <class T>
T load(const unsigned char* at) {  // samples are not aligned
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

std::uint64_t load_width(const unsigned char* at, std::uint64_t bytes) {
    switch (bytes) {
        case 1: return *at;
        case 2: return load<std::uint16_t>(at);
        case 4: return load<std::uint32_t>(at);
        default: return load<std::uint64_t>(at);
    }
}

// out[i] = values[i]; returns whether every value is in [0, 2^31). One OR per value keeps the loop vectorised.
template <class T>
bool widen(const unsigned char* values, std::uint64_t count, std::int32_t* out) {
    using Unsigned = std::make_unsigned_t<T>;
    Unsigned seen = 0;
    for (std::uint64_t i = 0; i < count; ++i) {
        const Unsigned value = load<Unsigned>(values + i * sizeof(T));
        seen = static_cast<Unsigned>(seen | value);
        out[i] = static_cast<std::int32_t>(value);
    }
    constexpr std::uint64_t limit = std::is_signed_v<T> && sizeof(T) < 4 ? std::uint64_t{1} << (8 * sizeof(T) - 1) : MAX_TOKEN + 1;
    return static_cast<std::uint64_t>(seen) < limit;  // limit is a power of two: the OR passes iff every value does
}

template <class T>
std::string first_bad(const unsigned char* values, std::uint64_t count) {
    for (std::uint64_t i = 0; i < count; ++i) {
        const T value = load<T>(values + i * sizeof(T));
        if (value < T{0} || static_cast<std::uint64_t>(value) > MAX_TOKEN)
            return "token " + std::to_string(i) + " is " + std::to_string(value);
    }
    return "a token";
}

template <class T>
void copy_checked(const Shard& shard, std::uint64_t sample, const Document& d, std::uint64_t first, std::uint64_t count,
                  std::int32_t* out) {
    if (!widen<T>(d.values + first * sizeof(T), count, out))
        shard.fail(first_bad<T>(d.values, d.tokens) + "; expected an id from 0 to 2147483647", sample);
}

}  // namespace

std::optional<Type> type_of_code(unsigned code) {
    const bool integer = (code & 3u) < 2 && (code >> 3 == 1 || code >> 3 == 2 || code >> 3 == 4 || code >> 3 == 8) && (code & 4u) == 0;
    return integer ? std::optional<Type>(static_cast<Type>(code)) : std::nullopt;
}

Shard::Shard(ShardSpec spec, std::string file_path)
    : spec_(std::move(spec)), file_(file_path.empty() ? spec_.path : std::move(file_path)) {
    if (spec_.columns.size() != spec_.column_bytes.size() || spec_.token_column >= spec_.columns.size())
        throw DataError("columns and their sizes do not fit each other", spec_.path);
    if ((spec_.encoding.plain || spec_.encoding.length) && !spec_.encoding.type)
        throw DataError("the encoding of the token column has no type", spec_.path);
    bool others_fixed = true;
    for (std::size_t c = 0; c < spec_.columns.size(); ++c) {
        const std::int64_t bytes = spec_.column_bytes[c];
        if (bytes < 0) overhead_ += 4;
        if (c == spec_.token_column) continue;
        others_fixed = others_fixed && bytes >= 0;
        if (bytes >= 0) overhead_ += static_cast<std::uint64_t>(bytes);
    }
    lean_ = others_fixed && spec_.encoding.type.has_value();
    while (spec_.encoding.type && (std::uint64_t{1} << shift_) < width(*spec_.encoding.type)) ++shift_;

    const int file = ::open(file_.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw DataError(std::string("cannot open the shard: ") + std::strerror(errno), spec_.path);
    struct stat info {};
    const bool known = ::fstat(file, &info) == 0 && S_ISREG(info.st_mode);
    bytes_ = known ? static_cast<std::uint64_t>(info.st_size) : 0;
    device_ = static_cast<std::uint64_t>(info.st_dev);
    inode_ = static_cast<std::uint64_t>(info.st_ino);
    std::string problem;
    if (!known) problem = "not a regular file";
    else if (bytes_ != spec_.raw_bytes)
        problem = "the shard has " + std::to_string(bytes_) + " bytes, index.json says " + std::to_string(spec_.raw_bytes);
    else if (bytes_ < 8) problem = "the shard has " + std::to_string(bytes_) + " bytes, too few for an offset table";
    void* map = problem.empty() ? ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file, 0) : MAP_FAILED;
    if (problem.empty() && map == MAP_FAILED) problem = std::string("cannot map the shard: ") + std::strerror(errno);
    ::close(file);
    if (!problem.empty()) throw DataError(problem, spec_.path);
    data_ = static_cast<const unsigned char*>(map);
    try {
        check_table();
    } catch (...) {
        ::munmap(const_cast<unsigned char*>(data_), bytes_);
        throw;
    }
    samples_ = spec_.samples;
}

Shard::Shard(Shard&& other) noexcept
    : spec_(std::move(other.spec_)), file_(std::move(other.file_)), lean_(other.lean_), shift_(other.shift_), overhead_(other.overhead_),
      samples_(other.samples_), data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_),
      device_(other.device_), inode_(other.inode_) {}

Shard::~Shard() {
    if (data_ != nullptr) ::munmap(const_cast<unsigned char*>(data_), bytes_);
}

void Shard::check_table() const {
    const std::uint64_t n = load<std::uint32_t>(data_);
    if (n != spec_.samples)
        throw DataError("the shard says " + std::to_string(n) + " samples, index.json says " + std::to_string(spec_.samples), spec_.path);
    const std::uint64_t table_end = 4 + 4 * (n + 1);
    if (table_end > bytes_) throw DataError("the offset table of " + std::to_string(n) + " samples exceeds the file", spec_.path);
    if (offset(0) < table_end) throw DataError("offset 0 is " + std::to_string(offset(0)) + ", inside the offset table", spec_.path);
    std::uint32_t falls = 0;  // a number and no bool, so that the loop is vectorised
    for (std::uint64_t i = 0; i < n; ++i) falls |= offset(i) > offset(i + 1) ? 1u : 0u;
    for (std::uint64_t i = 0; i < n && falls != 0; ++i)
        if (offset(i) > offset(i + 1))
            throw DataError("ends at byte " + std::to_string(offset(i + 1)) + ", before it begins at " + std::to_string(offset(i)),
                            spec_.path, static_cast<std::int64_t>(i));
    if (offset(n) != bytes_)
        throw DataError("the last offset is " + std::to_string(offset(n)) + ", the file has " + std::to_string(bytes_) + " bytes",
                        spec_.path);
}

void Shard::check_whole() const {
    const std::int64_t now = std::chrono::steady_clock::now().time_since_epoch().count();
    if (now - checked_ns_.load(std::memory_order_relaxed) < CHECK_NS) return;
    struct stat info {};
    const bool same = ::stat(file_.c_str(), &info) == 0 && static_cast<std::uint64_t>(info.st_dev) == device_ &&
                      static_cast<std::uint64_t>(info.st_ino) == inode_;
    if (same && static_cast<std::uint64_t>(info.st_size) < bytes_)
        throw DataError("the shard was cut to " + std::to_string(info.st_size) + " bytes while it was in use, index.json says " +
                            std::to_string(bytes_) + "; put the file back and open the sampler anew",
                        spec_.path);
    checked_ns_.store(now, std::memory_order_relaxed);
}

void Shard::fail(const std::string& problem, std::uint64_t sample) const {
    throw DataError(problem, spec_.path, static_cast<std::int64_t>(sample), spec_.columns[spec_.token_column]);
}

std::uint64_t Shard::payload_of_size(std::uint64_t i) const {
    const std::uint64_t size = offset(i + 1) - offset(i);  // the table is monotone
    if (size < overhead_)
        fail("has " + std::to_string(size) + " bytes, its columns need at least " + std::to_string(overhead_), i);
    return size - overhead_;
}

// tokens(), with errors in words.
std::uint64_t Shard::tokens_of_size(std::uint64_t i, std::uint64_t payload) const {
    const std::uint64_t item = std::uint64_t{1} << shift_, head = head_of(payload);
    if (spec_.encoding.length && payload != *spec_.encoding.length * item)
        fail("has " + std::to_string(payload) + " bytes of values, the shape asks for " + std::to_string(*spec_.encoding.length * item), i);
    if (payload < head || (payload - head) % item != 0)
        fail("has " + std::to_string(payload) + " bytes, no whole number of " + std::to_string(item) + "-byte values", i);
    return (payload - head) >> shift_;
}

std::uint64_t Shard::tokens(std::uint64_t begin, std::uint64_t end) const {
    if (lean_ && !spec_.encoding.plain && !spec_.encoding.length) {
        // As tokens(i), in 32 bits and without a branch, so that the loop is vectorised; a wrong sample goes the long way.
        const auto overhead = static_cast<std::uint32_t>(std::min<std::uint64_t>(overhead_, 0xFFFFFFFF));
        const std::uint32_t short_shape = static_cast<std::uint32_t>(2 + (std::uint64_t{0xFF} << shift_));
        const std::uint32_t middle_shape = static_cast<std::uint32_t>(3 + (std::uint64_t{0xFFFF} << shift_));
        const std::uint32_t mask = (1u << shift_) - 1;
        std::uint32_t wrong = 0, values_sum = 0;  // below 2^32, as the sizes of all samples together are
        for (std::uint64_t i = begin; i < end; ++i) {
            const std::uint32_t size = offset(i + 1) - offset(i), payload = size - overhead;
            const std::uint32_t head = 2u + (payload > short_shape ? 1u : 0u) + (payload > middle_shape ? 2u : 0u);
            const std::uint32_t values = payload - head;
            wrong |= (size < overhead ? 1u : 0u) | (payload < head ? 1u : 0u) | (values & mask);
            values_sum += values >> shift_;
        }
        if (wrong == 0) return values_sum;
    }
    std::uint64_t sum = 0;
    for (std::uint64_t i = begin; i < end; ++i) sum += tokens(i);
    return sum;
}

Document Shard::document(std::uint64_t i) const {
    const unsigned char* at = data_ + offset(i);
    const std::uint64_t size = offset(i + 1) - offset(i);
    std::uint64_t sizes_at = 0, sum = 0, begin = 0, payload = 0;
    for (const std::int64_t bytes : spec_.column_bytes) sum += bytes < 0 ? 4 : 0;
    if (sum > size) fail("has " + std::to_string(size) + " bytes, too few for its column sizes", i);
    for (std::size_t c = 0; c < spec_.columns.size(); ++c) {
        std::uint64_t bytes = static_cast<std::uint64_t>(spec_.column_bytes[c]);
        if (spec_.column_bytes[c] < 0) {
            bytes = load<std::uint32_t>(at + sizes_at);
            sizes_at += 4;
        }
        if (c == spec_.token_column) begin = sum, payload = bytes;
        if (bytes > size) sum = size + 1;  // and cannot overflow
        else sum += bytes;
    }
    if (sum != size) fail("its columns do not sum to its " + std::to_string(size) + " bytes", i);

    const unsigned char* values = at + begin;
    if (spec_.encoding.plain || spec_.encoding.length) return {values, tokens_of_size(i, payload), *spec_.encoding.type};
    const unsigned char* const end = values + payload;
    std::optional<Type> type = spec_.encoding.type;
    if (!type) {
        type = values < end ? type_of_code(*values) : std::nullopt;
        if (!type) fail("stores no known integer type", i);
        ++values;
    }
    if (values == end) fail("stores no shape", i);
    const unsigned shape = *values++;
    const std::uint64_t side = std::uint64_t{1} << (shape & 3u);
    if (shape >> 2 != 1) fail("stores an array of " + std::to_string(shape >> 2) + " dimensions; expected 1", i);
    if (static_cast<std::uint64_t>(end - values) < side) fail("stores no shape", i);
    const std::uint64_t tokens = load_width(values, side);
    values += side;
    const std::uint64_t room = static_cast<std::uint64_t>(end - values);
    if (room % width(*type) != 0 || tokens != room / width(*type))
        fail("stores a shape of " + std::to_string(tokens) + " values in " + std::to_string(room) + " bytes", i);
    if (lean_ && tokens != tokens_of_size(i, payload))
        fail("stores its shape wider than needed (" + std::to_string(side) + " bytes for " + std::to_string(tokens) + "); write it anew", i);
    return {values, tokens, *type};
}

void Shard::copy(std::uint64_t i, const Document& d, std::uint64_t first, std::uint64_t count, std::int32_t* out) const {
    switch (d.type) {
        case Type::uint8: return copy_checked<std::uint8_t>(*this, i, d, first, count, out);
        case Type::int8: return copy_checked<std::int8_t>(*this, i, d, first, count, out);
        case Type::uint16: return copy_checked<std::uint16_t>(*this, i, d, first, count, out);
        case Type::int16: return copy_checked<std::int16_t>(*this, i, d, first, count, out);
        case Type::uint32: return copy_checked<std::uint32_t>(*this, i, d, first, count, out);
        case Type::int32: return copy_checked<std::int32_t>(*this, i, d, first, count, out);
        case Type::uint64: return copy_checked<std::uint64_t>(*this, i, d, first, count, out);
        case Type::int64: return copy_checked<std::int64_t>(*this, i, d, first, count, out);
    }
}

}  // namespace velopath
