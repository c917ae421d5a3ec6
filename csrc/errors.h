// Errors of the core. bind.cpp turns each into the class of the same name in velopath.errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace velopath {

// A data file is missing, malformed or does not fit. sample < 0 and an empty field mean "not known".
struct DataError : std::runtime_error {
    DataError(const std::string& problem, std::string at_path, std::int64_t at_sample = -1, std::string at_field = {})
        : std::runtime_error(problem), path(std::move(at_path)), sample(at_sample), field(std::move(at_field)) {}
    std::string path;
    std::int64_t sample;
    std::string field;
};

// An argument or a state does not fit; nothing was changed.
struct ConfigError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A weight push was refused and changed nothing.
struct PushRejectedError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The machinery failed: a stalled or dead reader thread, use after close() or after a fork.
struct VelopathError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace velopath
