// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/targets.h"

namespace py = pybind11;

void bind_kernels_core(py::module_& module) {
  module.def("compiled_targets", &ds::kernels::compiled_targets, "Instruction sets the kernels were compiled for, best first.");
  module.def("chosen_target", &ds::kernels::chosen_target, "The one they run with on this processor.");
}
