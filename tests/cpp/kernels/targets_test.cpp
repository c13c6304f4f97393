// SPDX-License-Identifier: Apache-2.0
#include "kernels/targets.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace {

TEST(Targets, TheChosenOneWasCompiled) {
  const auto names = ds::kernels::compiled_targets();
  EXPECT_NE(std::find(names.begin(), names.end(), ds::kernels::chosen_target()), names.end());
}

}  // namespace
