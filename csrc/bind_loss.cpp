// Cross-entropy rows for Python: argument checks, GIL, numpy buffers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "cross_entropy.h"

namespace py = pybind11;

namespace {

using Vector = std::optional<py::array>;

[[noreturn]] void refuse(const std::string& what) { throw py::value_error("cross-entropy rows: " + what); }

struct Logits {
    void* data;
    int64_t rows, vocab, stride;
    bool half;
};

Logits logits_of(const py::array& logits, bool written) {
    const bool full = py::isinstance<py::array_t<float>>(logits);
    const bool half = py::isinstance<py::array_t<uint16_t>>(logits);
    if (!full && !half) refuse("logits must be float32, or uint16 holding bf16 bits");
    if (logits.ndim() != 2) refuse("logits must have 2 dimensions, they have " + std::to_string(logits.ndim()));
    const auto rows = logits.shape(0);
    const auto vocab = logits.shape(1);
    if (vocab < 1) refuse("logits have no columns");
    const auto item = logits.itemsize();
    if (vocab > 1 && logits.strides(1) != item) refuse("the columns of logits must be contiguous");
    if (rows > 1 && (logits.strides(0) < vocab * item || logits.strides(0) % item))
        refuse("the rows of logits overlap or are not aligned");
    if (written && !logits.writeable()) refuse("logits are read-only, the gradient cannot be written over them");
    return {const_cast<void*>(logits.data()), rows, vocab, rows > 1 ? logits.strides(0) / item : vocab, half};
}

void check_vector(const py::array& a, const char* name, int64_t rows) {
    if (a.ndim() != 1 || a.shape(0) != rows)
        refuse(std::string(name) + " must have one entry per row, " + std::to_string(rows));
    if (rows > 1 && a.strides(0) != a.itemsize()) refuse(std::string(name) + " must be contiguous");
}

const int64_t* targets_of(const py::array& targets, int64_t rows) {
    if (!py::isinstance<py::array_t<int64_t>>(targets)) refuse("targets must be int64");
    check_vector(targets, "targets", rows);
    return static_cast<const int64_t*>(targets.data());
}

float* writable(py::array& a, const char* name, int64_t rows) {
    if (!py::isinstance<py::array_t<float>>(a) || !a.writeable())
        refuse(std::string(name) + " must be writable float32");
    check_vector(a, name, rows);
    return static_cast<float*>(a.mutable_data());
}

float* writable(Vector& a, const char* name, int64_t rows) { return a ? writable(*a, name, rows) : nullptr; }

void known(bool found, const std::string& instruction_set) {
    if (!found)
        refuse("instruction set \"" + instruction_set + "\" is not one of " + velopath::instruction_sets());
}

void rows_of(py::array logits, py::array targets, py::array nats, float scale, int64_t ignore_index, bool gradient,
             int threads, const std::string& instruction_set, Vector scales, Vector lse, Vector losses,
             Vector correct, double logit_scale, double softcap, double label_smoothing, double z_loss) {
    const Logits x = logits_of(logits, gradient);
    velopath::CrossEntropyRows work{};
    work.logits = x.data;  // written only with `gradient`
    work.rows = x.rows;
    work.vocab = x.vocab;
    work.stride = x.stride;
    work.half = x.half;
    work.targets = targets_of(targets, x.rows);
    for (int64_t r = 0; r < x.rows; ++r)
        if (work.targets[r] != ignore_index && (work.targets[r] < 0 || work.targets[r] >= x.vocab))
            refuse("target " + std::to_string(work.targets[r]) + " of row " + std::to_string(r) + " is not in [0, " +
                   std::to_string(x.vocab) + ")");
    work.nats = writable(nats, "nats", x.rows);
    if (scales.has_value() != lse.has_value() || scales.has_value() != losses.has_value())
        refuse("scales, lse and losses go together");
    if (scales) {
        if (!py::isinstance<py::array_t<float>>(*scales)) refuse("scales must be float32");
        check_vector(*scales, "scales", x.rows);
        work.scales = static_cast<const float*>(scales->data());
    }
    work.lse = writable(lse, "lse", x.rows);
    work.losses = writable(losses, "losses", x.rows);
    work.correct = writable(correct, "correct", x.rows);
    work.ignore_index = ignore_index;
    work.scale = scale;
    work.gradient = gradient;
    work.threads = threads;
    work.options = {logit_scale, softcap, label_smoothing, z_loss};
    bool found = false;
    {
        py::gil_scoped_release released;
        found = velopath::cross_entropy_rows(work, instruction_set);
    }
    known(found, instruction_set);
}

// `numbers` are (count, rows) float64: the statistics, or the factors of the gradient.
void shard(py::array& logits, py::array& targets, py::array& numbers, int64_t count, bool gradient,
           double logit_scale, double softcap, int threads, const std::string& instruction_set) {
    const Logits x = logits_of(logits, gradient);
    if (!py::isinstance<py::array_t<double, py::array::c_style>>(numbers) || numbers.ndim() != 2 ||
        numbers.shape(0) != count || numbers.shape(1) != x.rows || (!gradient && !numbers.writeable()))
        refuse("expected a contiguous float64 array of shape (" + std::to_string(count) + ", " +
               std::to_string(x.rows) + ")");
    velopath::ShardRows work{};
    work.logits = x.data;
    work.rows = x.rows;
    work.vocab = x.vocab;
    work.stride = x.stride;
    work.half = x.half;
    work.targets = targets_of(targets, x.rows);
    if (gradient) {
        work.factors = static_cast<const double*>(numbers.data());
    } else {
        work.statistics = static_cast<double*>(numbers.mutable_data());
    }
    work.threads = threads;
    work.options = {logit_scale, softcap, 0.0, 0.0};
    bool found = false;
    {
        py::gil_scoped_release released;
        found = velopath::shard_rows(work, instruction_set);
    }
    known(found, instruction_set);
}

void shard_statistics(py::array logits, py::array targets, py::array out, double logit_scale, double softcap,
                      int threads, const std::string& instruction_set) {
    shard(logits, targets, out, velopath::STATISTICS, false, logit_scale, softcap, threads, instruction_set);
}

void shard_gradient(py::array logits, py::array targets, py::array factors, double logit_scale, double softcap,
                    int threads, const std::string& instruction_set) {
    shard(logits, targets, factors, velopath::FACTORS, true, logit_scale, softcap, threads, instruction_set);
}

}  // namespace

