// velopath._core, the plan alone: which rows a step reads, without any data. For replays and for the record of a run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "planner.h"

namespace py = pybind11;
using namespace velopath;

namespace {

using Drawn = std::tuple<py::array_t<std::int32_t>, py::array_t<i64>, std::vector<u64>, std::vector<i64>>;

// Steps step ... step + steps - 1 of one mix, fewer where the stream ends; and the cursor behind them.
Drawn plan_rows(const std::vector<u64>& keys, const std::vector<u64>& tokens, const std::vector<u64>& shares, u64 seed, u64 global_rows,
                u64 row_tokens, const std::string& exhaustion, u64 step, std::vector<u64> drawn, std::vector<i64> error, u64 steps,
                const std::vector<u64>& bins, u64 window, const std::vector<std::vector<u64>>& shards) {
    const auto fits = [&](std::size_t n) { return n == keys.size(); };
    if (keys.empty() || !fits(tokens.size()) || !fits(shares.size()) || !fits(drawn.size()) || !fits(error.size()) || row_tokens == 0 ||
        global_rows == 0 || !(bins.empty() || fits(bins.size())) || (window > 0 && !fits(shards.size())) ||
        std::any_of(tokens.begin(), tokens.end(), [&](u64 n) { return n == 0 || (bins.empty() && n < row_tokens); }))
        throw ConfigError("the arguments of the plan do not fit each other");
    std::vector<Domain> domains;
    for (std::size_t k = 0; k < keys.size(); ++k) {
        domains.push_back({keys[k], tokens[k], bins.empty() ? 0 : bins[k], !bins.empty(), window > 0 ? shards[k] : std::vector<u64>{}});
        const std::vector<u64>& begins = domains.back().shards;
        const u64 laid = bins.empty() ? tokens[k] : bins[k];
        if (laid == 0 || (window > 0 && (begins.empty() || begins[0] != 0 || begins.back() >= laid ||
                                         !std::is_sorted(begins.begin(), begins.end()))))
            throw ConfigError("the arguments of the plan do not fit each other");
    }
    const Exhaustion policy = exhaustion == "repeat"        ? Exhaustion::repeat
                              : exhaustion == "renormalise" ? Exhaustion::renormalise
                                                            : Exhaustion::stop;
    const Planner planner(std::move(domains), seed, global_rows, row_tokens, policy, window);
    Cursor cursor{step, std::move(drawn), std::move(error)};
    std::vector<std::int32_t> which;
    std::vector<i64> ids;
    u64 done = 0;
    {
        const py::gil_scoped_release free;
        std::vector<Row> rows;
        for (; done < steps; ++done) {
            Cursor next = cursor;
            if (!planner.draw(next, shares, rows)) break;
            cursor = std::move(next);
            for (const Row& row : rows) {
                which.push_back(static_cast<std::int32_t>(row.domain));
                ids.push_back(static_cast<i64>(planner.place(row).id));
            }
        }
    }
    const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(done), static_cast<py::ssize_t>(global_rows)};
    return {py::array_t<std::int32_t>(shape, which.data()), py::array_t<i64>(shape, ids.data()), std::move(cursor.drawn),
            std::move(cursor.error)};
}

}  // namespace

void bind_plan(py::module_& m) {
    m.def("plan_rows", &plan_rows, py::arg("keys"), py::arg("tokens"), py::arg("shares"), py::kw_only(), py::arg("seed"),
          py::arg("global_rows"), py::arg("row_tokens"), py::arg("exhaustion"), py::arg("step"), py::arg("drawn"), py::arg("error"),
          py::arg("steps"), py::arg("bins"), py::arg("window"), py::arg("shards"));
}
