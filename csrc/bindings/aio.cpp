// SPDX-License-Identifier: Apache-2.0
// deepspeed.ops.aio and the commands that measure disks: memory by address, as tensors and buffers give it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"
#include "io/file_handle.h"

namespace py = pybind11;

namespace {

using ds::io::FileHandle;
using ds::io::LockedBuffer;

// A handle and the objects whose memory its operations use.
class PyHandle {
 public:
  explicit PyHandle(const ds::io::HandleOptions& options) : handle_(options) {}
  ~PyHandle() {
    const py::gil_scoped_release release;
    try {
      handle_.wait();
    } catch (const ds::Error&) {  // nobody asked
    }
  }

  void start(const std::variant<int, std::string>& file, bool is_write, uintptr_t address, int64_t bytes, int64_t offset, bool validate,
             py::object owner) {
    const ds::io::Operation operation = make(file, is_write, address, bytes, offset, validate);
    {
      const py::gil_scoped_release release;
      handle_.start(operation);
    }
    owners_.push_back(std::move(owner));
  }

  void run(const std::variant<int, std::string>& file, bool is_write, uintptr_t address, int64_t bytes, int64_t offset, bool validate) {
    const ds::io::Operation operation = make(file, is_write, address, bytes, offset, validate);
    const py::gil_scoped_release release;
    handle_.run(operation);
  }

  int64_t wait() {
    std::vector<py::object> owners;
    owners.swap(owners_);
    const py::gil_scoped_release release;
    return handle_.wait();
  }

  std::unique_ptr<LockedBuffer> new_buffer(int64_t bytes) {
    const py::gil_scoped_release release;
    return std::make_unique<LockedBuffer>(handle_.engine(), bytes);
  }

  int64_t pending() const { return handle_.pending(); }
  std::string engine() { return handle_.engine().name(); }

 private:
  static ds::io::Operation make(const std::variant<int, std::string>& file, bool is_write, uintptr_t address, int64_t bytes, int64_t offset,
                                bool validate) {
    ds::io::Operation operation;
    if (std::holds_alternative<int>(file)) {
      operation.descriptor = std::get<int>(file);
      DS_CHECK_VALUE(operation.descriptor >= 0, "fd must not be negative, got " << operation.descriptor);
    } else {
      operation.path = std::get<std::string>(file);
    }
    operation.is_write = is_write;
    operation.data = reinterpret_cast<void*>(address);
    operation.bytes = bytes;
    operation.offset = offset;
    operation.validate = validate;
    return operation;
  }

  FileHandle handle_;
  std::vector<py::object> owners_;
};

}  // namespace

void bind_aio(py::module_& module) {
  py::class_<LockedBuffer>(module, "LockedBuffer", py::buffer_protocol(), "Page-aligned bytes that stay in RAM, zero at first.")
      .def_buffer([](LockedBuffer& buffer) {
        return py::buffer_info(buffer.data(), 1, py::format_descriptor<uint8_t>::format(), static_cast<py::ssize_t>(buffer.bytes()));
      })
      .def_property_readonly("address", [](const LockedBuffer& buffer) { return reinterpret_cast<uintptr_t>(buffer.data()); })
      .def_property_readonly("bytes", &LockedBuffer::bytes)
      .def_property_readonly("locked", &LockedBuffer::locked, "False where the system refused (RLIMIT_MEMLOCK); transfers work all the same.")
      .def("unlock", &LockedBuffer::unlock, py::call_guard<py::gil_scoped_release>(), "Its pages need not stay in RAM; the memory stays.");
  py::class_<PyHandle>(module, "FileHandle", "Reads and writes by path, started one after the other and waited for together.")
      .def(py::init([](int64_t block_size, int queue_depth, bool single_submit, bool overlap_events, int intra_op_parallelism) {
             return std::make_unique<PyHandle>(
                 ds::io::HandleOptions{block_size, queue_depth, single_submit, overlap_events, intra_op_parallelism});
           }),
           py::kw_only(), py::arg("block_size"), py::arg("queue_depth"), py::arg("single_submit"), py::arg("overlap_events"),
           py::arg("intra_op_parallelism"))
      .def("start", &PyHandle::start, py::arg("file"), py::arg("is_write"), py::arg("address"), py::arg("bytes"), py::arg("offset"),
           py::arg("validate"), py::arg("owner"), "`file`: path or descriptor; `owner` lives until wait().")
      .def("run", &PyHandle::run, py::arg("file"), py::arg("is_write"), py::arg("address"), py::arg("bytes"), py::arg("offset"),
           py::arg("validate"), "One operation, finished when this returns.")
      .def("wait", &PyHandle::wait, "How many operations were started since the last wait; all are over.")
      .def("new_buffer", &PyHandle::new_buffer, py::arg("bytes"))
      .def_property_readonly("pending", &PyHandle::pending)
      .def_property_readonly("engine", &PyHandle::engine, "io_uring or threads.");
}
