// Cross-entropy rows for Python: argument checks, GIL, numpy buffers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cross_entropy.h"

namespace py = pybind11;

namespace {

[[noreturn]] void refuse(const std::string& what) { throw py::value_error("cross_entropy_rows: " + what); }

void check_vector(const py::array& a, const char* name, py::ssize_t rows) {
    if (a.ndim() != 1 || a.shape(0) != rows)
        refuse(std::string(name) + " must have one entry per row, " + std::to_string(rows));
    if (rows > 1 && a.strides(0) != a.itemsize()) refuse(std::string(name) + " must be contiguous");
}

void rows_of(py::array logits, py::array targets, py::array nats, float scale, int64_t ignore_index, bool gradient,
             int threads, const std::string& instruction_set) {
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
    if (gradient && !logits.writeable()) refuse("logits are read-only, the gradient cannot be written over them");
    if (!py::isinstance<py::array_t<int64_t>>(targets)) refuse("targets must be int64");
    if (!py::isinstance<py::array_t<float>>(nats) || !nats.writeable()) refuse("nats must be writable float32");
    check_vector(targets, "targets", rows);
    check_vector(nats, "nats", rows);
    const auto* target = static_cast<const int64_t*>(targets.data());
    for (py::ssize_t r = 0; r < rows; ++r)
        if (target[r] != ignore_index && (target[r] < 0 || target[r] >= vocab))
            refuse("target " + std::to_string(target[r]) + " of row " + std::to_string(r) + " is not in [0, " +
                   std::to_string(vocab) + ")");

    velopath::CrossEntropyRows work{};
    work.logits = const_cast<void*>(logits.data());  // written only with `gradient`, checked above
    work.targets = target;
    work.nats = static_cast<float*>(nats.mutable_data());
    work.rows = rows;
    work.vocab = vocab;
    work.stride = rows > 1 ? logits.strides(0) / item : vocab;
    work.ignore_index = ignore_index;
    work.scale = scale;
    work.half = half;
    work.gradient = gradient;
    work.threads = threads;
    bool known = false;
    {
        py::gil_scoped_release released;
        known = velopath::cross_entropy_rows(work, instruction_set);
    }
    if (!known)
        refuse("instruction set \"" + instruction_set + "\" is not one of " + velopath::instruction_sets());
}

}  // namespace

void bind_loss(py::module_& m) {
    m.def("cross_entropy_rows", &rows_of, py::arg("logits"), py::arg("targets"), py::arg("nats"), py::kw_only(),
          py::arg("scale"), py::arg("ignore_index"), py::arg("gradient"), py::arg("threads"),
          py::arg("instruction_set") = "",
          "Write each row's loss in nats and, with gradient, scale * (softmax - one hot) over the logits.");
    m.def("instruction_sets", &velopath::instruction_sets, "Instruction sets usable here, best first.");
}
