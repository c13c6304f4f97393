// SPDX-License-Identifier: Apache-2.0
// deepspeed._C.Transport: conversion only. Every call that may block gives the GIL up.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "comm/ledger.h"
#include "comm/make_transport.h"
#include "comm/registry.h"
#include "comm/shm/buffer.h"

namespace py = pybind11;

namespace {

using namespace ds::comm;
using Release = py::call_guard<py::gil_scoped_release>;

Tag make_tag(const std::string& phase, int64_t step, int unit) {
  Tag tag;
  tag.phase = intern(phase);
  tag.step = step;
  tag.unit = unit;
  return tag;
}

Op parse_op(const std::string& op) {
  if (op == "sum") return Op::Sum;
  if (op == "max") return Op::Max;
  if (op == "min") return Op::Min;
  DS_CHECK_VALUE(false, "op must be \"sum\", \"max\" or \"min\", got \"" << op << '"');
  return Op::Sum;
}

Options::Choice parse_choice(const std::string& choice) {
  if (choice == "auto") return Options::Auto;
  if (choice == "shm") return Options::Shm;
  if (choice == "c10d") return Options::C10d;
  DS_CHECK_VALUE(false, "choice must be \"auto\", \"shm\" or \"c10d\", got \"" << choice << '"');
  return Options::Auto;
}

ds::DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return ds::DType::F32;
    case at::kHalf: return ds::DType::F16;
    case at::kBFloat16: return ds::DType::BF16;
    case at::kDouble: return ds::DType::F64;
    case at::kLong: return ds::DType::I64;
    case at::kInt: return ds::DType::I32;
    case at::kShort: return ds::DType::I16;
    case at::kChar: return ds::DType::I8;
    case at::kByte: return ds::DType::U8;
    case at::kBool: return ds::DType::BOOL;
    default: break;
  }
  DS_CHECK_VALUE(false, "dtype " << c10::toString(type) << " cannot be reduced");
  return ds::DType::F32;
}

std::shared_ptr<Transport> from_group_name(const std::string& group, const std::string& device, const std::string& choice,
                                           int max_channels, double timeout_s, double warn_s, bool deny_proc,
                                           bool deny_sockets) {
  Options options;
  options.choice = parse_choice(choice);
  options.max_channels = max_channels;
  options.timeout_s = timeout_s;
  options.warn_s = warn_s;
  options.deny_proc = deny_proc;
  options.deny_sockets = deny_sockets;
  auto pg = group.empty() ? nullptr : c10d::resolve_process_group(group);
  return make_transport(pg, at::Device(device), options);
}

