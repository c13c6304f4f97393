// SPDX-License-Identifier: Apache-2.0
// What this build is: read by _native.py's error messages and by the environment report.
#include <pybind11/pybind11.h>

void bind_base(pybind11::module_& module) {
  module.attr("VERSION") = DS_VERSION;
  module.attr("TORCH_VERSION") = DS_TORCH_VERSION;  // the torch that deepspeed._C was compiled against
  module.attr("CUDA_VERSION") = DS_CUDA_VERSION;    // of nvcc; empty when CUDA code was left out
}
