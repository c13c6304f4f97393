// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "platform/cpu.h"
#include "platform/env.h"

namespace py = pybind11;

void bind_platform(py::module_& module) {
  module.def("cpu_features", &ds::platform::cpu_feature_names, "Names of the instruction sets this processor has, weakest first.");
  module.def("cpu_model_name", &ds::platform::cpu_model_name);
  module.def("available_cores", &ds::platform::available_cores, "Cores this process may run on.");
  module.def(
      "environment_table",
      [] {
        py::list rows;
        for (const auto& variable : ds::platform::env_table()) {
          rows.append(py::make_tuple(variable.name, variable.fallback == nullptr ? py::none() : py::object(py::str(variable.fallback)),
                                     variable.meaning));
        }
        return rows;
      },
      "(name, default or None, meaning) of every environment variable that the C++ reads.");
}
