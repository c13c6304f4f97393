// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10 gives the known answers of the authors' Random123 library; the vectors give what the scalar function gives.
#include "kernels/philox.h"

#include "slices.h"

namespace ds::kernels::testing {
namespace {

void expect_words(UInt32x4 got, std::initializer_list<uint32_t> want) {
  int i = 0;
  for (uint32_t w : want) EXPECT_EQ(got.word[i++], w);
}

TEST(Philox, GivesThePublishedAnswers) {
  expect_words(philox(0, {0, 0}), {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  const uint64_t ones = ~uint64_t{0};
  expect_words(philox(ones, {ones, ones}), {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  expect_words(philox(0x299f31d0a4093822u, {0x85a308d3243f6a88u, 0x0370734413198a2eu}), {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

TEST(Philox, AnElementOwnsAWordOfItsGroup) {
  const UInt32x4 group = philox(77, {5, 9});
  for (uint64_t i = 0; i < 4; ++i) EXPECT_EQ(philox_element(77, 20, 36 + i), group.word[i]);
}

TEST(Philox, VectorsHaveTheWordsOfTheFunction) {
  for_every_slice([](int64_t n, int64_t offset) {
    for (uint64_t first : {uint64_t{0}, uint64_t{36}, (uint64_t{1} << 34) - 8}) {  // the group's index passes 2^32
      const uint64_t seed = 0x0123456789abcdefu + static_cast<uint64_t>(n), start = (uint64_t{1} << 35) + 4 * static_cast<uint64_t>(offset);
      std::vector<uint32_t> got(n + offset + 4, 0xa5a5a5a5u), want(n);
      philox_fill(seed, start, first, n, got.data() + offset);
      philox_fill_ref(seed, start, first, n, want.data());
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(got[offset + i], want[i]) << i;
      for (int64_t i = 0; i < offset; ++i) EXPECT_EQ(got[i], 0xa5a5a5a5u);
      for (int64_t i = offset + n; i < n + offset + 4; ++i) EXPECT_EQ(got[i], 0xa5a5a5a5u);
    }
  });
}

TEST(Philox, ThresholdsHitTheirProbability) {
  std::vector<uint32_t> words(1 << 20);
  philox_fill(1, 0, 0, static_cast<int64_t>(words.size()), words.data());
  for (double p : {0.0, 0.1, 0.5, 0.9, 1.0}) {
    int64_t below = 0;
    for (uint32_t w : words) below += philox_below(w, philox_threshold(p));
    const double n = static_cast<double>(words.size());
    EXPECT_NEAR(below / n, p, 5 * std::sqrt(p * (1 - p) / n)) << p;  // five standard deviations; exact at 0 and 1
  }
}

TEST(Philox, RefusesBadArguments) {
  uint32_t out[4];
  EXPECT_THROW(philox_fill(0, 0, 2, 4, out), ValueError);
  EXPECT_THROW(philox_fill(0, 0, 0, -1, out), ValueError);
  EXPECT_THROW(philox_fill(0, 0, 0, 4, nullptr), ValueError);
  EXPECT_THROW(philox_threshold(-0.1), ValueError);
  EXPECT_THROW(philox_threshold(1.5), ValueError);
  EXPECT_THROW(philox_threshold(std::nan("")), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