void bind_loss(py::module_& m) {
    m.def("cross_entropy_rows", &rows_of, py::arg("logits"), py::arg("targets"), py::arg("nats"), py::kw_only(),
          py::arg("scale"), py::arg("ignore_index"), py::arg("gradient"), py::arg("threads"),
          py::arg("instruction_set") = "", py::arg("scales") = py::none(), py::arg("lse") = py::none(),
          py::arg("losses") = py::none(), py::arg("correct") = py::none(), py::arg("logit_scale") = 1.0,
          py::arg("softcap") = 0.0, py::arg("label_smoothing") = 0.0, py::arg("z_loss") = 0.0,
          "Write each row's loss in nats and, with gradient, scale * (softmax - one hot) over the logits.");
    m.def("shard_statistics", &shard_statistics, py::arg("logits"), py::arg("targets"), py::arg("out"), py::kw_only(),
          py::arg("logit_scale"), py::arg("softcap"), py::arg("threads"), py::arg("instruction_set") = "",
          "Write the (7, N) statistics of rows of which the logits are some columns.");
    m.def("shard_gradient", &shard_gradient, py::arg("logits"), py::arg("targets"), py::arg("factors"), py::kw_only(),
          py::arg("logit_scale"), py::arg("softcap"), py::arg("threads"), py::arg("instruction_set") = "",
          "Write the gradient over such columns, from (4, N) factors of the whole rows.");
    m.def("instruction_sets", &velopath::instruction_sets, "Instruction sets usable here, best first.");
}
