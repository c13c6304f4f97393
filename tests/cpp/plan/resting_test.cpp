// SPDX-License-Identifier: Apache-2.0
// The share of the state that rests elsewhere is met as nearly as single units allow, with the first units at home.
#include "plan/resting.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "base/error.h"

namespace ds::plan {
namespace {

using Bools = std::vector<bool>;

TEST(Resting, FirstUnitsStay) {
  EXPECT_EQ(resting_units({10, 10, 10, 10}, 0.5), (Bools{false, false, true, true}));
  EXPECT_EQ(resting_units({10, 10, 10, 10}, 1), (Bools{true, true, true, true}));
  EXPECT_EQ(resting_units({10, 10, 10, 10}, 0), (Bools{false, false, false, false}));
  EXPECT_EQ(resting_units({}, 0.5), Bools{});
}

TEST(Resting, TheNearestNumberOfUnits) {
  EXPECT_EQ(resting_units({10, 10, 10, 10}, 0.7), (Bools{false, true, true, true}));    // 12 to stay: one is nearer than two
  EXPECT_EQ(resting_units({10, 10, 10, 10}, 0.6), (Bools{false, false, true, true}));   // 16: two are
  EXPECT_EQ(resting_units({100, 10, 10, 10}, 0.9), (Bools{true, false, true, true}));   // 13: the first is too large by far
}

TEST(Resting, AFrozenUnitHasNothingToMove) {
  const Bools rests = resting_units({0, 10, 0, 10}, 0.5);
  EXPECT_FALSE(rests[1]);
  EXPECT_TRUE(rests[3]);
}

TEST(Resting, TheShareIsMetToHalfAUnit) {
  std::mt19937 random(3);
  for (int round = 0; round < 500; ++round) {
    std::vector<int64_t> trained(1 + random() % 12);
    for (int64_t& numel : trained) numel = static_cast<int64_t>(random() % 3 == 0 ? random() % 10 : random() % 1000000);
    const double share = static_cast<double>(random() % 1001) / 1000;
    const Bools rests = resting_units(trained, share);
    const auto total = std::accumulate(trained.begin(), trained.end(), int64_t{0});
    int64_t resting = 0;
    for (size_t i = 0; i < trained.size(); ++i) resting += rests[i] ? trained[i] : 0;
    const double want = share * static_cast<double>(total), off = std::abs(static_cast<double>(resting) - want);
    // Too much rests: no resting unit could stay and bring it nearer. Too little: it is one unit that stays, of which the larger part was wanted.
    bool is_near = false;
    for (size_t i = 0; i < trained.size(); ++i) {
      if (static_cast<double>(resting) < want && !rests[i]) is_near = is_near || 2 * off <= static_cast<double>(trained[i]) + 1;
      if (static_cast<double>(resting) >= want && rests[i]) ASSERT_LE(2 * off, static_cast<double>(trained[i]) + 1) << round;   // 1: by rounding
    }
    ASSERT_TRUE(is_near || static_cast<double>(resting) >= want) << round;
  }
}

TEST(Resting, AShareOutsideOfZeroToOneIsRefused) { EXPECT_THROW(resting_units({1}, 1.1), ValueError); }

TEST(Quota, TakesWhatFits) {
  MemoryQuota quota(10);
  EXPECT_TRUE(quota.take(4));
  EXPECT_FALSE(quota.take(7));
  EXPECT_TRUE(quota.take(6));
  EXPECT_FALSE(quota.take(0));
  EXPECT_FALSE(MemoryQuota(0).take(0));
}

}  // namespace
}  // namespace ds::plan
