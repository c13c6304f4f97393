// SPDX-License-Identifier: Apache-2.0
// deepspeed._C: parameter store, gradient reducer, scheduler, autograd hooks and the fused step. Conversion only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/tensor_dtypes.h>

#include <map>

#include "optim/device_ops.h"
#include "optim/slice_optimizer.h"
#include "optim/split_master.h"
#include "zero/autograd_hooks.h"
#include "zero/file_rest.h"
#include "zero/grad_reducer.h"
#include "zero/host_rest.h"
#include "zero/param_store.h"
#include "zero/unit_scheduler.h"

namespace py = pybind11;
using namespace ds;
using Release = py::call_guard<py::gil_scoped_release>;

namespace {

at::ScalarType scalar_type(const py::handle& dtype) {
  DS_CHECK_VALUE(THPDtype_Check(dtype.ptr()), "expected a torch.dtype");
  return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

py::object dtype_object(at::ScalarType t) {
  return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(t)));
}

// Note [A freed parameter wears a guard class]
// Raw access to a freed parameter would be a crash. Its Python object therefore has its __class__ swapped for a guard
// whose __torch_function__ gathers or raises; gathering gives the own class back. `ds_status` follows.
class Guards {
 public:
  void set_classes(py::object guard_of, py::object available, py::object freed) {
    guard_of_ = std::move(guard_of);
    available_ = std::move(available);
    freed_ = std::move(freed);
  }
  void set_unit(int unit, py::list params) {
    if (static_cast<size_t>(unit) >= units_.size()) units_.resize(unit + 1);
    units_[unit].clear();
    for (py::handle p : params) {
      Entry e;
      e.param = py::reinterpret_borrow<py::object>(p);
      e.own_class = py::type::of(p);
      e.guard_class = guard_of_(e.own_class);
      units_[unit].push_back(std::move(e));
    }
  }
  void drop(int unit, py::handle param) {
    if (static_cast<size_t>(unit) >= units_.size()) return;   // one rank owns everything: nothing is ever guarded
    auto& entries = units_[unit];
    for (size_t i = 0; i < entries.size(); ++i) {
      if (entries[i].param.is(param)) {
        entries.erase(entries.begin() + static_cast<int64_t>(i));
        return;
      }
    }
  }
  void bind(int unit, bool available) {
    py::gil_scoped_acquire gil;
    if (static_cast<size_t>(unit) >= units_.size()) return;
    for (Entry& e : units_[unit]) {
      py::object& cls = available ? e.own_class : e.guard_class;
      if (!cls.is_none() && PyObject_SetAttrString(e.param.ptr(), "__class__", cls.ptr()) != 0) throw py::error_already_set();
      if (PyObject_SetAttrString(e.param.ptr(), "ds_status", (available ? available_ : freed_).ptr()) != 0) throw py::error_already_set();
    }
  }
  void clear() { units_.clear(); }

 private:
  struct Entry {
    py::object param, own_class, guard_class;
  };
  py::object guard_of_, available_, freed_;
  std::vector<std::vector<Entry>> units_;
};

class PyStore : public zero::ParamStore {
 public:
  PyStore(zero::Groups groups, at::Device device, zero::StoreOptions options)
      : ParamStore(std::move(groups), device, options) {
    set_bind_callback([this](int unit, bool available) { guards.bind(unit, available); });
  }
  Guards guards;
};

py::dict flat_info(PyStore& store, int f) {
  const zero::Flat& flat = store.flats().at(f);
  py::list slots;
  for (size_t i = 0; i < flat.layout.slots.size(); ++i) {
    slots.append(py::make_tuple(flat.params[i], flat.layout.slots[i].offset, flat.layout.slots[i].numel));
  }
  py::dict d;
  d["unit"] = flat.unit;
  d["dtype"] = dtype_object(flat.dtype);
  d["trainable"] = flat.trainable;
  d["shard_numel"] = flat.layout.shard_numel;
  d["numel"] = flat.layout.numel();
  d["slots"] = slots;
  return d;
}

