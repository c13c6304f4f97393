// SPDX-License-Identifier: Apache-2.0
// The SIMD norms against the double-precision reference, every element, with bounds derived from the arithmetic.
#include "kernels/norm/norm.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Half a spacing of the storage format, relative to the value, and half its smallest spacing near zero.
double rounding(DType dtype) { return dtype == DType::F32 ? 0x1p-24 : dtype == DType::BF16 ? 0x1p-8 : 0x1p-11; }
double smallest(DType dtype) { return dtype == DType::F16 ? 0x1p-25 : 0.0; }

struct Case {
  Norm norm;
  DType dtype;
  int64_t rows, columns, offset;
  bool residual, weight, bias;
};

// Everything a forward and a backward read and write; the same seeds give the same inputs.
struct Arrays {
  Arrays(const Case& c, float low = -2.0f, float high = 3.0f)
      : c(c), x(c.dtype, c.rows * c.columns, c.offset), residual(c.dtype, c.rows * c.columns, c.offset + 1),
        h(c.dtype, c.rows * c.columns, c.offset), y(c.dtype, c.rows * c.columns, c.offset), dy(c.dtype, c.rows * c.columns, c.offset),
        dh(c.dtype, c.rows * c.columns, c.offset), dx(c.dtype, c.rows * c.columns, c.offset), weight(DType::F32, c.columns, c.offset),
        bias(DType::F32, c.columns, c.offset), dweight(DType::F32, c.columns, c.offset), dbias(DType::F32, c.columns, c.offset),
        mean(DType::F32, c.rows), rstd(DType::F32, c.rows) {
    x.fill(1, low, high);
    residual.fill(2);
    weight.fill(3);
    bias.fill(4);
    dy.fill(5);
    dh.fill(6);
    dweight.fill(7);
    dbias.fill(8);
  }
  NormForward forward() {
    return {c.norm, c.dtype, c.columns, 1e-5f, x.data(), c.residual ? residual.data() : nullptr, c.weight ? weight.floats() : nullptr,
            c.bias ? bias.floats() : nullptr, c.residual ? h.data() : nullptr, y.data(), c.norm == Norm::Layer ? mean.floats() : nullptr,
            rstd.floats()};
  }
  NormBackward backward() {
    return {c.norm, c.dtype, c.columns, dy.data(), c.residual ? dh.data() : nullptr, c.residual ? h.data() : x.data(),
            c.weight ? weight.floats() : nullptr, c.norm == Norm::Layer ? mean.floats() : nullptr, rstd.floats(), dx.data()};
  }
  float* dbias_or_null() { return c.norm == Norm::Layer ? dbias.floats() : nullptr; }

  Case c;
  Array x, residual, h, y, dy, dh, dx, weight, bias, dweight, dbias, mean, rstd;
};

// |got - want| <= the two roundings to storage + units * eps32 * scale.
void expect_close(Array& got, Array& want, int64_t n, DType dtype, double units, double scale, const char* what) {
  ASSERT_TRUE(got.guards_intact()) << what;
  for (int64_t i = 0; i < n; ++i) {
    const double bound = 2 * rounding(dtype) * std::abs(want.get(i)) + smallest(dtype) + units * 0x1p-24 * scale;
    ASSERT_LE(std::abs(static_cast<double>(got.get(i)) - want.get(i)), bound) << what << "[" << i << "] want " << want.get(i);
  }
}

