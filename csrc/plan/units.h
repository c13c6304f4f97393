// SPDX-License-Identifier: Apache-2.0
// Which modules are gathered together. Decided once from the module tree; the same on every rank.
#pragma once

#include <cstdint>
#include <vector>

namespace ds::plan {

// One module of the tree, in pre-order (a parent stands before its children; node 0 is the root).
struct Module {
  int parent = -1;
  int64_t own_numel = 0;    // parameters registered directly on it, each parameter counted at its first owner only
  bool container = false;   // has no forward of its own (ModuleList, ModuleDict): its children are called instead
  bool repeated = false;    // element of a list: a natural unit, not split below the hard budget
  bool leaf = false;        // must be gathered whole (routed experts, modules the user marked)
};

struct UnitBudget {
  int64_t soft_numel = 0;   // subtrees up to this size become one unit, and small neighbours are merged up to it
  int64_t hard_numel = 0;   // repeated elements stay whole up to this size
};

// A unit holds the parameters of `modules` (whole subtrees, or with `own_only` just the parameters the single module
// registers itself). It is gathered before the first of `hooked` runs and may be freed after the last of them; at the
// latest when `scope`, the nearest module that encloses all of them and is itself called, has run.
struct Unit {
  std::vector<int> modules;
  bool own_only = false;
  std::vector<int> hooked;
  int scope = 0;
  int64_t numel = 0;
};

// Largest subtrees first under the budget; every module with parameters belongs to exactly one unit; units are in
// pre-order of their first module.
std::vector<Unit> plan_units(const std::vector<Module>& tree, UnitBudget budget);

// The default budget for a model of `total_numel` parameters and the bucket sizes of the configuration.
UnitBudget default_budget(int64_t total_numel, int64_t reduce_bucket_numel, int64_t prefetch_bucket_numel);

}  // namespace ds::plan
