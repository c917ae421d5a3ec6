// velopath._core, the sampler: argument checks, GIL release, numpy buffers that return to their pool, errors.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <utility>

#include "draw.h"
#include "errors.h"
#include "sampler.h"
#include "token_stream.h"

namespace py = pybind11;
using namespace velopath;

namespace {

using Tokens = py::array_t<std::int32_t, py::array::c_style>;

void raise(const char* name, const std::string& message, const py::dict& place = py::dict()) {
    const py::object kind = py::module_::import("velopath.errors").attr(name);
    const py::object error = kind(message, **place);
    PyErr_SetObject(kind.ptr(), error.ptr());
}

void translate(std::exception_ptr pending) {
    try {
        if (pending) std::rethrow_exception(pending);
    } catch (const DataError& e) {
        py::dict place;
        place["path"] = e.path;
        if (e.sample >= 0) place["sample"] = e.sample;
        if (!e.field.empty()) place["field"] = e.field;
        raise("DataError", e.what(), place);
    } catch (const ConfigError& e) {
        raise("ConfigError", e.what());
    } catch (const PushRejectedError& e) {
        raise("PushRejectedError", e.what());
    } catch (const VelopathError& e) {
        raise("VelopathError", e.what());
    }
}

// A buffer and the arrays that own its memory. Used with the GIL held only.
struct OwnedBuffer : Buffer {
    std::vector<py::object> owners;
};

// Buffers that are neither in the ring nor with the user. Shared with every array handed out, so that those outlive the
// sampler. Used with the GIL held only, which is also its lock.
class Pool : public std::enable_shared_from_this<Pool> {
public:
    Pool(py::object allocate, py::ssize_t rows, py::ssize_t width, bool boundaries)
        : allocate_(std::move(allocate)), rows_(rows), width_(width), boundaries_(boundaries) {}

    OwnedBuffer* take() {
        if (!free_.empty()) {
            OwnedBuffer* const buffer = free_.back();
            free_.pop_back();
            return buffer;
        }
        auto made = std::make_unique<OwnedBuffer>();
        for (std::int32_t** part : {&made->tokens, &made->documents, &made->positions}) {
            if (part != &made->tokens && !boundaries_) continue;
            made->owners.push_back(allocated());
            *part = static_cast<std::int32_t*>(py::array(made->owners.back()).mutable_data());
        }
        all_.push_back(std::move(made));
        return all_.back().get();
    }

    void give(OwnedBuffer* buffer) { free_.push_back(buffer); }

    // The buffer as arrays: tokens, documents and positions, those None where they are not asked for. When they and all
    // their views are gone the buffer comes back.
    std::array<py::object, 3> hand_out(OwnedBuffer* buffer) {
        auto* loan = new Loan{shared_from_this(), buffer};
        const py::capsule base(loan, [](void* p) {
            const std::unique_ptr<Loan> done(static_cast<Loan*>(p));
            done->pool->give(done->buffer);
        });
        const auto array = [&](std::int32_t* data) -> py::object {
            if (data == nullptr) return py::none();
            return py::array_t<std::int32_t>({rows_, width_}, data, base);
        };
        return {array(buffer->tokens), array(buffer->documents), array(buffer->positions)};
    }

private:
    py::object allocated() {
        py::object array = allocate_(py::make_tuple(rows_, width_));
        const bool fits = py::isinstance<py::array>(array) && py::array(array).dtype().is(py::dtype::of<std::int32_t>()) &&
                          py::array(array).ndim() == 2 && py::array(array).shape(0) == rows_ && py::array(array).shape(1) == width_ &&
                          (py::array(array).flags() & py::array::c_style) && py::array(array).writeable();
        if (!fits)
            throw ConfigError("allocate((" + std::to_string(rows_) + ", " + std::to_string(width_) + ")) returned " +
                              py::repr(py::type::of(array)).cast<std::string>() +
                              "; expected a writable C-contiguous numpy array of that shape and dtype int32");
        return array;
    }

