// SPDX-License-Identifier: Apache-2.0
// deepspeed._core: the plan, as plain tuples and lists.
#include "plan/units.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan/layout.h"

namespace py = pybind11;
using namespace ds::plan;

void bind_plan(py::module_& m) {
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