void compare(const Case& c) {
  const int64_t n = c.rows * c.columns;
  Arrays got(c), want(c);
  norm_forward(got.forward(), 0, c.rows);
  norm_forward_ref(want.forward(), 0, c.rows);
  if (c.residual) {
    EXPECT_SAME(got.h, want.h);
  }
  // A term takes part in at most n / 4 additions of a chain (plain code has four lanes in all), whose errors have both signs.
  const double units = 16 + std::sqrt(static_cast<double>(c.columns));
  expect_close(got.rstd, want.rstd, c.rows, DType::F32, units, 1, "rstd");
  if (c.norm == Norm::Layer) expect_close(got.mean, want.mean, c.rows, DType::F32, units, 1, "mean");
  double largest = 1.0;
  for (int64_t i = 0; i < n; ++i) largest = std::max<double>(largest, std::abs(want.y.get(i)));
  expect_close(got.y, want.y, n, c.dtype, units, largest, "y");

  const bool gradients = c.weight || c.bias;
  Arrays grad_got(c), grad_want(c);
  for (Arrays* a : {&grad_got, &grad_want}) {  // the same statistics for both
    a->h.copy(want.h);
    a->mean.copy(want.mean);
    a->rstd.copy(want.rstd);
  }
  norm_backward(grad_got.backward(), 0, c.rows, gradients ? grad_got.dweight.floats() : nullptr,
                gradients ? grad_got.dbias_or_null() : nullptr);
  norm_backward_ref(grad_want.backward(), 0, c.rows, gradients ? grad_want.dweight.floats() : nullptr,
                    gradients ? grad_want.dbias_or_null() : nullptr);
  NormBackward past = grad_got.backward();
  Array past_dx(c.dtype, n, c.offset);
  past.dx = past_dx.data();
  past.past_caches = true;
  norm_backward(past, 0, c.rows, nullptr, nullptr);
  EXPECT_SAME(past_dx, grad_got.dx);
  double steepest = 1.0;  // terms of dx are at most |dy| |weight| rstd max|normal|^2
  for (int64_t r = 0; r < c.rows; ++r) steepest = std::max<double>(steepest, want.rstd.get(r));
  const double normal = static_cast<double>(largest) + 2;
  expect_close(grad_got.dx, grad_want.dx, n, c.dtype, units, 4 * steepest * normal * normal, "dx");
  expect_close(grad_got.dweight, grad_want.dweight, c.columns, DType::F32, 4.0 * static_cast<double>(c.rows + 1), 4 * normal, "dweight");
  expect_close(grad_got.dbias, grad_want.dbias, c.columns, DType::F32, 4.0 * static_cast<double>(c.rows + 1), 4, "dbias");
}

void for_every_case(int64_t rows, int64_t columns, int64_t offset) {
  for (DType dtype : kFloats) {
    for (bool residual : {false, true}) {
      for (bool weight : {false, true}) {
        for (bool bias : {false, true}) {
          SCOPED_TRACE(std::string(dtype_name(dtype)) + " rows=" + std::to_string(rows) + " residual=" + std::to_string(residual) +
                       " weight=" + std::to_string(weight) + " bias=" + std::to_string(bias));
          compare({Norm::Layer, dtype, rows, columns, offset, residual, weight, bias});
          if (!bias) compare({Norm::Rms, dtype, rows, columns, offset, residual, weight, false});
          if (::testing::Test::HasFailure()) return;
        }
      }
    }
  }
}

TEST(Norm, MatchesTheReferenceForEveryRowLength) {
  for_every_slice([](int64_t n, int64_t offset) { for_every_case(3, n, offset); });
}

TEST(Norm, MatchesTheReferenceForEveryNumberOfRows) {
  for_every_slice([](int64_t n, int64_t offset) {
    if (n > 70 || offset != 0) return;
    for (int64_t rows : {0, 1, 4, 5, 9}) for_every_case(rows, n, offset);
  });
}

TEST(Norm, LongRowsThatDoNotFitSideBySide) {
  for (DType dtype : kFloats) {
    compare({Norm::Layer, dtype, 5, 70001, 1, true, true, true});
    compare({Norm::Rms, dtype, 5, 70001, 1, true, true, false});
  }
}