    struct Loan {
        std::shared_ptr<Pool> pool;
        OwnedBuffer* buffer;
    };
    py::object allocate_;
    py::ssize_t rows_, width_;
    bool boundaries_;
    std::vector<std::unique_ptr<OwnedBuffer>> all_;
    std::vector<OwnedBuffer*> free_;
};

// The core's sampler with its pool; refuses work in a forked child, where the reader threads do not exist.
class Handle {
public:
    Handle(std::vector<Source> sources, std::vector<u64> keys, const Settings& s, std::vector<u64> shares, py::object allocate)
        : pid_(::getpid()), boundaries_(s.boundaries),
          padded_(std::any_of(sources.begin(), sources.end(), [](const Source& source) { return source.packing != nullptr; })),
          pool_(std::make_shared<Pool>(std::move(allocate), static_cast<py::ssize_t>(s.rows),
                                       static_cast<py::ssize_t>(s.row_tokens + 1), s.boundaries)) {
        std::vector<Buffer*> ring;
        for (u64 i = 0; i < Sampler::ring_size(s); ++i) ring.push_back(pool_->take());
        sampler_ = std::make_unique<Sampler>(std::move(sources), std::move(keys), s, std::move(shares), std::move(ring));
    }

    ~Handle() {
        if (::getpid() != pid_) {  // its threads and locks stayed in the parent: neither joined nor freed here
            static_cast<void>(sampler_.release());
            return;
        }
        const py::gil_scoped_release free;
        if (sampler_->close()) {
            sampler_.reset();
            return;
        }
        static_cast<void>(sampler_.release());  // a thread still hangs in it, and in a buffer
        new std::shared_ptr<Pool>(std::move(pool_));
    }

    Sampler& core() const {
        if (::getpid() != pid_)
            throw VelopathError("the sampler was opened in process " + std::to_string(pid_) + ", this is its fork " +
                                std::to_string(::getpid()) + "; open the sampler after forking");
        return *sampler_;
    }

    py::object next() {
        Sampler& sampler = core();
        OwnedBuffer* const spare = pool_->take();
        std::optional<Handed> handed;
        try {
            const py::gil_scoped_release free;
            handed = sampler.next(spare, [] {
                const py::gil_scoped_acquire hold;
                if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            });
        } catch (...) {
            pool_->give(spare);
            throw;
        }
        if (!handed) {
            pool_->give(spare);
            return py::none();
        }
        const auto rows = static_cast<py::ssize_t>(handed->domains.size());
        const auto copied = [](bool asked, const std::vector<std::int32_t>& values) -> py::object {
            if (!asked) return py::none();
            return py::array_t<std::int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
        };
        const auto [tokens, documents, positions] = pool_->hand_out(static_cast<OwnedBuffer*>(handed->buffer));
        return py::make_tuple(tokens, py::array_t<std::int32_t>(rows, handed->domains.data()), handed->step, handed->weights_id,
                              py::array_t<std::int64_t>(rows, handed->row_ids.data()), copied(padded_, handed->counts), documents,
                              positions, copied(boundaries_, handed->cu_seqlens));
    }

