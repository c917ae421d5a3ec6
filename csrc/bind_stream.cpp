// velopath._core: the documents of a domain, and their bins.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "draw.h"
#include "errors.h"
#include "packing.h"
#include "token_stream.h"

namespace py = pybind11;
using namespace velopath;

namespace {

using Tokens = py::array_t<std::int32_t, py::array::c_style>;

template <class T>
py::array_t<T> as_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

using ShardTuple = std::tuple<std::string, u64, u64, std::vector<std::string>, std::vector<i64>, std::size_t, bool, unsigned, std::optional<u64>>;

std::shared_ptr<TokenStream> open_stream(const std::vector<ShardTuple>& shards, std::optional<std::int32_t> eos,
                                         const std::optional<std::vector<u64>>& counts) {
    std::vector<ShardSpec> specs;
    for (const auto& [path, samples, bytes, names, sizes, column, plain, code, length] : shards)
        specs.push_back({path, samples, bytes, names, sizes, column, {plain, type_of_code(code), length}});
    const py::gil_scoped_release free;
    return counts ? std::make_shared<TokenStream>(std::move(specs), eos, *counts) : std::make_shared<TokenStream>(std::move(specs), eos);
}

Tokens read_stream(const TokenStream& stream, u64 position, u64 count) {
    if (position >= stream.tokens())
        throw ConfigError("position " + std::to_string(position) + " is not below the stream's " + std::to_string(stream.tokens()) + " tokens");
    Tokens out(static_cast<py::ssize_t>(count));
    std::int32_t* const data = out.mutable_data();
    const py::gil_scoped_release free;
    stream.read(position, count, data);
    return out;
}

using Starts = py::array_t<u64, py::array::c_style>;
using Pieces = py::array_t<std::uint32_t, py::array::c_style>;

std::shared_ptr<Packing> make_packing(const Starts& starts, const Pieces& pieces, u64 width, std::string path, std::vector<u64> groups) {
    static_assert(sizeof(Piece) == 3 * sizeof(std::uint32_t));
    if (starts.ndim() != 1 || starts.size() < 2 || pieces.ndim() != 2 || pieces.shape(1) != 3)
        throw ConfigError("the arrays of a packing do not fit each other");
    // Let go with the GIL held, whichever thread is the last to use them.
    const std::shared_ptr<const void> owner(new std::pair<Starts, Pieces>(starts, pieces), [](const void* p) {
        const py::gil_scoped_acquire hold;
        delete static_cast<const std::pair<Starts, Pieces>*>(p);
    });
    const auto bins = static_cast<u64>(starts.size()) - 1, count = static_cast<u64>(pieces.shape(0));
    const auto* const first = reinterpret_cast<const Piece*>(pieces.data());
    return std::make_shared<Packing>(starts.data(), bins, first, count, width, std::move(groups), std::move(path), owner);
}

}  // namespace

void bind_stream(py::module_& m) {
    py::class_<TokenStream, std::shared_ptr<TokenStream>>(m, "TokenStream")
        .def(py::init(&open_stream), py::arg("shards"), py::arg("eos"), py::arg("counts") = py::none())
        .def("attach", &TokenStream::attach, py::arg("shard"), py::arg("file"), py::call_guard<py::gil_scoped_release>())
        .def("detach", &TokenStream::detach, py::arg("shard"), py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("tokens", &TokenStream::tokens)
        .def_property_readonly("documents", &TokenStream::documents)
        .def_property_readonly("lengths", [](const TokenStream& s) { return as_array(s.lengths()); })
        .def_property_readonly("shard_positions", [](const TokenStream& s) { return as_array(s.shard_positions()); })
        .def_property_readonly("shard_documents", [](const TokenStream& s) { return as_array(s.shard_documents()); })
        .def("read", &read_stream, py::arg("position"), py::arg("count"));
    py::class_<Packing, std::shared_ptr<Packing>>(m, "Packing")
        .def(py::init(&make_packing), py::arg("starts"), py::arg("pieces"), py::kw_only(), py::arg("width"), py::arg("path"),
             py::arg("groups") = std::vector<u64>{})
        .def_property_readonly("bins", &Packing::bins)
        .def_property_readonly("groups", [](const Packing& p) { return as_array(p.groups()); });
}