// Ctrl-C ends a blocked wait: a signal handler of Python can only run where the interpreter is asked.
void check_interrupt() {
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void without_gil(const std::function<void()>& release) {
  if (!Py_IsInitialized() || !PyGILState_Check()) return release();
  py::gil_scoped_release without;
  release();
}

// sink(list of uint8 tensors); they are valid only during the call.
ReduceSink python_sink(py::function sink, size_t part_bytes, at::Device device) {
  auto held = std::shared_ptr<py::function>(new py::function(std::move(sink)), [](py::function* f) {
    py::gil_scoped_acquire gil;
    delete f;
  });
  return [held, part_bytes, device](const void* const* srcs, int nsrc) {
    py::gil_scoped_acquire gil;
    std::vector<at::Tensor> parts;
    for (int i = 0; i < nsrc; ++i)
      parts.push_back(at::from_blob(const_cast<void*>(srcs[i]), {static_cast<int64_t>(part_bytes)}, {1}, [](void*) {},
                                    at::TensorOptions().dtype(at::kByte).device(device), device));
    (*held)(parts);
  };
}

at::Device device_of(const Transport& transport, const SymmetricBuffer& buffer) {
  return transport.device() == Device::Cpu ? at::Device(at::kCPU) : at::Device(at::kCUDA, buffer.device_index());
}

const char* state_name(CollectiveState state) {
  switch (state) {
    case CollectiveState::Issued: return "issued";
    case CollectiveState::Done: return "done";
    case CollectiveState::Failed: return "failed";
  }
  return "?";
}

py::dict as_dict(const CollectiveRecord& r) {
  return py::dict(py::arg("seq") = r.seq, py::arg("order") = r.order, py::arg("kind") = r.kind, py::arg("step") = r.tag.step,
                  py::arg("phase") = r.tag.phase, py::arg("unit") = r.tag.unit, py::arg("bytes") = r.tag.bytes,
                  py::arg("start_s") = r.start_s, py::arg("end_s") = r.end_s, py::arg("waited_s") = r.waited_s,
                  py::arg("state") = state_name(r.state));
}

py::list as_dicts(const std::vector<CollectiveRecord>& records) {
  py::list out;
  for (const auto& r : records) out.append(as_dict(r));
  return out;
}

py::list blocked(const Ledger& ledger) {
  py::list out;
  for (const auto& b : ledger.blocked()) out.append(py::make_tuple(as_dict(b.record), b.since_s));
  return out;
}

py::list tallies(const Ledger& ledger) {
  py::list out;
  for (const auto& t : ledger.tallies())
    out.append(py::dict(py::arg("kind") = t.kind, py::arg("phase") = t.phase, py::arg("bytes") = t.bytes, py::arg("number") = t.number,
                        py::arg("seconds") = t.seconds, py::arg("shortest_s") = t.shortest_s, py::arg("longest_s") = t.longest_s,
                        py::arg("waited_s") = t.waited_s));
  return out;
}

void check_writable(const at::Tensor& t, const char* name) {
  DS_CHECK_VALUE(t.is_contiguous(), name << " must be contiguous");
}

void bind_works(py::module_& m) {
  py::class_<Work, std::shared_ptr<Work>>(m, "Work").def("test", &Work::test, Release()).def("wait", &Work::wait, Release());
  py::class_<ReduceWork, Work, std::shared_ptr<ReduceWork>>(m, "ReduceWork")
      .def("drained", &ReduceWork::drained, Release())
      .def("wait_drained", &ReduceWork::wait_drained, Release());
  py::class_<SymmetricBuffer, std::shared_ptr<SymmetricBuffer>>(m, "SymmetricBuffer")
      .def_property_readonly("bytes", &SymmetricBuffer::bytes)
      .def_property_readonly("epoch", &SymmetricBuffer::epoch)
      .def("tensor", &SymmetricBuffer::tensor, "The whole buffer as uint8; the tensor keeps it alive.")
      .def("publish", &SymmetricBuffer::publish, Release());
}

using TransportClass = py::class_<Transport, std::shared_ptr<Transport>>;

void bind_collectives(TransportClass& c) {
  const auto phase = py::arg("phase") = "";
  const auto step = py::arg("step") = -1;
  const auto unit = py::arg("unit") = -1;
  c.def("allocate", &Transport::allocate, py::arg("bytes"), py::arg("folder") = "", Release());
  c.def(
      "all_gather",
      [](Transport& t, at::Tensor out, SymmetricBuffer& src, size_t offset, size_t stride, size_t bytes, const std::string& phase,
         int64_t step, int unit) {
        check_writable(out, "out");
        DS_CHECK_VALUE(out.nbytes() >= bytes * t.size(), "out has " << out.nbytes() << " bytes, needs " << bytes * t.size());
        return t.all_gather(out.data_ptr(), src, offset, stride, bytes, make_tag(phase, step, unit));
      },
      py::arg("out"), py::arg("src"), py::arg("src_offset"), py::arg("src_stride"), py::arg("bytes"), phase, step, unit,
      py::keep_alive<0, 2>(), Release());
  c.def(
      "all_gather_pieces",
      [](Transport& t, const std::vector<std::tuple<at::Tensor, int, size_t>>& pieces, SymmetricBuffer& src, size_t offset,
         size_t stride, size_t bytes, const std::string& phase, int64_t step, int unit) {
        std::vector<GatherPiece> out;
        for (const auto& [tensor, rank, at] : pieces) {
          check_writable(tensor, "a piece");
          out.push_back({tensor.data_ptr(), rank, at, tensor.nbytes()});
        }
        return t.all_gather_pieces(std::move(out), src, offset, stride, bytes, make_tag(phase, step, unit));
      },
      "pieces: list of (tensor that receives, rank, offset in that rank's part)", py::arg("pieces"), py::arg("src"),
      py::arg("src_offset"), py::arg("src_stride"), py::arg("bytes"), phase, step, unit, py::keep_alive<0, 2>());
  c.def(
      "reduce_scatter",
      [](Transport& t, SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel, py::object dtype, py::function sink,
         const std::string& phase, int64_t step, int unit) {
        const auto type = dtype_of(reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type);
        ReduceSink call = python_sink(std::move(sink), part_bytes, device_of(t, bucket));
        py::gil_scoped_release release;
        return t.reduce_scatter(bucket, offset, part_bytes, channel, type, std::move(call), make_tag(phase, step, unit));
      },
      py::arg("bucket"), py::arg("offset"), py::arg("part_bytes"), py::arg("channel"), py::arg("dtype"), py::arg("sink"), phase,
      step, unit);
  c.def(
      "all_reduce",
      [](Transport& t, std::vector<double> values, const std::string& op, const std::string& phase, int64_t step, int unit) {
        t.all_reduce(values.data(), static_cast<int>(values.size()), parse_op(op), make_tag(phase, step, unit));
        return values;
      },
      py::arg("values"), py::arg("op") = "sum", phase, step, unit, Release());
  c.def(
      "all_gather_host",
      [](Transport& t, const std::string& mine, const std::string& phase, int64_t step, int unit) {
        std::string all(mine.size() * t.size(), '\0');
        {
          py::gil_scoped_release release;
          t.all_gather_host(mine.data(), mine.size(), all.data(), make_tag(phase, step, unit));
        }
        std::vector<py::bytes> out;
        for (int r = 0; r < t.size(); ++r) out.emplace_back(all.data() + r * mine.size(), mine.size());
        return out;
      },
      "Equal-sized bytes of every rank, as a list in rank order.", py::arg("mine"), phase, step, unit);
  c.def(
      "broadcast",
      [](Transport& t, at::Tensor tensor, int src, const std::string& phase, int64_t step, int unit) {
        check_writable(tensor, "tensor");
        t.broadcast(tensor.data_ptr(), tensor.nbytes(), src, make_tag(phase, step, unit));
      },
      py::arg("tensor"), py::arg("src"), phase, step, unit, Release());
  c.def(
      "barrier",
      [](Transport& t, const std::string& phase, int64_t step, int unit) { t.barrier(make_tag(phase, step, unit)); }, phase, step,
      unit, Release());
}

void bind_transport(py::module_& m) {
  TransportClass c(m, "Transport");
  c.def_property_readonly("rank", &Transport::rank)
      .def_property_readonly("size", &Transport::size)
      .def_property_readonly("id", &Transport::id)
      .def_property_readonly("name", &Transport::name)
      .def_property_readonly("needs_matching_order", &Transport::needs_matching_order)
      .def_property_readonly("max_channels", &Transport::max_channels)
      .def("progress", &Transport::progress, Release())
      .def_static("progress_all", &Transport::progress_all, Release())
      .def("reset_counts", &Transport::reset_counts)
      .def_property_readonly("ledger", &Transport::ledger, py::return_value_policy::reference_internal)
      .def("recent", [](const Transport& t) { return as_dicts(t.recent()); }, "The last collectives, oldest first, at most 256, as dicts.")
      .def("count",
           [](const Transport& t, const std::string& phase) {
             const Counter counter = t.count(phase);
             return py::make_tuple(counter.number, counter.bytes);
           })
      .def("counts", [](const Transport& t) {
        py::dict out;
        for (const auto& [phase, counter] : t.counts()) out[py::str(phase)] = py::make_tuple(counter.number, counter.bytes);
        return out;
      });
  bind_collectives(c);
}

}  // namespace

