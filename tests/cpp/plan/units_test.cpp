// SPDX-License-Identifier: Apache-2.0
#include "plan/units.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "base/error.h"

namespace {

using namespace ds::plan;

// root{embedding 50, blocks[ {norm 2, linear 100}, ... ], norm 3}
std::vector<Module> gpt(int blocks) {
  std::vector<Module> tree = {{-1, 0}, {0, 50}};
  tree.push_back({0, 0, /*container=*/true});
  const int list = 2;
  for (int b = 0; b < blocks; ++b) {
    const int block = static_cast<int>(tree.size());
    tree.push_back({list, 0, false, /*repeated=*/true});
    tree.push_back({block, 2});
    tree.push_back({block, 100});
  }
  tree.push_back({0, 3});
  return tree;
}

TEST(Units, SmallModelIsOneUnit) {
  const std::vector<Unit> units = plan_units(gpt(2), {1000, 1000});
  ASSERT_EQ(units.size(), 1u);
  EXPECT_EQ(units[0].hooked, std::vector<int>({0}));
  EXPECT_EQ(units[0].numel, 50 + 2 * 102 + 3);
}

TEST(Units, BlocksStayWhole) {
  const std::vector<Unit> units = plan_units(gpt(3), {60, 200});
  ASSERT_EQ(units.size(), 5u);
  EXPECT_EQ(units[0].numel, 50);
  for (int b = 1; b <= 3; ++b) EXPECT_EQ(units[b].numel, 102);
  EXPECT_EQ(units[4].numel, 3);
  EXPECT_EQ(units[1].hooked, std::vector<int>({3}));
  EXPECT_EQ(units[1].scope, 3);
}

TEST(Units, BlocksAboveTheHardBudgetAreSplit) {
  const std::vector<Unit> units = plan_units(gpt(1), {60, 90});
  ASSERT_EQ(units.size(), 4u);
  EXPECT_EQ(units[1].numel, 2);
  EXPECT_EQ(units[2].numel, 100);
}

TEST(Units, NeighboursShareAUnitWhileSmall) {
  const std::vector<Module> tree = {{-1, 0}, {0, 10}, {0, 10}, {0, 10}, {0, 500}};
  const std::vector<Unit> units = plan_units(tree, {25, 25});
  ASSERT_EQ(units.size(), 3u);
  EXPECT_EQ(units[0].modules, std::vector<int>({1, 2}));
  EXPECT_EQ(units[0].hooked, std::vector<int>({1, 2}));
  EXPECT_EQ(units[0].scope, 0);
  EXPECT_EQ(units[1].modules, std::vector<int>({3}));
}

TEST(Units, OwnParametersOfASplitModuleAreAUnitOfTheirOwn) {
  const std::vector<Module> tree = {{-1, 5}, {0, 100}, {0, 100}};
  const std::vector<Unit> units = plan_units(tree, {50, 50});
  ASSERT_EQ(units.size(), 3u);
  EXPECT_TRUE(units[0].own_only);
  EXPECT_EQ(units[0].hooked, std::vector<int>({0}));
}

TEST(Units, ALeafIsNeverSplit) {
  std::vector<Module> tree = gpt(1);
  tree[3].leaf = true;
  const std::vector<Unit> units = plan_units(tree, {10, 20});
  ASSERT_EQ(units.size(), 3u);
  EXPECT_EQ(units[1].numel, 102);
}

TEST(Units, RefusesNonsense) {
  EXPECT_THROW(plan_units({{-1, 1}, {5, 1}}, {1, 1}), ds::Error);
  EXPECT_THROW(plan_units({{-1, 1}}, {2, 1}), ds::Error);
  EXPECT_TRUE(plan_units({}, {1, 1}).empty());
}

TEST(Units, DefaultBudget) {
  EXPECT_EQ(default_budget(1000, 500000000, 50000000).soft_numel, int64_t{1} << 20);
  EXPECT_EQ(default_budget(1000, 500000000, 100).soft_numel, 100);
  EXPECT_EQ(default_budget(1000, 500000000, 100).hard_numel, 100);
  EXPECT_EQ(default_budget(int64_t{7} << 30, 500000000, 50000000).hard_numel, int64_t{1} << 28);
}

// Whatever the tree and the budget: every parameter is in exactly one unit, and units come in pre-order.
TEST(Units, EveryParameterOnce) {
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    std::vector<Module> tree = {{-1, static_cast<int64_t>(random() % 30)}};
    std::vector<std::vector<int>> children(1);
    const int n = static_cast<int>(random() % 30);
    int previous = 0;
    for (int i = 1; i <= n; ++i) {   // pre-order: the parent is the last node or one of its ancestors
      int parent = previous;
      while (parent > 0 && random() % 2) parent = tree[parent].parent;
      tree.push_back({parent, static_cast<int64_t>(random() % 40), random() % 5 == 0, random() % 3 == 0, random() % 9 == 0});
      children.emplace_back();
      children[parent].push_back(i);
      previous = i;
    }
    const int64_t soft = random() % 60;
    int64_t total = 0, covered = 0;
    for (const Module& m : tree) total += m.own_numel;
    std::set<int> seen;
    int last_first = -1;
    for (const Unit& unit : plan_units(tree, {soft, soft + static_cast<int64_t>(random() % 100)})) {
      ASSERT_GT(unit.modules.front(), last_first);
      last_first = unit.modules.front();
      ASSERT_FALSE(unit.hooked.empty());
      int64_t numel = 0;
      std::vector<int> stack = unit.modules;
      while (!stack.empty()) {
        const int node = stack.back();
        stack.pop_back();
        ASSERT_TRUE(seen.insert(node).second) << "module in two units";
        numel += tree[node].own_numel;
        if (!unit.own_only) stack.insert(stack.end(), children[node].begin(), children[node].end());
      }
      ASSERT_EQ(numel, unit.numel);
      covered += numel;
    }
    ASSERT_EQ(covered, total);
  }
}

}  // namespace
