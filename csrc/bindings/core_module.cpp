// SPDX-License-Identifier: Apache-2.0
// deepspeed._core: everything that needs no torch. The build lists the bind_* functions of the files that exist
// (bindings_core.inc, one DS_BINDING(folder) a line), so adding csrc/bindings/<folder>.cpp is enough.
#include <pybind11/pybind11.h>

#include "bindings/errors.h"

#define DS_BINDING(folder) void bind_##folder(pybind11::module_&);
#include "bindings_core.inc"
#undef DS_BINDING

PYBIND11_MODULE(_core, module) {
  ds::bindings::translate_errors();
#define DS_BINDING(folder) bind_##folder(module);
#include "bindings_core.inc"
#undef DS_BINDING
}
