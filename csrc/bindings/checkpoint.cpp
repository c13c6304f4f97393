// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "base/error.h"
#include "checkpoint/manifest.h"

namespace py = pybind11;

namespace {

using ds::checkpoint::Manifest;
using ds::checkpoint::TensorRecord;

py::list files(const Manifest& manifest) {
  py::list result;
  for (const auto& file : manifest.files) {
    result.append(py::make_tuple(file.name, file.bytes, file.sums));
  }
  return result;
}

py::tuple describe(const TensorRecord& t) {
  py::list pieces;
  for (size_t i = 0; i < t.runs.size(); ++i) {
    pieces.append(py::make_tuple(t.places[i].file, t.runs[i].begin, t.runs[i].numel, t.places[i].offset));
  }
  return py::make_tuple(t.name, t.kind, t.dtype, t.shape, t.order, pieces);
}

// (file, byte offset, first wanted element, numel) of each part of elements [begin, begin + numel).
py::list parts(const Manifest& manifest, size_t tensor, int64_t begin, int64_t numel) {
  DS_CHECK_VALUE(tensor < manifest.tensors.size(), "there is no tensor " << tensor);
  const TensorRecord& t = manifest.tensors[tensor];
  DS_CHECK_VALUE(begin >= 0 && numel >= 0 && begin <= t.numel && numel <= t.numel - begin,
                 "elements [" << begin << ", +" << numel << ") are outside " << t.kind << " of '" << t.name << "' of " << t.numel);
  py::list result;
  for (const auto& part : ds::plan::parts_of(t.runs, {begin, numel})) {
    const auto& place = t.places[static_cast<size_t>(part.piece)];
    result.append(py::make_tuple(place.file, place.offset + part.piece_begin * t.item_bytes, part.want_begin, part.numel));
  }
  return result;
}

}  // namespace

void bind_checkpoint(py::module_& module) {
  py::class_<Manifest>(module, "CheckpointManifest", "A checked manifest.json; see csrc/checkpoint/manifest.h.")
      .def(py::init([](const std::string& text) { return std::make_unique<Manifest>(ds::checkpoint::parse_manifest(text)); }), py::arg("text"))
      .def_readonly("version", &Manifest::version)
      .def_readonly("block_bytes", &Manifest::block_bytes)
      .def_property_readonly("files", &files, "[(name, bytes, checksums of the blocks)]")
      .def_property_readonly("tensors",
                             [](const Manifest& manifest) {
                               py::list result;
                               for (const auto& tensor : manifest.tensors) result.append(describe(tensor));
                               return result;
                             },
                             "[(name, kind, dtype, shape, order, [(file, begin, numel, offset)])]")
      .def("parts", &parts, py::arg("tensor"), py::arg("begin"), py::arg("numel"));
  module.def("seal_manifest", [](const std::string& body) { return py::bytes(ds::checkpoint::seal_manifest(body)); }, py::arg("body"),
             "A manifest's text: `body`, a JSON object without its closing brace, and its checksum.");
}