void bind_ledger(py::module_& m) {
  py::class_<Ledger, std::shared_ptr<Ledger>>(m, "Ledger")
      .def(py::init<>())
      .def(
          "begin",
          [](Ledger& ledger, const std::string& kind, const std::string& phase, int64_t bytes, int64_t step, bool ordered) {
            return ledger.begin(intern(kind), make_tag(phase, step, -1), bytes, ordered);
          },
          "The number of a collective that starts now.", py::arg("kind"), py::arg("phase") = "", py::arg("bytes") = 0,
          py::arg("step") = -1, py::arg("ordered") = true)
      .def("end", [](Ledger& ledger, int64_t seq, bool ok) { ledger.end(seq, ok ? CollectiveState::Done : CollectiveState::Failed); },
           py::arg("seq"), py::arg("ok") = true)
      .def("recent", [](const Ledger& ledger) { return as_dicts(ledger.recent()); })
      .def("blocked", &blocked, "(collective, since when in seconds of the Unix epoch) of every blocked thread.")
      .def_property_readonly("events", &Ledger::events)
      .def("keep_tallies", &Ledger::keep_tallies, py::arg("on"))
      .def("tallies", &tallies)
      .def("keep_trace", &Ledger::keep_trace, py::arg("limit"))
      .def("take_trace", [](Ledger& ledger) { return as_dicts(ledger.take_trace()); });
}

void bind_comm(py::module_& m) {
  bind_works(m);
  bind_ledger(m);
  bind_transport(m);
  m.def("make_transport", &from_group_name,
        "Collective over the process group of that name (torch's group_name); \"\" is this process alone.", py::arg("group_name"),
        py::arg("device") = "cpu", py::arg("choice") = "auto", py::arg("max_channels") = 4, py::arg("timeout_s") = 600.0,
        py::arg("warn_s") = 30.0, py::arg("deny_proc") = false, py::arg("deny_sockets") = false, Release());
  m.def("transports", &Registry::all, "The transports of this process.");
  m.def(
      "set_stall_handler",
      [](std::optional<py::function> handler) {
        if (!handler) return Transport::set_stall_handler(nullptr);
        auto* held = new py::function(std::move(*handler));  // never released: a wait may outlive the interpreter
        Transport::set_stall_handler([held](const std::string& line) {
          py::gil_scoped_acquire gil;
          (*held)(line);
        });
      },
      "Called with one line of text when a collective stalls; None: stderr.", py::arg("handler"));
  m.def("set_exiting", &ds::comm::shm::set_exiting,
        "The interpreter is about to end: leave memory that other ranks may still read to the kernel.");
  Transport::set_interrupt_check(check_interrupt);
  Transport::set_release_guard(without_gil);
}