    void close() {
        if (::getpid() != pid_) return;
        const py::gil_scoped_release free;
        sampler_->close();
    }

private:
    const int pid_;
    const bool boundaries_, padded_;
    std::shared_ptr<Pool> pool_;
    std::unique_ptr<Sampler> sampler_;
};

// Every call takes the sampler's mutex, so none may hold the GIL meanwhile: a worker never wants the GIL, but a poll does.
template <class F>
auto unlocked(const Handle& handle, F&& call) {
    Sampler& sampler = handle.core();
    const py::gil_scoped_release free;
    return call(sampler);
}

std::shared_ptr<Handle> open_sampler(const std::vector<std::shared_ptr<TokenStream>>& streams,
                                     const std::vector<std::shared_ptr<Packing>>& packings, std::vector<u64> keys, std::vector<u64> shares,
                                     u64 seed, u64 rank, u64 world, u64 rows, u64 row_tokens, const std::string& exhaustion, u64 start_step,
                                     u64 threads, u64 prefetch, double stall_seconds, u64 window, bool boundaries, std::int32_t padding,
                                     bool staged, py::object allocate) {
    if (streams.empty() || streams.size() != keys.size() || streams.size() != shares.size() || streams.size() != packings.size() ||
        rank >= world || rows == 0 || row_tokens == 0 || prefetch == 0)
        throw ConfigError("the arguments of the sampler do not fit each other");
    std::vector<Source> sources;
    for (std::size_t k = 0; k < streams.size(); ++k) sources.push_back({streams[k], packings[k]});
    const Exhaustion policy = exhaustion == "repeat"        ? Exhaustion::repeat
                              : exhaustion == "renormalise" ? Exhaustion::renormalise
                                                            : Exhaustion::stop;
    const Settings settings{seed,     rank,     world,         rows,   row_tokens, policy, start_step,
                            threads,  prefetch, stall_seconds, window, boundaries, padding, staged};
    return std::make_shared<Handle>(std::move(sources), std::move(keys), settings, std::move(shares), std::move(allocate));
}

template <class T>
py::array_t<T> as_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<i64> windowed_order(u64 tokens, u64 row_tokens, u64 offset, const std::vector<u64>& shards, u64 window, u64 key,
                                const std::vector<u64>& items) {
    const Epoch epoch{tokens, row_tokens, tokens / row_tokens, offset};
    if (shards.empty() || shards[0] != 0 || window == 0 || epoch.rows == 0) throw ConfigError("the arguments of the order do not fit each other");
    const WindowedOrder order(epoch, shards, window, key);
    std::vector<i64> result;
    for (const u64 item : items) result.push_back(static_cast<i64>(order(item)));
    return as_array(result);
}

using MixTuple = std::tuple<u64, u64, std::vector<u64>>;

py::array_t<i64> count_rows(const Handle& handle, u64 steps) {
    const auto counts = unlocked(handle, [steps](Sampler& s) { return s.count(steps); });
    const u64 k = handle.core().domain_count();
    py::array_t<i64> out({static_cast<py::ssize_t>(counts.size()), static_cast<py::ssize_t>(k)});
    i64* at = out.mutable_data();
    for (const auto& row : counts)
        for (const u64 n : row) *at++ = static_cast<i64>(n);
    return out;
}

void load_state(const Handle& handle, u64 step, std::vector<u64> drawn, std::vector<i64> error, const std::vector<MixTuple>& mixes) {
    std::vector<Mix> loaded;
    for (const auto& [id, from_step, shares] : mixes) loaded.push_back({id, from_step, shares});
    unlocked(handle, [&](Sampler& s) { s.load({step, std::move(drawn), std::move(error)}, std::move(loaded)); });
}

using Needs = std::vector<std::vector<std::pair<std::uint32_t, std::uint32_t>>>;

std::tuple<u64, u64, Needs, u64, std::vector<u64>, std::vector<i64>> scout(const Handle& handle, std::optional<u64> step, std::vector<u64> drawn,
                                                                           std::vector<i64> error, u64 steps) {
    std::optional<Cursor> from;
    if (step) {
        if (drawn.size() != handle.core().domain_count() || error.size() != drawn.size())
            throw ConfigError("the cursor does not fit the sampler's domains");
        from = Cursor{*step, std::move(drawn), std::move(error)};
    }
    Scouted found = unlocked(handle, [&](Sampler& s) { return s.scout(std::move(from), steps); });
    return {found.plan, found.first, std::move(found.shards), found.behind.step, found.behind.drawn, found.behind.error};
}

void fail(const Handle& handle, const std::string& problem, const std::string& path, std::optional<u64> plan, i64 sample,
          const std::string& field) {
    const auto error = path.empty() ? std::make_exception_ptr(VelopathError(problem))
                                    : std::make_exception_ptr(DataError(problem, path, sample, field));
    unlocked(handle, [&](Sampler& s) { s.fail(error, plan); });
}

py::array_t<i64> permute(const py::array_t<i64, py::array::c_style | py::array::forcecast>& items, u64 n, u64 key) {
    const Bijection bijection(n, key);
    py::array_t<i64> out(items.size());
    for (py::ssize_t i = 0; i < items.size(); ++i) {
        if (items.at(i) < 0 || static_cast<u64>(items.at(i)) >= n) throw ConfigError("an item is outside [0, n)");
        out.mutable_at(i) = static_cast<i64>(bijection(static_cast<u64>(items.at(i))));
    }
    return out;
}

std::pair<std::vector<std::size_t>, std::vector<i64>> give_rows(const std::vector<u64>& shares, std::vector<i64> error, u64 rows) {
    if (shares.size() != error.size()) throw ConfigError("shares and errors differ in number");
    std::vector<std::size_t> given;
    RowGiver giver(shares, error, rows);
    for (u64 i = 0; i < rows; ++i) given.push_back(giver.next());
    giver.settle();
    return {std::move(given), std::move(error)};
}

}  // namespace

