// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "io/safetensors.h"

namespace py = pybind11;

namespace {

using ds::io::FileEngine;
using ds::io::SafetensorsReader;

// One engine for the process, made when first used: its threads must not exist before a fork that happens at import.
FileEngine& engine() {
  static const std::unique_ptr<FileEngine> instance = FileEngine::create({});
  return *instance;
}

ds::DType dtype_from_name(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(ds::DType::BOOL); ++i) {
    const auto dtype = static_cast<ds::DType>(i);
    if (name == ds::dtype_name(dtype)) return dtype;
  }
  DS_FAIL_VALUE("unknown dtype '" << name << "'");
}

// The bytes of a C-contiguous buffer; checked to be that many.
void* contiguous(const py::buffer_info& info, int64_t bytes, const std::string& what) {
  int64_t expected_stride = info.itemsize;
  for (py::ssize_t d = info.ndim; d-- > 0;) {
    const auto i = static_cast<size_t>(d);
    DS_CHECK_VALUE(info.shape[i] <= 1 || info.strides[i] == expected_stride, "the buffer for " << what << " is not contiguous");
    expected_stride *= info.shape[i];
  }
  DS_CHECK_VALUE(info.size * info.itemsize == bytes,
                 "the buffer for " << what << " has " << info.size * info.itemsize << " bytes, needed are " << bytes);
  return info.ptr;
}

void read_tensor(const SafetensorsReader& reader, const std::string& name, const py::buffer& into) {
  const auto& tensor = reader.find(name);
  const py::buffer_info info = into.request(/*writable=*/true);
  void* dst = contiguous(info, tensor.bytes(), "tensor '" + name + "'");
  const py::gil_scoped_release release;
  reader.read(engine(), tensor, 0, dst, tensor.bytes())->wait();
}

using PyTensor = std::tuple<std::string, std::vector<int64_t>, py::buffer>;

void save(const std::string& path, const std::map<std::string, PyTensor>& tensors, const std::map<std::string, std::string>& metadata) {
  std::vector<ds::io::TensorSource> sources;
  std::vector<py::buffer_info> infos;
  for (const auto& [name, tensor] : tensors) {
    const auto& [dtype_name, shape, buffer] = tensor;
    const ds::DType dtype = dtype_from_name(dtype_name);
    int64_t bytes = static_cast<int64_t>(ds::dtype_size(dtype));
    for (int64_t extent : shape) bytes *= extent;
    infos.push_back(buffer.request());
    sources.push_back({name, dtype, shape, contiguous(infos.back(), bytes, "tensor '" + name + "'")});
  }
  const py::gil_scoped_release release;
  ds::io::write_safetensors(engine(), path, std::move(sources), metadata);
}

}  // namespace

void bind_io(py::module_& module) {
  module.def("io_engine_name", [] { return engine().name(); }, "How files are read and written: io_uring or threads.");
  py::class_<SafetensorsReader>(module, "SafetensorsReader", "A checked safetensors file; data is read when asked for.")
      .def(py::init([](const std::string& path) { return std::make_unique<SafetensorsReader>(engine(), path); }), py::arg("path"))
      .def_property_readonly("metadata", &SafetensorsReader::metadata)
      .def_property_readonly(
          "tensors",
          [](const SafetensorsReader& reader) {
            py::dict result;
            for (const auto& tensor : reader.tensors()) {
              result[py::str(tensor.name)] = py::make_tuple(ds::dtype_name(tensor.dtype), tensor.shape);
            }
            return result;
          },
          "name -> (dtype, shape), by position in the file.")
      .def("read", &read_tensor, py::arg("name"), py::arg("into"), "Fills the contiguous buffer `into` with the tensor's bytes.");
  module.def("save_safetensors", &save, py::arg("path"), py::arg("tensors"), py::arg("metadata") = std::map<std::string, std::string>(),
             "Writes {name: (dtype, shape, buffer)} durably; `path` is whole or as it was before.");
}