int add_unit(PyStore& store, const std::string& name, std::vector<at::Tensor> params, std::vector<std::string> names,
             std::vector<bool> trainable, const py::list& dtypes, bool keep_master, bool broadcast, bool persistent,
             bool vacant, bool state_rests) {
  zero::UnitRequest request;
  request.name = name;
  request.params = std::move(params);
  request.names = std::move(names);
  request.trainable = std::move(trainable);
  for (py::handle d : dtypes) request.dtypes.push_back(scalar_type(d));
  request.keep_master = keep_master;
  request.broadcast = broadcast;
  request.persistent = persistent;
  request.vacant = vacant;
  request.state_rests = state_rests;
  py::gil_scoped_release release;
  return store.add_unit(std::move(request));
}

void bind_store(py::module_& m) {
  py::class_<PyStore, std::shared_ptr<PyStore>>(m, "ParamStore", "Where parameters live; see csrc/zero/param_store.h.")
      .def(py::init([](std::shared_ptr<comm::Transport> world, std::shared_ptr<comm::Transport> shard,
                       std::shared_ptr<comm::Transport> reduce, std::shared_ptr<comm::Transport> replicate,
                       const std::string& device, bool shard_params, bool full_master, int64_t align_numel,
                       std::shared_ptr<optim::SliceRest> rest, std::shared_ptr<optim::SliceRest> parameter_rest,
                       const std::string& folder, int64_t most_in_memory, bool split_master) {
             zero::StoreOptions options{shard_params, full_master,    align_numel,  rest, parameter_rest,
                                        folder,       most_in_memory, split_master};
             return std::make_shared<PyStore>(zero::Groups{world, shard, reduce, replicate}, at::Device(device), std::move(options));
           }),
           py::arg("world"), py::arg("shard"), py::arg("reduce"), py::arg("replicate"), py::arg("device"), py::arg("shard_params"),
           py::arg("full_master"), py::arg("align_numel") = 64, py::arg("rest") = nullptr, py::arg("parameter_rest") = nullptr,
           py::arg("folder") = "", py::arg("most_in_memory") = 0, py::arg("split_master") = false)
      .def("add_unit", &add_unit, py::arg("name"), py::arg("params"), py::arg("names"), py::arg("trainable"), py::arg("dtypes"),
           py::arg("keep_master"), py::arg("broadcast"), py::arg("persistent"), py::arg("vacant") = false, py::arg("state_rests") = true)
      .def("gather", [](PyStore& s, int unit, const std::string& phase, bool prefetch) { s.gather(unit, comm::intern(phase), prefetch); },
           py::arg("unit"), py::arg("phase"), py::arg("prefetch") = false, Release())
      .def("release", &PyStore::release, py::arg("unit"), py::arg("part_from_holders") = false, Release())
      .def("check_params", &PyStore::check_params, Release())
      .def("stay_frozen", [](PyStore& s, int param) { s.params().at(param).stays_frozen = true; })
      .def("adopt_written", &PyStore::adopt_written, Release())
      .def("forget_written", &PyStore::forget_written)
      .def("release_all", &PyStore::release_all, Release())
      .def("pin", &PyStore::pin)
      .def("unpin", &PyStore::unpin)
      .def("pins", [](PyStore& s, int unit) { return s.units().at(unit).pins; })
      .def("broadcast_full", &PyStore::broadcast_full, Release())
      .def("write_back", &PyStore::write_back, Release())
      .def("publish_all", &PyStore::publish_all, Release())
      .def("refresh_full", &PyStore::refresh_full, Release())
      .def("drop_param",
           [](PyStore& s, int param, py::handle object) {
             s.guards.drop(s.flats().at(s.params().at(param).flat).unit, object);
             s.drop_param(param);
           })
      .def("set_guard_classes", [](PyStore& s, py::object guard_of, py::object available, py::object freed) {
        s.guards.set_classes(guard_of, available, freed);
      })
      .def("set_guard", [](PyStore& s, int unit, py::list params) { s.guards.set_unit(unit, params); })
      .def("rebind", [](PyStore& s, int unit) { s.guards.bind(unit, s.units().at(unit).state == zero::UnitState::Gathered); })
      .def("clear_guards", [](PyStore& s) { s.guards.clear(); })
      .def("is_gathered", [](PyStore& s, int unit) { return s.units().at(unit).state == zero::UnitState::Gathered; })
      .def("is_persistent", [](PyStore& s, int unit) { return s.units().at(unit).persistent; })
      .def("unit_name", [](PyStore& s, int unit) { return s.units().at(unit).name; })
      .def("unit_flats", [](PyStore& s, int unit) { return s.units().at(unit).flats; })
      .def("param_name", [](PyStore& s, int p) { return s.params().at(p).name; })
      .def("param_place", [](PyStore& s, int p) {
        const zero::Param& param = s.params().at(p);
        return py::make_tuple(s.flats().at(param.flat).unit, param.flat, param.slot);
      })
      .def("slice_of", [](PyStore& s, int p, int rank) {
        const zero::Param& param = s.params().at(p);
        const plan::Slice slice = plan::slice_of(s.flats().at(param.flat).layout, param.slot, rank);
        return py::make_tuple(slice.param_begin, slice.shard_begin, slice.numel);
      })
      .def("gather_slices", &PyStore::gather_slices, py::arg("param"), py::arg("mine"), Release())
      .def("flat_info", &flat_info)
      .def("shard", [](PyStore& s, int f) { return s.flats().at(f).shard; })
      .def("full", [](PyStore& s, int f) -> py::object {
        const at::Tensor& full = s.flats().at(f).full;
        return full.defined() ? py::cast(full) : py::none();
      })
      .def("master", [](PyStore& s, int f) -> py::object {
        const at::Tensor& master = s.flats().at(f).master;
        return master.defined() ? py::cast(master) : py::none();
      })
      .def("full_bytes", [](PyStore& s, int f) {
        const zero::Flat& flat = s.flats().at(f);
        return flat.layout.numel() * static_cast<int64_t>(c10::elementSize(flat.dtype));
      })
      .def("make_master", &PyStore::make_master, Release())
      .def("leave_files", &PyStore::leave_files)
      .def("in_file", [](PyStore& s, int f) { return s.in_file(f); })
      .def("shard_apart", &PyStore::shard_apart)
      .def("state_rests", [](PyStore& s, int f) { return s.flats().at(f).state_rests; })
      .def("set_master", [](PyStore& s, int f, at::Tensor t) { s.flats().at(f).master = std::move(t); })
      .def("clear_master", [](PyStore& s, int f) { s.flats().at(f).master = at::Tensor(); })
      .def("set_step", &PyStore::set_step)
      .def("gathered_bytes", &PyStore::gathered_bytes)
      .def("bytes", [](PyStore& s) {
        const zero::StoreBytes held = s.bytes();
        py::dict d;
        d["parameters"] = held.parameters;
        d["parameters_in_files"] = held.parameters_in_files;
        d["master_weights"] = held.master_weights;
        d["gathered_units"] = held.gathered_units;
        return d;
      })
      .def("pool_bytes", [](PyStore& s) { return s.pool().free_bytes(); })
      .def("drop_masters",
           [](PyStore& s) {
             for (zero::Flat& flat : s.flats()) flat.master = at::Tensor();
           })
      .def("trim_pool", [](PyStore& s) { s.pool().trim(); })
      .def_property_readonly("units", [](PyStore& s) { return s.units().size(); })
      .def_property_readonly("flats", [](PyStore& s) { return s.flats().size(); })
      .def_property_readonly("params", [](PyStore& s) { return s.params().size(); })
      .def_property_readonly("world", [](PyStore& s) { return s.world(); })
      .def_property_readonly("rank", [](PyStore& s) { return s.rank(); })
      .def_property_readonly("shards_params", [](PyStore& s) { return s.options().shard_params; });
}

