// SPDX-License-Identifier: Apache-2.0
// deepspeed._core: the plan, as plain tuples and lists.
#include "plan/units.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "plan/layout.h"
#include "plan/memory.h"
#include "plan/resting.h"

namespace py = pybind11;
using namespace ds::plan;

namespace {

py::dict as_dict(const MemoryUse& use) {
  py::dict d;
  d["parameters"] = use.parameters;
  d["gradients"] = use.gradients;
  d["master_weights"] = use.master_weights;
  d["optimizer_state"] = use.optimizer_state;
  d["updates_ahead"] = use.updates_ahead;
  d["gathered_units"] = use.gathered_units;
  d["buckets"] = use.buckets;
  d["staging"] = use.staging;
  return d;
}

using PyParam = std::tuple<int64_t, int64_t, bool>;

py::dict estimate_dict(const std::vector<Module>& tree, const std::vector<std::vector<PyParam>>& params, UnitBudget budget,
                       const Partition& partition) {
  ModelSizes model;
  model.tree = tree;
  for (const auto& own : params) {
    model.params.emplace_back();
    for (const auto& [numel, element_bytes, trainable] : own) model.params.back().push_back({numel, element_bytes, trainable});
  }
  const Estimate found = estimate(model, budget, partition);
  py::dict d;
  d["device"] = as_dict(found.device);
  d["host"] = as_dict(found.host);
  d["file"] = as_dict(found.file);
  py::dict tiers;
  tiers["to_host"] = found.tiers.to_host;
  tiers["from_host"] = found.tiers.from_host;
  tiers["file_read"] = found.tiers.file_read;
  tiers["file_written"] = found.tiers.file_written;
  tiers["mapped_read"] = found.tiers.mapped_read;
  tiers["mapped_written"] = found.tiers.mapped_written;
  d["tiers"] = tiers;
  py::list traffic;
  for (const Traffic& t : found.traffic) traffic.append(py::make_tuple(t.phase, t.number, t.bytes, t.sent_bytes));
  d["traffic"] = traffic;
  d["numel"] = found.numel;
  d["units"] = found.units;
  d["largest_unit_numel"] = found.largest_unit_numel;
  return d;
}

}  // namespace

void bind_plan(py::module_& m) {
  py::enum_<Tier>(m, "Tier", "Where bytes rest while nobody uses them.")
      .value("none", Tier::Device)
      .value("cpu", Tier::Host)
      .value("nvme", Tier::File);
  py::class_<StepTiles>(m, "StepTiles", "In which a step takes arrays that rest in files through memory; see csrc/plan/reserve.h.")
      .def_readonly("tile_bytes", &StepTiles::tile_bytes)
      .def_readonly("buffers", &StepTiles::buffers);
  m.def("step_tiles", &step_tiles, py::arg("buffer_count"), py::arg("block_bytes"));
  m.def("resting_units", &resting_units, py::arg("trained"), py::arg("share"), "Whose state rests elsewhere; see csrc/plan/resting.h.");
  m.attr("HOST_TILE_BYTES") = kHostTileBytes;
  py::class_<Offload>(m, "Offload", "What rests where; see csrc/plan/memory.h.")
      .def(py::init<>())
      .def_readwrite("states", &Offload::states)
      .def_readwrite("params", &Offload::params)
      .def_readwrite("states_share", &Offload::states_share)
      .def_readwrite("ahead", &Offload::ahead)
      .def_readwrite("params_in_memory", &Offload::params_in_memory)
      .def_readwrite("tiles", &Offload::tiles);
  py::class_<Partition>(m, "Partition", "What is divided among whom; see csrc/plan/memory.h.")
      .def(py::init<>())
      .def_readwrite("ranks", &Partition::ranks)
      .def_readwrite("replicas", &Partition::replicas)
      .def_readwrite("shard_params", &Partition::shard_params)
      .def_readwrite("partial_step", &Partition::partial_step)
      .def_readwrite("persistent_numel", &Partition::persistent_numel)
      .def_readwrite("reduce_bytes", &Partition::reduce_bytes)
      .def_readwrite("states", &Partition::states)
      .def_readwrite("split_master", &Partition::split_master)
      .def_readwrite("accumulation", &Partition::accumulation)
      .def_readwrite("on_host", &Partition::on_host)
      .def_readwrite("prefetch", &Partition::prefetch)
      .def_readwrite("offload", &Partition::offload);
  m.def("estimate", &estimate_dict, py::arg("tree"), py::arg("params"), py::arg("budget"), py::arg("partition"),
        "Bytes a rank holds by kind, and traffic a step. params: for each module the (numel, element bytes, trainable) it owns.");
  py::class_<Module>(m, "PlanModule", "One module of the tree, in pre-order; see plan_units.")
      .def(py::init([](int parent, int64_t own_numel, bool container, bool repeated, bool leaf) {
             return Module{parent, own_numel, container, repeated, leaf};
           }),
           py::arg("parent"), py::arg("own_numel"), py::arg("container") = false, py::arg("repeated") = false, py::arg("leaf") = false);
  py::class_<UnitBudget>(m, "UnitBudget")
      .def(py::init([](int64_t soft, int64_t hard) { return UnitBudget{soft, hard}; }), py::arg("soft_numel"), py::arg("hard_numel"))
      .def_readonly("soft_numel", &UnitBudget::soft_numel)
      .def_readonly("hard_numel", &UnitBudget::hard_numel);
  py::class_<Unit>(m, "PlanUnit")
      .def_readonly("modules", &Unit::modules)
      .def_readonly("own_only", &Unit::own_only)
      .def_readonly("hooked", &Unit::hooked)
      .def_readonly("scope", &Unit::scope)
      .def_readonly("numel", &Unit::numel);
  m.def("plan_units", &plan_units, py::arg("tree"), py::arg("budget"),
        "Which modules are gathered together: largest subtrees first under the budget.");
  m.def("default_budget", &default_budget, py::arg("total_numel"), py::arg("reduce_bucket_numel"), py::arg("prefetch_bucket_numel"));
  m.def(
      "plan_flat",
      [](const std::vector<int64_t>& numels, int world, int64_t align_numel) {
        const FlatLayout layout = plan_flat(numels, world, align_numel);
        std::vector<int64_t> offsets;
        for (const Slot& s : layout.slots) offsets.push_back(s.offset);
        return py::make_tuple(offsets, layout.shard_numel);
      },
      py::arg("numels"), py::arg("world"), py::arg("align_numel"), "(offset of each parameter, elements a shard).");
}
