// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include "base/error.h"
#include "platform/file.h"

namespace ds::bindings {

// ds::ValueError -> ValueError, platform::FileError -> OSError with its errno, any other ds::Error -> RuntimeError. Local to the calling
// extension module, because each module has its own copy of the exception types.
inline void translate_errors() {
  pybind11::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.message.c_str());   // for the caller, who has no use for the place in here
    } catch (const platform::FileError& e) {
      if (e.code == 0) {
        PyErr_SetString(PyExc_OSError, e.what());
      } else {  // the two-argument form becomes FileNotFoundError, PermissionError and so on by itself
        PyErr_SetObject(PyExc_OSError, pybind11::make_tuple(e.code, e.what()).ptr());
      }
    } catch (const Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  });
}

}  // namespace ds::bindings
