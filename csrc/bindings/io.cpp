// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "io/block_reader.h"
#include "io/crc32c.h"
#include "io/safetensors.h"
#include "io/safetensors_stream.h"
#include "platform/memory.h"

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

// Writes a pattern to a new file and reads it back; what carried it, and whether it went past the page cache.
std::pair<std::string, bool> try_files(const std::string& path, const std::string& backend, int64_t bytes) {
  DS_CHECK_VALUE(backend == "uring" || backend == "threads", "backend must be uring or threads, got '" << backend << "'");
  ds::io::EngineOptions options;
  options.backend = backend == "uring" ? ds::io::Backend::Uring : ds::io::Backend::Threads;
  options.threads = 1;
  const std::unique_ptr<FileEngine> files = FileEngine::create(options);
  ds::platform::Buffer out(static_cast<size_t>(bytes)), in(static_cast<size_t>(bytes));
  auto* pattern = static_cast<unsigned char*>(out.data());
  for (int64_t i = 0; i < bytes; ++i) pattern[i] = static_cast<unsigned char>(i * 31 + i / 4096);
  bool direct = false;
  {
    const auto file = files->open(path, ds::platform::File::Mode::Create);
    direct = file->has_direct();
    files->write(file, 0, out.data(), bytes)->wait();
  }
  const auto file = files->open(path, ds::platform::File::Mode::Read);
  files->read(file, 0, in.data(), bytes)->wait();
  DS_CHECK(std::memcmp(in.data(), out.data(), static_cast<size_t>(bytes)) == 0, path << ": other bytes came back than were written");
  return {files->name(), direct};
}

// ---- streams and checked blocks ------------------------------------------------------------------------------------

class PyStream {
 public:
  PyStream(const std::string& path, const std::vector<std::tuple<std::string, std::string, std::vector<int64_t>>>& entries,
           const std::map<std::string, std::string>& metadata, int64_t block_bytes, bool durable) {
    std::vector<ds::io::StreamEntry> list;
    for (const auto& [name, dtype, shape] : entries) list.push_back({name, dtype_from_name(dtype), shape});
    ds::io::StreamOptions options;
    options.block_bytes = block_bytes;
    options.durable = durable;
    const py::gil_scoped_release release;
    stream_ = std::make_unique<ds::io::SafetensorsStream>(engine(), path, list, metadata, options);
  }

  void write(const std::vector<py::buffer>& buffers) {
    std::vector<py::buffer_info> infos;
    for (const py::buffer& buffer : buffers) {
      infos.push_back(buffer.request());
      contiguous(infos.back(), infos.back().size * infos.back().itemsize, "the stream");
    }
    const py::gil_scoped_release release;
    for (const py::buffer_info& info : infos) open().write(info.ptr, info.size * info.itemsize);
  }

  std::pair<int64_t, std::vector<uint32_t>> finish() {
    const py::gil_scoped_release release;
    const ds::io::StreamedFile done = open().finish();
    stream_.reset();
    return {done.bytes, done.block_sums};
  }

  void abandon() {
    const py::gil_scoped_release release;
    stream_.reset();
  }

  std::vector<int64_t> offsets() { return open().offsets(); }
  int64_t bytes() { return open().bytes(); }

 private:
  ds::io::SafetensorsStream& open() {
    DS_CHECK(stream_ != nullptr, "the stream is finished");
    return *stream_;
  }
  std::unique_ptr<ds::io::SafetensorsStream> stream_;
};

using PyRange = std::tuple<int64_t, int64_t, std::string, std::string, py::buffer>;

void read_ranges(ds::io::BlockReader& reader, const std::vector<PyRange>& ranges) {
  std::vector<ds::io::ReadRange> list;
  std::vector<py::buffer_info> infos;
  for (const auto& [offset, numel, from, to, buffer] : ranges) {
    const ds::DType target = dtype_from_name(to);
    DS_CHECK_VALUE(numel >= 0, "a range has a negative length");
    infos.push_back(buffer.request(/*writable=*/true));
    void* dst = contiguous(infos.back(), numel * static_cast<int64_t>(ds::dtype_size(target)), "a range");
    list.push_back({offset, numel, dtype_from_name(from), target, dst});
  }
  const py::gil_scoped_release release;
  reader.read(std::move(list));
}