void bind_reducer(py::module_& m) {
  using zero::GradReducer;
  py::class_<GradReducer, std::shared_ptr<GradReducer>>(m, "GradReducer", "Gradients to fp32 slices; see csrc/zero/grad_reducer.h.")
      .def(py::init([](PyStore& store, const py::object& comm_dtype, double pre_scale, bool replicate_grads,
                       std::shared_ptr<optim::SliceRest> rest) {
             zero::ReducerOptions options;
             options.rest = std::move(rest);
             if (!comm_dtype.is_none()) options.comm_dtype = scalar_type(comm_dtype);
             options.pre_scale = pre_scale;
             options.replicate_grads = replicate_grads;
             py::gil_scoped_release release;
             return std::make_shared<GradReducer>(store, options);
           }),
           py::keep_alive<1, 2>(), py::arg("store"), py::arg("comm_dtype"), py::arg("pre_scale"), py::arg("replicate_grads"), py::arg("rest") = nullptr)
      .def("flush", &GradReducer::flush, py::arg("force") = false, Release())
      .def("set_deferred", &GradReducer::set_deferred)
      .def_property_readonly("deferred", &GradReducer::deferred)
      .def_property_readonly("in_round", &GradReducer::in_round)
      .def("has_carry", &GradReducer::has_carry)
      .def("flush_carry", &GradReducer::flush_carry, Release())
      .def("set_comm_dtype",
           [](GradReducer& r, const py::object& dtype) {
             const std::optional<at::ScalarType> wanted = dtype.is_none() ? std::nullopt : std::optional(scalar_type(dtype));
             py::gil_scoped_release release;
             r.set_comm_dtype(wanted);
           })
      .def("set_post_scale", &GradReducer::set_post_scale)
      .def("set_refusal", &GradReducer::set_refusal)
      .def("set_final", &GradReducer::set_final)
      .def(
          "speculate_with",
          [](GradReducer& r, std::shared_ptr<optim::SliceOptimizer> optimizer, const std::map<int, size_t>& slices) {
            r.set_listeners([&r, optimizer, slices](int flat) { optimizer->speculate(slices.at(flat), r.grad_slice(flat)); },
                            [optimizer, slices](int flat) { optimizer->revoke(slices.at(flat)); });
          },
          py::arg("optimizer"), py::arg("slices"), "`slices`: {flat: number of its slice}. See Note [Speculative updates].")
      .def("add_replicas", &GradReducer::add_replicas, Release())
      .def("reduce_stats", &GradReducer::reduce_stats, Release())
      .def("gather_grads", &GradReducer::gather_grads, Release())
      .def("zero", &GradReducer::zero, Release())
      .def("find_bad", [](GradReducer& r) { return py::make_tuple(r.find_bad().param, r.find_bad().rank); })
      .def("unused", &GradReducer::unused)
      .def("frozen", &GradReducer::frozen)
      .def("ensure_grads", &GradReducer::ensure_grads, Release())
      .def("grad", &GradReducer::grad)
      .def("grad_slice", &GradReducer::grad_slice)
      .def("has_grad", &GradReducer::has_grad)
      .def("mark_edited", &GradReducer::mark_edited)
      .def("accumulator_bytes", &GradReducer::accumulator_bytes)
      .def("bucket_bytes", &GradReducer::bucket_bytes);
}