// Values near 1e4 with deviation 1: the spacing of floats there is 2^-10, so a rounded mean alone would cost 5e-4.
TEST(Norm, RowsFarFromZeroKeepTheirPrecision) {
  for_every_slice([](int64_t n, int64_t offset) {
    if (n < 2) return;
    const Case c{Norm::Layer, DType::F32, 3, n, offset, false, false, false};
    Arrays got(c, 9998.0f, 10002.0f), want(c, 9998.0f, 10002.0f);
    norm_forward(got.forward(), 0, 3);
    norm_forward_ref(want.forward(), 0, 3);
    for (int64_t r = 0; r < 3; ++r) ASSERT_NEAR(got.rstd.get(r), want.rstd.get(r), 64 * 0x1p-24 * want.rstd.get(r));
    // n = 2 may put both values a few spacings apart; then rstd is large and y, at most sqrt(n), still keeps its digits.
    for (int64_t i = 0; i < 3 * n; ++i) ASSERT_NEAR(got.y.get(i), want.y.get(i), 256 * 0x1p-24 * std::max(1.0f, std::abs(want.y.get(i))));
  });
}

TEST(Norm, ConstantRowsBecomeTheBias) {
  for (DType dtype : kFloats) {
    const Case c{Norm::Layer, dtype, 2, 300, 0, false, true, true};
    Arrays a(c, 3.0f, 3.0f);
    norm_forward(a.forward(), 0, 2);
    for (int64_t i = 0; i < 600; ++i) {
      ASSERT_NEAR(a.y.get(i), a.bias.get(i % 300), rounding(dtype) * 2);
      ASSERT_TRUE(std::isfinite(a.rstd.get(i / 300)));
    }
  }
}

TEST(Norm, NotANumberStaysInItsRow) {
  for (Norm norm : {Norm::Layer, Norm::Rms}) {
    const Case c{norm, DType::F32, 3, 37, 0, false, true, false};
    Arrays a(c);
    a.x.set(37 + 36, kNan);
    norm_forward(a.forward(), 0, 3);
    for (int64_t i = 0; i < 3 * 37; ++i) ASSERT_EQ(std::isnan(a.y.get(i)), i / 37 == 1) << i;
  }
}

TEST(Norm, ARowDoesNotDependOnItsRangeAndMayBeWrittenInPlace) {
  for (Norm norm : {Norm::Layer, Norm::Rms}) {
    const Case c{norm, DType::BF16, 7, 133, 0, true, true, false};
    Arrays whole(c), parts(c);
    norm_forward(whole.forward(), 0, 7);
    NormForward in_place = parts.forward();
    in_place.h = in_place.residual == nullptr ? nullptr : parts.residual.data();
    in_place.y = parts.x.data();
    norm_forward(in_place, 0, 3);
    norm_forward(in_place, 3, 7);
    EXPECT_SAME(parts.x, whole.y);
    EXPECT_SAME(parts.residual, whole.h);
    NormBackward a = whole.backward(), b = whole.backward();
    norm_backward(a, 0, 7, nullptr, nullptr);
    Array out(DType::BF16, 7 * 133);
    out.copy(whole.dh);
    b.dh = b.dx = out.data();
    norm_backward(b, 0, 7, nullptr, nullptr);
    EXPECT_SAME(out, whole.dx);
  }
}

TEST(Norm, RefusesBadArguments) {
  Arrays a({Norm::Layer, DType::F32, 2, 8, 0, true, true, true});
  NormForward f = a.forward();
  EXPECT_THROW(norm_forward(f, 1, 0), ValueError);
  f.mean = nullptr;
  EXPECT_THROW(norm_forward(f, 0, 2), ValueError);
  f = a.forward();
  f.h = nullptr;
  EXPECT_THROW(norm_forward(f, 0, 2), ValueError);
  f = a.forward();
  f.norm = Norm::Rms;
  EXPECT_THROW(norm_forward(f, 0, 2), ValueError);
  f = a.forward();
  f.dtype = DType::I32;
  EXPECT_THROW(norm_forward(f, 0, 2), ValueError);
  NormBackward b = a.backward();
  EXPECT_THROW(norm_backward(b, 0, 2, a.dweight.floats(), nullptr), ValueError);
  b.dx = nullptr;
  EXPECT_THROW(norm_backward(b, 0, 2, nullptr, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
