// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/checked.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/span.h"

namespace ds {
namespace {

std::string message_of(void (*f)()) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}

TEST(Error, SaysFileLineAndMessage) {
  const int line = __LINE__ + 1;
  const std::string message = message_of([] { DS_CHECK(1 > 2, "n is " << 7); });
  EXPECT_NE(message.find("base_test.cpp:" + std::to_string(line) + ": n is 7"), std::string::npos) << message;
  EXPECT_THROW(DS_CHECK_VALUE(false, "x"), ValueError);
  EXPECT_THROW(DS_FAIL("x"), Error);
  EXPECT_NO_THROW(DS_CHECK(true, "x"));
}

TEST(Error, TrimsTheDirectoriesAboveSources) {
  EXPECT_STREQ(Error("/home/me/csrc/base/a.h", 3, "m").what(), "csrc/base/a.h:3: m");
  EXPECT_STREQ(Error("a.h", 3, "m").what(), "a.h:3: m");
}

TEST(Error, CheckIsOneStatement) {  // no dangling else
  bool reached = false;
  if (true)
    DS_CHECK(true, "x");
  else
    reached = true;
  EXPECT_FALSE(reached);
}

TEST(Checked, ThrowsWhereTheOperatorsWrap) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(checked_add(kMax - 1, 1), kMax);
  EXPECT_THROW(checked_add(kMax, 1), Error);
  EXPECT_THROW(checked_sub(-kMax, 3), Error);
  EXPECT_EQ(checked_mul(int64_t{1} << 31, int64_t{1} << 31), int64_t{1} << 62);
  EXPECT_THROW(checked_mul(int64_t{1} << 32, int64_t{1} << 31), Error);
  EXPECT_EQ(round_up(0, 8), 0);
  EXPECT_EQ(round_up(1, 8), 8);
  EXPECT_EQ(round_up(8, 8), 8);
  EXPECT_THROW(round_up(kMax, 8), Error);
  EXPECT_THROW(round_up(1, 0), ValueError);
  EXPECT_THROW(round_up(-1, 8), ValueError);
  EXPECT_EQ(ceil_div(0, 3), 0);
  EXPECT_EQ(ceil_div(7, 3), 3);
  EXPECT_EQ(ceil_div(kMax, 1), kMax);
}

TEST(Span, ChecksWhatItIsAskedToCheck) {
  std::vector<int> v = {1, 2, 3};
  const Span<int> s(v);
  EXPECT_EQ(s.size(), 3);
  EXPECT_EQ(s.at(2), 3);
  EXPECT_THROW(s.at(3), ValueError);
  EXPECT_THROW(s.at(-1), ValueError);
  EXPECT_EQ(s.sub(1, 2)[0], 2);
  EXPECT_TRUE(s.sub(3, 0).empty());
  EXPECT_THROW(s.sub(2, 2), ValueError);
  EXPECT_THROW(s.sub(0, -1), ValueError);
  const std::vector<int>& constant = v;
  int sum = 0;
  for (int x : Span<const int>(constant)) sum += x;
  EXPECT_EQ(sum, 6);
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(dtype_size(DType::F64), 8u);
  EXPECT_EQ(dtype_size(DType::BF16), 2u);
  EXPECT_EQ(dtype_size(DType::BOOL), 1u);
  EXPECT_STREQ(dtype_name(DType::BF16), "BF16");
  EXPECT_THROW(dtype_size(static_cast<DType>(99)), ValueError);
  EXPECT_THROW(dtype_name(static_cast<DType>(99)), ValueError);
}

// Nearest even by search in exact arithmetic: the oracle for both 16-bit formats.
template <typename Decode>
uint16_t nearest_even(double x, Decode decode, uint16_t max_finite) {
  uint16_t best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  for (uint32_t h = 0; h <= max_finite; ++h) {
    const double distance = std::fabs(static_cast<double>(decode(static_cast<uint16_t>(h))) - x);
    if (distance < best_distance || (distance == best_distance && (h & 1) == 0)) best = static_cast<uint16_t>(h), best_distance = distance;
  }
  return best;
}

TEST(DType, EveryHalfSurvivesARoundTrip) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const float half = f16_to_float(bits);
    const float brain = bf16_to_float(bits);
    if (std::isnan(half)) {
      EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(half))));
    } else {
      EXPECT_EQ(float_to_f16(half), bits);
    }
    if (std::isnan(brain)) {
      EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(brain))));
    } else {
      EXPECT_EQ(float_to_bf16(brain), bits);
    }
  }
}

TEST(DType, RoundsToNearestEvenAroundEveryMidpoint) {
  for (uint32_t h = 0; h < 0x7bff; ++h) {  // every pair of neighbouring finite halves
    const double low = f16_to_float(static_cast<uint16_t>(h)), high = f16_to_float(static_cast<uint16_t>(h + 1));
    const float middle = static_cast<float>((low + high) / 2);  // exact: float has the bits
    EXPECT_EQ(float_to_f16(middle), (h & 1) ? h + 1 : h);
    EXPECT_EQ(float_to_f16(std::nextafterf(middle, 0.0f)), h);
    EXPECT_EQ(float_to_f16(std::nextafterf(middle, 1e9f)), h + 1);
    EXPECT_EQ(float_to_f16(-middle), ((h & 1) ? h + 1 : h) | 0x8000u);
  }
  for (uint32_t h = 0; h < 0x7f7f; ++h) {
    const uint32_t middle_bits = (h << 16) | 0x8000u;
    EXPECT_EQ(float_to_bf16(float_from_bits(middle_bits)), (h & 1) ? h + 1 : h);
    EXPECT_EQ(float_to_bf16(float_from_bits(middle_bits - 1)), h);
    EXPECT_EQ(float_to_bf16(float_from_bits(middle_bits + 1)), h + 1);
  }
  for (float x : {0.1f, 3.14159f, 1234.5f, 6e-6f, 1e-9f}) {
    EXPECT_EQ(float_to_f16(x), nearest_even(x, f16_to_float, 0x7bff)) << x;
    EXPECT_EQ(float_to_bf16(x), nearest_even(x, bf16_to_float, 0x7f7f)) << x;
  }
}

TEST(DType, LimitsAndSpecialValues) {
  EXPECT_EQ(float_to_f16(65504.0f), 0x7bff);
  EXPECT_EQ(float_to_f16(65519.99f), 0x7bff);
  EXPECT_EQ(float_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_f16(-INFINITY), 0xfc00);
  EXPECT_EQ(float_to_f16(-0.0f), 0x8000);
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(NAN))));
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(float_from_bits(0x7f800001u)))));  // payload in the dropped bits only
  EXPECT_TRUE(std::isnan(f16_to_float(float_to_f16(float_from_bits(0x7f800001u)))));
}

}  // namespace
}  // namespace ds
