// SPDX-License-Identifier: Apache-2.0
// What this build is: read by _native.py's error messages and by the environment report.
#include <pybind11/pybind11.h>

#include "bindings_build.inc"

void bind_base(pybind11::module_& module) {
  module.attr("VERSION") = DS_VERSION;
  module.attr("TORCH_VERSION") = DS_TORCH_VERSION;  // the torch that deepspeed._C was compiled against
  module.attr("CUDA_VERSION") = DS_CUDA_VERSION;    // of nvcc; empty when CUDA code was left out
  pybind11::dict info;
#define DS_BUILD_FACT(name, value) info[name] = value;
  DS_BUILD_FACTS
#undef DS_BUILD_FACT
  module.attr("BUILD_INFO") = info;  // how it was made: compiler, flags, CUDA architectures, what was found
}
