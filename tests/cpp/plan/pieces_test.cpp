// SPDX-License-Identifier: Apache-2.0
#include "plan/pieces.h"

#include <gtest/gtest.h>

#include <random>

#include "base/error.h"

namespace ds::plan {
namespace {

TEST(Pieces, CoverProblems) {
  const auto problem = [](std::vector<plan::Run> runs, int64_t numel) { return cover_problem(Span<const plan::Run>(runs), numel); };
  EXPECT_EQ(problem({}, 0), "");
  EXPECT_EQ(problem({{0, 3}, {3, 4}}, 7), "");
  EXPECT_EQ(problem({}, 2), "elements [0, 2) are missing");
  EXPECT_EQ(problem({{0, 3}, {4, 3}}, 7), "elements [3, 4) are missing");
  EXPECT_EQ(problem({{0, 3}, {2, 5}}, 7), "elements [2, 3) are there twice");
  EXPECT_EQ(problem({{0, 3}}, 7), "elements [3, 7) are missing");
  EXPECT_NE(problem({{0, 8}}, 7), "");
  EXPECT_NE(problem({{0, 0}, {0, 7}}, 7), "");
  EXPECT_NE(problem({{-1, 7}}, 7), "");
  EXPECT_NE(problem({{INT64_MAX, INT64_MAX}}, 7), "");
}

TEST(Pieces, PartsOfAnyRunAreItsElementsInOrder) {
  std::mt19937 draw(5);
  for (int turn = 0; turn < 500; ++turn) {
    std::vector<plan::Run> runs;
    int64_t end = 0;
    for (int i = static_cast<int>(draw() % 6) + 1; i > 0; --i) {
      runs.push_back({end, static_cast<int64_t>(draw() % 9) + 1});
      end += runs.back().numel;
    }
    ASSERT_EQ(cover_problem(Span<const plan::Run>(runs), end), "");
    const int64_t begin = static_cast<int64_t>(draw() % static_cast<uint32_t>(end + 1));
    const plan::Run want{begin, static_cast<int64_t>(draw() % static_cast<uint32_t>(end - begin + 1))};
    int64_t at = 0;
    for (const Part& part : parts_of(Span<const plan::Run>(runs), want)) {
      const plan::Run& run = runs[static_cast<size_t>(part.piece)];
      EXPECT_EQ(part.want_begin, at);
      EXPECT_EQ(run.begin + part.piece_begin, want.begin + at);
      EXPECT_GT(part.numel, 0);
      EXPECT_LE(part.piece_begin + part.numel, run.numel);
      at += part.numel;
    }
    EXPECT_EQ(at, want.numel);
  }
}

TEST(Pieces, RunsOutsideAreRefused) {
  const std::vector<plan::Run> runs = {{0, 3}, {3, 4}};
  EXPECT_THROW(parts_of(Span<const plan::Run>(runs), {5, 3}), ValueError);
  EXPECT_THROW(parts_of(Span<const plan::Run>(runs), {7, 1}), ValueError);
  EXPECT_THROW(parts_of(Span<const plan::Run>(runs), {-1, 1}), ValueError);
}

}  // namespace
}  // namespace ds::plan