void bind_hooks(py::module_& m) {
  using zero::AutogradHooks;
  using zero::UnitScheduler;
  py::class_<UnitScheduler, std::shared_ptr<UnitScheduler>>(m, "UnitScheduler", "When units are gathered and freed.")
      .def(py::init([](PyStore& store) { return std::make_shared<UnitScheduler>(store); }), py::keep_alive<1, 2>())
      .def("begin_forward", &UnitScheduler::begin_forward)
      .def("end_forward", &UnitScheduler::end_forward, Release())
      .def("enter", &UnitScheduler::enter, Release())
      .def("leave", &UnitScheduler::leave, Release())
      .def("enter_backward", &UnitScheduler::enter_backward, Release())
      .def("end_backward", &UnitScheduler::end_backward, Release())
      .def("share", &UnitScheduler::share)
      .def("drop_kept", &UnitScheduler::drop_kept, Release())
      .def("shadow_forward", &UnitScheduler::shadow_forward, Release())
      .def("shadow_backward", &UnitScheduler::shadow_backward, Release())
      .def_property_readonly("in_forward", &UnitScheduler::in_forward);
  py::class_<AutogradHooks, std::shared_ptr<AutogradHooks>>(m, "AutogradHooks", "What runs inside backward, all in C++.")
      .def(py::init([](PyStore& store, zero::GradReducer* reducer, UnitScheduler& scheduler) {
             return std::make_shared<AutogradHooks>(store, reducer, scheduler);
           }),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
      .def("watch_parameters", &AutogradHooks::watch_parameters, Release())
      .def("watch_outputs", &AutogradHooks::watch_outputs)
      .def("watch_inputs", &AutogradHooks::watch_inputs)
      .def("watch_root", &AutogradHooks::watch_root)
      .def("begin_manual", &AutogradHooks::begin_manual)
      .def("end_backward", &AutogradHooks::end_backward, Release())
      .def("abort_backward", &AutogradHooks::abort_backward, py::arg("finish"), Release())
      .def("close", &AutogradHooks::close);
}

void bind_rest(py::module_& m) {
  using optim::SliceRest;
  using zero::FileRest;
  using zero::HostRest;
  py::class_<SliceRest, std::shared_ptr<SliceRest>>(m, "SliceRest", "Where slices rest between steps; see csrc/optim/slice_rest.h.")
      .def("zeros", [](SliceRest& r, int64_t numel, const py::object& dtype) { return r.zeros(numel, scalar_type(dtype)); })
      .def("has_second_place", &SliceRest::has_second_place)
      .def("holds", &SliceRest::holds)
      .def("leave", &SliceRest::leave)
      .def("leave_all", &SliceRest::leave_all)
      .def_property_readonly("apart", &SliceRest::apart);
  py::class_<HostRest, SliceRest, std::shared_ptr<HostRest>>(m, "HostRest", "Optimizer state on the host; see csrc/zero/host_rest.h.")
      .def(py::init<bool, int64_t, bool>(), py::arg("pinned"), py::arg("tile_bytes"), py::arg("second_places") = false)
      .def_property_readonly("bytes", &HostRest::bytes);
  py::class_<FileRest, SliceRest, std::shared_ptr<FileRest>>(m, "FileRest", "Optimizer state in a file; see csrc/zero/file_rest.h.")
      .def(py::init([](const std::string& folder, int buffers, int64_t tile_bytes, int64_t block_bytes, int queue_depth, int threads,
                       bool apart, bool pinned, bool second_places, int64_t most_in_memory) {
             io::EngineOptions options;
             options.chunk_bytes = block_bytes;
             options.queue_depth = queue_depth;
             options.threads = threads;
             return std::make_shared<FileRest>(offload::TierFile::create(folder, options), offload::StreamOptions{tile_bytes, buffers}, apart, pinned,
                                               second_places, most_in_memory);
           }),
           py::arg("folder"), py::arg("buffers"), py::arg("tile_bytes"), py::arg("block_bytes"), py::arg("queue_depth"), py::arg("threads"),
           py::arg("apart") = false, py::arg("pinned") = false, py::arg("second_places") = false, py::arg("most_in_memory") = 0,
           Release())
      .def("set_aside", &FileRest::set_aside, Release())
      .def_property_readonly("folder", [](const FileRest& r) { return r.file().folder(); })
      .def_property_readonly("bytes", [](const FileRest& r) { return r.file().bytes(); })
      .def_property_readonly("buffer_bytes", &FileRest::buffer_bytes)
      .def_property_readonly("stream_bytes", &FileRest::stream_bytes)
      .def_property_readonly("engine", [](const FileRest& r) { return r.file().engine().name(); });
}

void bind_optimizer(py::module_& m) {
  using optim::Hyper;
  using optim::Segment;
  using optim::SliceOptimizer;
  py::class_<Hyper>(m, "Hyper", "Hyperparameters of one parameter group for one step.")
      .def(py::init<>())
      .def_readwrite("lr", &Hyper::lr)
      .def_readwrite("beta1", &Hyper::beta1)
      .def_readwrite("beta2", &Hyper::beta2)
      .def_readwrite("eps", &Hyper::eps)
      .def_readwrite("weight_decay", &Hyper::weight_decay)
      .def_readwrite("momentum", &Hyper::momentum)
      .def_readwrite("dampening", &Hyper::dampening)
      .def_readwrite("max_coeff", &Hyper::max_coeff)
      .def_readwrite("min_coeff", &Hyper::min_coeff)
      .def_readwrite("decoupled", &Hyper::decoupled)
      .def_readwrite("bias_correction", &Hyper::bias_correction)
      .def_readwrite("nesterov", &Hyper::nesterov)
      .def_readwrite("eps_inside_sqrt", &Hyper::eps_inside_sqrt)
      .def_readwrite("step", &Hyper::step);
  py::class_<SliceOptimizer, std::shared_ptr<SliceOptimizer>>(m, "SliceOptimizer", "Optimizer state over owned slices and its fused step.")
      .def(py::init([](const std::string& kind, int64_t params, std::shared_ptr<comm::Transport> transport,
                       std::shared_ptr<optim::SliceRest> rest) {
             auto reduce = [transport](double* norms, int64_t count) {
               if (!transport) return;
               constexpr int64_t kBatch = 4096;
               for (int64_t i = 0; i < count; i += kBatch) {
                 const int n = static_cast<int>(std::min(kBatch, count - i));
                 transport->all_reduce(norms + i, n, comm::Op::Sum, comm::Tag{-1, "param_norms", -1, n * 8});
               }
             };
             return std::make_shared<SliceOptimizer>(optim::parse_kind(kind), params, reduce, rest);
           }),
           py::arg("kind"), py::arg("params"), py::arg("transport"), py::arg("rest") = nullptr)
      .def("add_slice",
           [](SliceOptimizer& o, at::Tensor master, std::optional<at::Tensor> low,
              const std::vector<std::tuple<int64_t, int64_t, int, int64_t>>& segments, bool rests, bool weights_in_file, bool weights_apart) {
             std::vector<Segment> list;
             for (const auto& [begin, numel, group, param] : segments) list.push_back({begin, numel, group, param});
             return o.add_slice(std::move(master), low.value_or(at::Tensor()), std::move(list), {rests, weights_in_file, weights_apart});
           },
           py::arg("master"), py::arg("low"), py::arg("segments"), py::arg("rests") = false, py::arg("weights_in_file") = false,
           py::arg("weights_apart") = false)
      .def("ensure_states", &SliceOptimizer::ensure_states, Release())
      .def_property_readonly("is_torn", &SliceOptimizer::is_torn)
      .def("set_whole", &SliceOptimizer::set_whole)
      .def("step", &SliceOptimizer::step, py::arg("groups"), py::arg("grads"), py::arg("grad_scale"),
           py::arg("frozen") = std::vector<int64_t>(), Release())
      .def("foresee", &SliceOptimizer::foresee, py::arg("groups"), py::arg("grad_scale"), Release())
      .def("wait_ahead", &SliceOptimizer::wait_ahead, Release(), "Until what speculation has begun is computed.")
      .def("drop_speculation", &SliceOptimizer::drop_speculation, Release())
      .def_property_readonly("speculated", &SliceOptimizer::speculated_steps, "Slices that had been computed when their step came, so far.")
      .def("missed_steps", &SliceOptimizer::missed_steps)
      .def("set_missed_steps", &SliceOptimizer::set_missed_steps, Release())
      .def("state_names", &SliceOptimizer::state_names)
      .def("states", [](SliceOptimizer& o, int slice) { return o.slices().at(slice).states; })
      .def("set_states",
           [](SliceOptimizer& o, int slice, std::vector<at::Tensor> states) {
             py::gil_scoped_release release;
             o.drop_speculation();
             o.slices().at(slice).states = std::move(states);
           })
      .def("state_bytes", &SliceOptimizer::state_bytes);
  m.def("read_split", &optim::read_split, py::arg("weights"), py::arg("low_bits"), py::arg("values"), Release(),
        "values (float32) = split masters of bfloat16 weights and int16 low bits; contiguous, one-dimensional, on any devices.");
  m.def("write_split", &optim::write_split, py::arg("values"), py::arg("weights"), py::arg("low_bits"), Release(),
        "Weights and low bits of the split masters that have these values, of any floating-point dtype.");
  m.def("copy_scale", &optim::copy_scale, py::arg("dst"), py::arg("src"), py::arg("scale"), Release(),
        "dst = cast(scale * src) over contiguous one-dimensional tensors of float32, float16 or bfloat16.");
}

}  // namespace

void bind_zero(py::module_& m) {
  bind_rest(m);
  bind_store(m);
  bind_reducer(m);
  bind_hooks(m);
  bind_optimizer(m);
}
