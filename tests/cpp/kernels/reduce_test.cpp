// SPDX-License-Identifier: Apache-2.0
// The SIMD reductions have the bits of the scalar reference; the reference has the bits of the formula in reduce.h.
#include "kernels/reduce/reduce.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(ReduceSum, HasTheBitsOfTheReference) {
  for_every_slice([](int64_t n, int64_t offset) {
    for (DType dtype : kFloats) {
      for (int nsrc : {1, 2, 3, 9}) {
        for (bool accumulate : {false, true}) {
          std::vector<Array> sources;
          std::vector<const void*> pointers;
          sources.reserve(nsrc);
          for (int k = 0; k < nsrc; ++k) {
            sources.emplace_back(dtype, n, offset + k);
            sources.back().fill(k);
            pointers.push_back(sources.back().data());
          }
          Array got(DType::F32, n, offset), want(DType::F32, n);
          got.fill(99);
          want.copy(got);
          double got_stats[2] = {-1, -1}, want_stats[2];
          reduce_sum(got.floats(), pointers.data(), nsrc, dtype, 0.3f, accumulate, n, got_stats);
          reduce_sum_ref(want.floats(), pointers.data(), nsrc, dtype, 0.3f, accumulate, n, want_stats);
          EXPECT_SAME(got, want);
          EXPECT_EQ(got_stats[0], want_stats[0]);
          EXPECT_EQ(got_stats[1], 0.0);
          reduce_sum(got.floats(), pointers.data(), nsrc, dtype, 0.7f, accumulate, n, nullptr);
          reduce_sum_ref(want.floats(), pointers.data(), nsrc, dtype, 0.7f, accumulate, n, nullptr);
          EXPECT_SAME(got, want);
        }
      }
    }
  });
}

TEST(ReduceSum, AddsInRankOrderAndMayWriteToASource) {
  Array a(DType::F32, 100), b(DType::F32, 100), c(DType::F32, 100), expected(DType::F32, 100);
  a.fill(1, -1e8f, 1e8f);
  b.fill(2, -1.0f, 1.0f);
  c.fill(3, -1e8f, 1e8f);
  for (int i = 0; i < 100; ++i) {
    volatile float sum = a.get(i) + b.get(i);
    sum = sum + c.get(i);
    expected.set(i, sum * 0.5f);
  }
  const void* sources[] = {a.data(), b.data(), c.data()};
  reduce_sum(b.floats(), sources, 3, DType::F32, 0.5f, false, 100, nullptr);
  EXPECT_SAME(b, expected);
}

TEST(ReduceSum, FindsNonFiniteValuesAnywhere) {
  for_every_slice([](int64_t n, int64_t offset) {
    Array x(DType::F32, n, offset), y(DType::F32, n, offset);
    for (int64_t at : {int64_t{0}, n / 2, n - 1}) {
      if (n == 0) continue;
      for (float bad : {kInf, -kInf, kNan}) {
        x.fill(5);
        x.set(at, bad);
        const void* source = x.data();
        double stats[2];
        reduce_sum(y.floats(), &source, 1, DType::F32, 1.0f, false, n, stats);
        EXPECT_EQ(stats[1], 1.0);
        EXPECT_FALSE(std::isfinite(stats[0]));
        sum_squares(x.floats(), n, stats);
        EXPECT_EQ(stats[1], 1.0);
        for (DType dtype : kFloats) {
          Array z(dtype, n, offset);
          z.set(at, bad);
          EXPECT_EQ(first_nonfinite(z.data(), dtype, n), at);
          EXPECT_EQ(first_nonfinite_ref(z.data(), dtype, n), at);
          z.set(at, 60000.0f);
          EXPECT_EQ(first_nonfinite(z.data(), dtype, n), -1);
        }
      }
    }
  });
}

TEST(ReduceSum, LargestFloatsAreFinite) {
  Array x(DType::F32, 1000);
  for (int i = 0; i < 1000; ++i) x.set(i, std::numeric_limits<float>::max());
  double stats[2];
  sum_squares(x.floats(), 1000, stats);
  EXPECT_TRUE(std::isfinite(stats[0]));
  EXPECT_EQ(stats[1], 0.0);
}

