// The Python module velopath._core. Only the bind*.cpp files know Python; nothing here knows torch.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_stream(py::module_& m);   // bind_stream.cpp
void bind_sampler(py::module_& m);  // bind_sampler.cpp
void bind_plan(py::module_& m);     // bind_plan.cpp
void bind_loss(py::module_& m);     // bind_loss.cpp

PYBIND11_MODULE(_core, m) {
    m.doc() = "C++ core of velopath: streaming sampler and CPU cross-entropy rows.";
    bind_stream(m);
    bind_sampler(m);
    bind_plan(m);
    bind_loss(m);
}