void bind_streams(py::module_& module) {
  py::register_local_exception<ds::io::ChecksumError>(module, "ChecksumError", PyExc_RuntimeError);
  py::class_<PyStream>(module, "SafetensorsStream", "Writes a new safetensors file piece by piece; an empty path only sums.")
      .def(py::init<const std::string&, const std::vector<std::tuple<std::string, std::string, std::vector<int64_t>>>&,
                    const std::map<std::string, std::string>&, int64_t, bool>(),
           py::arg("path"), py::arg("entries"), py::arg("metadata"), py::arg("block_bytes"), py::arg("durable"))
      .def_property_readonly("offsets", &PyStream::offsets, "First byte of each entry in the file.")
      .def_property_readonly("bytes", &PyStream::bytes, "Of the whole file.")
      .def("write", &PyStream::write, py::arg("buffers"), "The next bytes; the buffers are free again when it returns.")
      .def("finish", &PyStream::finish, "(bytes, checksums of the blocks); the file is durable then.")
      .def("abandon", &PyStream::abandon, "Closes the file as it is.");
  py::class_<ds::io::BlockReader>(module, "BlockReader", "Ranges of a file whose blocks have known checksums.")
      .def(py::init([](const std::string& path, int64_t file_bytes, int64_t block_bytes, std::vector<uint32_t> sums) {
             return std::make_unique<ds::io::BlockReader>(engine(), path, file_bytes, block_bytes, std::move(sums));
           }),
           py::arg("path"), py::arg("file_bytes"), py::arg("block_bytes"), py::arg("sums"))
      .def("read", &read_ranges, py::arg("ranges"), "[(byte offset, numel, dtype in the file, dtype wanted, buffer)]")
      .def("verify", &ds::io::BlockReader::verify, py::call_guard<py::gil_scoped_release>(), "Reads and sums every block.");
  module.def("crc32c", [](const py::buffer& data, uint32_t crc) {
    const py::buffer_info info = data.request();
    const void* bytes = contiguous(info, info.size * info.itemsize, "crc32c");
    return ds::io::crc32c(bytes, static_cast<size_t>(info.size * info.itemsize), crc);
  }, py::arg("data"), py::arg("crc") = 0);
  module.def("exchange_paths", &ds::platform::exchange_paths, py::arg("a"), py::arg("b"), py::call_guard<py::gil_scoped_release>(),
             "Two paths change places at once; False when the file system cannot.");
  module.def("crc32c_kind", [] { return ds::io::crc32c_forms()[0]; }, "What computes the checksum: vpclmulqdq, sse4.2, armv8 or tables.");
  module.def("convert_elements", [](const py::buffer& src, const std::string& from, const py::buffer& dst, const std::string& to) {
    const ds::DType source = dtype_from_name(from), target = dtype_from_name(to);
    const py::buffer_info in = src.request(), out = dst.request(/*writable=*/true);
    const int64_t numel = in.size * in.itemsize / static_cast<int64_t>(ds::dtype_size(source));
    const void* data = contiguous(in, numel * static_cast<int64_t>(ds::dtype_size(source)), "src");
    void* into = contiguous(out, numel * static_cast<int64_t>(ds::dtype_size(target)), "dst");
    const py::gil_scoped_release release;
    ds::io::convert_elements(data, source, into, target, numel);
  }, py::arg("src"), py::arg("from_dtype"), py::arg("dst"), py::arg("to_dtype"), "dst = src in another floating-point type.");
}

}  // namespace

void bind_io(py::module_& module) {
  bind_streams(module);
  module.def("io_engine_name", [] { return engine().name(); }, "How files are read and written: io_uring or threads.");
  module.def("try_files", &try_files, py::arg("path"), py::arg("backend"), py::arg("bytes"),
             "Writes a file by \"uring\" or \"threads\" and reads it back: (engine's name, whether it went past the page cache).");
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
