// SPDX-License-Identifier: Apache-2.0
#include "io/crc32c.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

namespace ds::io {
namespace {

uint32_t by_bits(const unsigned char* p, size_t n) {
  uint32_t c = 0xffffffffu;
  for (size_t i = 0; i < n; ++i) {
    c ^= p[i];
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ ((c & 1u) != 0 ? 0x82f63b78u : 0u);
  }
  return ~c;
}

std::vector<unsigned char> noise(size_t n) {
  std::mt19937 draw(7);
  std::vector<unsigned char> bytes(n);
  for (auto& b : bytes) b = static_cast<unsigned char>(draw());
  return bytes;
}

TEST(Crc32c, KnownValues) {
  EXPECT_EQ(crc32c("123456789", 9), 0xe3069283u);   // the check value of the catalogue of CRCs
  const unsigned char zeros[32] = {};
  EXPECT_EQ(crc32c(zeros, 32), 0x8a9136aau);        // RFC 3720, B.4
  EXPECT_EQ(crc32c(nullptr, 0), 0u);
}

TEST(Crc32c, EveryFormAgreesAtEverySizeAndAlignment) {
  const auto bytes = noise(60000);
  std::vector<unsigned char> copy(bytes.size());
  for (size_t shift : {0, 1, 3, 7}) {
    for (size_t n : {0, 1, 7, 8, 9, 63, 64, 511, 512, 513, 767, 768, 4095, 12287, 12288, 12289, 24576, 24600, 50001}) {
      const uint32_t want = by_bits(bytes.data() + shift, n);
      EXPECT_EQ(crc32c(bytes.data() + shift, n), want) << shift << ' ' << n;
      for (const auto& form : crc32c_forms()) EXPECT_EQ(crc32c_by(form, bytes.data() + shift, n), want) << form << ' ' << shift << ' ' << n;
      std::fill(copy.begin(), copy.end(), static_cast<unsigned char>(0));
      EXPECT_EQ(crc32c_copy(copy.data() + 5, bytes.data() + shift, n), want) << shift << ' ' << n;
      EXPECT_TRUE(n == 0 || std::memcmp(copy.data() + 5, bytes.data() + shift, n) == 0);
      EXPECT_TRUE(copy[4] == 0 && copy[5 + n] == 0);
    }
  }
}

TEST(Crc32c, ContinuesAnywhere) {
  const auto bytes = noise(30000);
  const uint32_t whole = crc32c(bytes.data(), bytes.size());
  for (size_t at : {0, 1, 13, 12288, 29999, 30000}) {
    EXPECT_EQ(crc32c(bytes.data() + at, bytes.size() - at, crc32c(bytes.data(), at)), whole);
    for (const auto& form : crc32c_forms()) {
      EXPECT_EQ(crc32c_by(form, bytes.data() + at, bytes.size() - at, crc32c_by(form, bytes.data(), at)), whole) << form;
    }
  }
}

}  // namespace
}  // namespace ds::io