void bind_sampler(py::module_& m) {
    py::register_local_exception_translator(&translate);
    py::class_<Handle, std::shared_ptr<Handle>>(m, "Sampler")
        .def(py::init(&open_sampler), py::arg("streams"), py::arg("packings"), py::kw_only(), py::arg("keys"), py::arg("shares"),
             py::arg("seed"), py::arg("rank"), py::arg("world"), py::arg("rows"), py::arg("row_tokens"), py::arg("exhaustion"),
             py::arg("start_step"), py::arg("threads"), py::arg("prefetch"), py::arg("stall_seconds"), py::arg("window"),
             py::arg("boundaries"), py::arg("padding"), py::arg("staged"), py::arg("allocate"))
        .def("next", &Handle::next)
        .def("close", &Handle::close)
        .def_property_readonly("step", [](const Handle& h) { return unlocked(h, [](Sampler& s) { return s.step(); }); })
        .def("begin_push", [](const Handle& h, std::optional<u64> at) { return unlocked(h, [at](Sampler& s) { return s.begin_push(at); }); },
             py::arg("at_step"))
        .def("commit_push",
             [](const Handle& h, std::vector<u64> shares) { unlocked(h, [&](Sampler& s) { s.commit_push(std::move(shares)); }); },
             py::arg("shares"))
        .def("abort_push", [](const Handle& h) { unlocked(h, [](Sampler& s) { s.abort_push(); }); })
        .def("cursor_at",
             [](const Handle& h, u64 step) {
                 const Cursor c = unlocked(h, [step](Sampler& s) { return s.cursor_at(step); });
                 return std::make_pair(c.drawn, c.error);
             },
             py::arg("step"))
        .def("mixes_at",
             [](const Handle& h, u64 step) {
                 std::vector<MixTuple> result;
                 for (const Mix& mix : unlocked(h, [step](Sampler& s) { return s.mixes_at(step); }))
                     result.emplace_back(mix.id, mix.from_step, mix.shares);
                 return result;
             },
             py::arg("step"))
        .def("oldest_mix", [](const Handle& h) { return unlocked(h, [](Sampler& s) { return s.oldest_mix(); }); })
        .def("count", &count_rows, py::arg("steps"))
        .def("ids",
             [](const Handle& h, u64 step) {
                 std::vector<std::int32_t> domains;
                 std::vector<i64> ids;
                 for (const auto& [row, place] : unlocked(h, [step](Sampler& s) { return s.rows_at(step); })) {
                     domains.push_back(static_cast<std::int32_t>(row.domain));
                     ids.push_back(static_cast<i64>(place.id));
                 }
                 return std::make_pair(as_array(domains), as_array(ids));
             },
             py::arg("step"))
        .def("exposure",
             [](const Handle& h) {
                 std::vector<std::array<u64, 4>> result;
                 for (const Exposure& e : unlocked(h, [](Sampler& s) { return s.exposure(); }))
                     result.push_back({e.rows, e.tokens, e.epoch_rows, e.unique_tokens});
                 return result;
             })
        .def("scout", &scout, py::arg("step"), py::arg("drawn"), py::arg("error"), py::arg("steps"))
        .def("release", [](const Handle& h, u64 until, u64 plan) { return unlocked(h, [=](Sampler& s) { return s.release(until, plan); }); },
             py::arg("until"), py::arg("plan"))
        .def("fail", &fail, py::arg("problem"), py::arg("path") = std::string(), py::kw_only(), py::arg("plan"),
             py::arg("sample") = -1, py::arg("field") = std::string())
        .def_property_readonly("waits", [](const Handle& h) { return unlocked(h, [](Sampler& s) { return s.waits(); }); })
        .def_property_readonly("released", [](const Handle& h) { return unlocked(h, [](Sampler& s) { return s.released(); }); })
        .def("load", &load_state, py::arg("step"), py::arg("drawn"), py::arg("error"), py::arg("mixes"));
    m.def("windowed_order", &windowed_order, py::arg("tokens"), py::arg("row_tokens"), py::arg("offset"), py::arg("shards"),
          py::arg("window"), py::arg("key"), py::arg("items"));
    m.def("permute", &permute, py::arg("items"), py::arg("n"), py::arg("key"));
    m.def("give_rows", &give_rows, py::arg("shares"), py::arg("error"), py::arg("rows"));
}