TEST(SumSquares, HasTheBitsOfTheReferenceAndTheRightValue) {
  for_every_slice([](int64_t n, int64_t offset) {
    for (DType dt : kFloats) {
      Array x(dt, n, offset);
      x.fill(7);
      double got[2], want[2];
      sum_squares(x.data(), dt, n, got);
      sum_squares_ref(x.data(), dt, n, want);
      EXPECT_EQ(got[0], want[0]);
      EXPECT_EQ(got[1], 0.0);
      long double exact = 0;
      for (int64_t i = 0; i < n; ++i) exact += static_cast<long double>(x.get(i)) * x.get(i);
      // n / 16 additions to a lane and 4 to join them, each off by at most half an ulp of the sum.
      EXPECT_LE(std::abs(static_cast<double>(got[0] - exact)), (n / 16 + 5) * 0x1p-53 * got[0]);
      if (n == 0) continue;
      x.set(n - 1, std::numeric_limits<float>::infinity());
      sum_squares(x.data(), dt, n, got);
      EXPECT_EQ(got[1], 1.0);
    }
  });
}

TEST(CopyScale, HasTheBitsOfTheReference) {
  for_every_slice([](int64_t n, int64_t offset) {
    for (DType from : kFloats) {
      for (DType to : kFloats) {
        for (float scale : {1.0f, 0.37f, 1e-7f}) {
          Array source(from, n, offset), got(to, n, 2 * offset), want(to, n);
          source.fill(11, -70000.0f, 70000.0f);
          copy_scale(got.data(), to, source.data(), from, scale, n);
          copy_scale_ref(want.data(), to, source.data(), from, scale, n);
          EXPECT_SAME(got, want);
        }
      }
    }
  });
}

// Every bfloat16 and half, and floats at and beside every rounding border: infinities, NaNs, subnormals included.
TEST(CopyScale, ConvertsEveryValueAsBaseDoes) {
  std::vector<uint16_t> halves(65536);
  std::vector<float> borders;
  for (uint32_t h = 0; h < 65536; ++h) {
    halves[h] = static_cast<uint16_t>(h);
    for (uint32_t low : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      borders.push_back(float_from_bits(h << 16 | low));
    }
  }
  const int64_t n = borders.size();
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    SCOPED_TRACE(hwy::TargetName(target));
    for (DType dtype : {DType::BF16, DType::F16}) {
      std::vector<float> wide(65536);
      copy_scale(wide.data(), DType::F32, halves.data(), dtype, 1.0f, 65536);
      int64_t wrong = 0;
      for (int h = 0; h < 65536; ++h) {
        const float want = dtype == DType::BF16 ? bf16_to_float(h) : f16_to_float(h);
        wrong += std::isnan(want) ? !std::isnan(wide[h]) : float_bits(want) != float_bits(wide[h]);
      }
      EXPECT_EQ(wrong, 0) << dtype_name(dtype) << " to F32";
      std::vector<uint16_t> narrow(n);
      copy_scale(narrow.data(), dtype, borders.data(), DType::F32, 1.0f, n);
      wrong = 0;
      for (int64_t i = 0; i < n; ++i) {
        const uint16_t want = dtype == DType::BF16 ? float_to_bf16(borders[i]) : float_to_f16(borders[i]);
        const uint16_t infinity = dtype == DType::BF16 ? 0x7f80 : 0x7c00;
        wrong += std::isnan(borders[i]) ? (narrow[i] & 0x7fff) <= infinity : narrow[i] != want;
      }
      EXPECT_EQ(wrong, 0) << "F32 to " << dtype_name(dtype);
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(Accumulate, HasTheBitsOfTheReference) {
  for_every_slice([](int64_t n, int64_t offset) {
    for (DType dtype : kFloats) {
      Array source(dtype, n, offset), got(DType::F32, n, offset), want(DType::F32, n);
      source.fill(1);
      got.fill(2);
      want.copy(got);
      accumulate(got.floats(), source.data(), dtype, 0.1f, n);
      accumulate_ref(want.floats(), source.data(), dtype, 0.1f, n);
      EXPECT_SAME(got, want);
    }
  });
}

TEST(ReduceSum, RefusesBadArguments) {
  float x[4] = {};
  const void* source = x;
  EXPECT_THROW(reduce_sum(x, &source, 0, DType::F32, 1, false, 4, nullptr), ValueError);
  EXPECT_THROW(reduce_sum(nullptr, &source, 1, DType::F32, 1, false, 4, nullptr), ValueError);
  EXPECT_THROW(reduce_sum(x, &source, 1, DType::I32, 1, false, 4, nullptr), ValueError);
  EXPECT_THROW(reduce_sum(x, &source, 1, DType::F32, 1, false, -1, nullptr), ValueError);
  EXPECT_THROW(copy_scale(x, DType::F64, x, DType::F32, 1, 4), ValueError);
  EXPECT_THROW(first_nonfinite(x, DType::I8, 4), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
