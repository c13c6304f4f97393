// SPDX-License-Identifier: Apache-2.0
#include "plan/units.h"

#include <algorithm>

#include "base/checked.h"
#include "base/error.h"

namespace ds::plan {
namespace {

constexpr int64_t kSmallestUnit = int64_t{1} << 20;   // below this a collective costs more than its bytes
constexpr int64_t kLargestUnit = int64_t{1} << 28;    // two of these in bf16 are 1 GiB
constexpr int64_t kUsualBlock = int64_t{1} << 26;     // attention of a 7 B model stays whole

class Planner {
 public:
  Planner(const std::vector<Module>& tree, UnitBudget budget) : tree_(tree), budget_(budget) {
    const size_t n = tree.size();
    subtree_.resize(n);
    children_.resize(n);
    for (size_t i = 0; i < n; ++i) {
      DS_CHECK(i == 0 ? tree[i].parent == -1 : tree[i].parent >= 0 && tree[i].parent < static_cast<int>(i),
               "plan_units: module " << i << " must come after its parent " << tree[i].parent);
      subtree_[i] = tree[i].own_numel;
      if (i > 0) children_[tree[i].parent].push_back(static_cast<int>(i));
    }
    for (size_t i = n; i-- > 1;) subtree_[tree[i].parent] = checked_add(subtree_[tree[i].parent], subtree_[i]);
  }

  std::vector<Unit> run() {
    visit(0);
    return std::move(units_);
  }

 private:
  bool is_whole(int node) const {
    const Module& m = tree_[node];
    if (m.leaf || children_[node].empty()) return true;
    if (subtree_[node] <= budget_.soft_numel) return true;
    if (m.repeated && subtree_[node] <= budget_.hard_numel) return true;
    return std::none_of(children_[node].begin(), children_[node].end(), [&](int c) { return subtree_[c] > 0; });
  }

  void visit(int node) {
    if (subtree_[node] == 0) return;
    if (is_whole(node)) {
      emit(node, /*own_only=*/false);
      return;
    }
    if (tree_[node].own_numel > 0) emit(node, /*own_only=*/true);
    for (int child : children_[node]) visit(child);
  }

  void emit(int node, bool own_only) {
    const int64_t numel = own_only ? tree_[node].own_numel : subtree_[node];
    Unit* last = units_.empty() ? nullptr : &units_.back();
    // Neighbours under one parent share a unit while it stays small. A repeated element starts a unit of its own
    // unless it is tiny, so that the units follow the model's blocks.
    if (last != nullptr && !own_only && !last->own_only && !tree_[node].leaf && !tree_[last->modules.back()].leaf &&
        tree_[last->modules.back()].parent == tree_[node].parent && last->numel + numel <= budget_.soft_numel) {
      last->modules.push_back(node);
      last->numel += numel;
      add_hooked(node, &last->hooked);
      last->scope = enclosing_called(tree_[node].parent);
      return;
    }
    Unit unit;
    unit.modules = {node};
    unit.own_only = own_only;
    unit.numel = numel;
    if (own_only) {
      add_scope_hook(node, &unit.hooked);
    } else {
      add_hooked(node, &unit.hooked);
    }
    unit.scope = tree_[node].container ? enclosing_called(node) : node;
    units_.push_back(std::move(unit));
  }

  // A container is never called: its children are hooked in its place. A leaf container (routed experts) is gathered
  // by the module around it, because which child runs differs between ranks.
  void add_hooked(int node, std::vector<int>* hooked) const {
    if (!tree_[node].container) {
      hooked->push_back(node);
    } else if (tree_[node].leaf || tree_[node].own_numel > 0) {
      add_scope_hook(node, hooked);
    } else {
      for (int child : children_[node]) {
        if (subtree_[child] > 0) add_hooked(child, hooked);
      }
    }
  }

  void add_scope_hook(int node, std::vector<int>* hooked) const { hooked->push_back(enclosing_called(node)); }

  int enclosing_called(int node) const {
    while (node > 0 && tree_[node].container) node = tree_[node].parent;
    return node;
  }

  const std::vector<Module>& tree_;
  UnitBudget budget_;
  std::vector<int64_t> subtree_;
  std::vector<std::vector<int>> children_;
  std::vector<Unit> units_;
};

}  // namespace

std::vector<Unit> plan_units(const std::vector<Module>& tree, UnitBudget budget) {
  DS_CHECK(budget.soft_numel >= 0 && budget.hard_numel >= budget.soft_numel,
           "plan_units: hard budget " << budget.hard_numel << " below soft budget " << budget.soft_numel);
  if (tree.empty()) return {};
  return Planner(tree, budget).run();
}

UnitBudget default_budget(int64_t total_numel, int64_t reduce_bucket_numel, int64_t prefetch_bucket_numel) {
  UnitBudget budget;
  const int64_t floor = std::clamp<int64_t>(prefetch_bucket_numel, 1, kSmallestUnit);
  const int64_t ceiling = prefetch_bucket_numel < kSmallestUnit ? floor : kUsualBlock;
  budget.soft_numel = std::clamp(total_numel / 16, floor, ceiling);
  // A prefetch bucket below a million elements asks for the smallest units there are.
  const int64_t asked = prefetch_bucket_numel < kSmallestUnit ? floor : std::max({reduce_bucket_numel, prefetch_bucket_numel, kUsualBlock});
  budget.hard_numel = std::max(budget.soft_numel, std::min(asked, kLargestUnit));
  return budget;
}

}  // namespace ds::plan
