// SPDX-License-Identifier: Apache-2.0
// Softmax rows against the float64 reference, element by element.
#include "kernels/softmax/softmax.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// One rounding of the result at its storage format.
double rounding(DType dtype, double value) {
  const double eps = dtype == DType::F32 ? 6e-8 : dtype == DType::BF16 ? 3.91e-3 : 4.89e-4;
  return eps * std::fabs(value) + (dtype == DType::F16 ? 6e-8 : 0.0);  // half a subnormal
}

// |got - want| <= the two roundings of the result and `slack` of `magnitude`, which is how large what was rounded on the way is.
void expect_close(Array& got, Array& want, Array& magnitude, int64_t n, double slack) {
  for (int64_t i = 0; i < n; ++i) {
    const double a = got.get(i), b = want.get(i);
    const double allowed = 2 * rounding(want.dtype(), b) + slack * std::fabs(magnitude.get(i)) + 2e-38;
    ASSERT_LE(std::fabs(a - b), allowed) << i << ": " << a << " for " << b;
  }
  EXPECT_TRUE(got.guards_intact());
}

// z = scale * x + mask is rounded to float32 where the reference has float64: its error, |z| * 6e-8 a rounding, is a relative one of y.
// The coarse exponential of 16-bit rows adds 6e-6.
constexpr double kSlack = 8e-6;

struct Mask {
  Array values;
  std::vector<uint8_t> bools;
  MaskView view;
};

// Three masks in turn for the rows of a [2, 3, columns] input, broadcast over the first dimension.
Mask make_mask(DType dtype, int64_t columns, unsigned seed) {
  Mask m{Array(dtype == DType::BOOL ? DType::F32 : dtype, 3 * columns, 1), std::vector<uint8_t>(3 * columns + 1), {}};
  std::mt19937 random(seed);
  m.values.fill(seed);
  for (int64_t i = 0; i < 3 * columns; ++i) {
    const bool hidden = random() % 3 == 0 || i / columns == 2;  // all of the third
    m.bools[i] = hidden ? 1 + random() % 255 : 0;
    if (hidden) m.values.set(i, -kInf);
  }
  m.view.data = dtype == DType::BOOL ? static_cast<void*>(m.bools.data()) : m.values.data();
  m.view.dtype = dtype;
  m.view.dims = 2;
  m.view.sizes[0] = 2;
  m.view.sizes[1] = 3;
  m.view.strides[0] = 0;
  m.view.strides[1] = columns;
  return m;
}

constexpr int64_t kRows = 6;

TEST(Softmax, IsTheReferenceForward) {
  for_every_slice([](int64_t columns, int64_t offset) {
    for (DType dtype : kFloats) {
      Array x(dtype, kRows * columns, offset), got(dtype, kRows * columns, offset + 1), want(dtype, kRows * columns);
      x.fill(columns, -6.0f, 6.0f);
      for (float scale : {1.0f, -0.37f}) {
        for (int64_t queries : {0, 1, 2, 3, 6}) {
          const SoftmaxRows s{columns, scale, queries};
          softmax(got.data(), x.data(), dtype, s, {}, 1, kRows);
          softmax(got.data(), x.data(), dtype, s, {}, 0, 1);
          softmax_ref(want.data(), x.data(), dtype, s, {}, 0, kRows);
          expect_close(got, want, want, kRows * columns, kSlack);
        }
      }
    }
  });
}

TEST(Softmax, IsTheReferenceWithEveryMask) {
  for_every_slice([](int64_t columns, int64_t offset) {
    for (DType dtype : kFloats) {
      for (DType mask_dtype : {DType::F32, DType::BF16, DType::F16, DType::BOOL}) {
        Array x(dtype, kRows * columns, offset), got(dtype, kRows * columns, offset + 1), want(dtype, kRows * columns);
        x.fill(columns, -6.0f, 6.0f);
        const Mask mask = make_mask(mask_dtype, columns, 7 + columns);
        for (int64_t queries : {0, 3}) {
          const SoftmaxRows s{columns, 0.6f, queries};
          softmax(got.data(), x.data(), dtype, s, mask.view, 0, kRows);
          softmax_ref(want.data(), x.data(), dtype, s, mask.view, 0, kRows);
          expect_close(got, want, want, kRows * columns, kSlack);
          for (int64_t row : {2, 5}) {
            for (int64_t j = 0; j < columns; ++j) ASSERT_EQ(got.get(row * columns + j), 0.0f);
          }
        }
      }
    }
  });
}

TEST(Softmax, IsTheReferenceBackward) {
  for_every_slice([](int64_t columns, int64_t offset) {
    for (DType dtype : kFloats) {
      Array y(dtype, kRows * columns, offset), dy(dtype, kRows * columns, offset + 1), got(dtype, kRows * columns, offset + 2),
          want(dtype, kRows * columns);
      dy.fill(columns);
      for (int64_t queries : {0, 3}) {
        const SoftmaxRows s{columns, 0.7f, queries};
        y.fill(columns + 1, -3.0f, 3.0f);
        softmax(y.data(), y.data(), dtype, s, {}, 0, kRows);
        softmax_backward(got.data(), dy.data(), y.data(), dtype, s, 0, 2);
        softmax_backward(got.data(), dy.data(), y.data(), dtype, s, 2, kRows);
        softmax_backward_ref(want.data(), dy.data(), y.data(), dtype, s, 0, kRows);
        EXPECT_TRUE(got.guards_intact());
        expect_close(got, want, y, kRows * columns, 4e-6);  // dy - sum(dy * y) has terms up to 2
      }
    }
  });
}

TEST(Softmax, GradientsPastTheCachesAreTheSame) {
  for_every_slice([](int64_t columns, int64_t offset) {
    for (DType dtype : kFloats) {
      for (int64_t width : {columns, 4096 + columns}) {  // the longer ones are finished from their end
        Array y(dtype, kRows * width), dy(dtype, kRows * width, offset), got(dtype, kRows * width, offset), want(dtype, kRows * width);
        y.fill(1, 0.0f, 1.0f);
        dy.fill(2);
        SoftmaxRows s{width, 0.7f, 3};
        softmax_backward(want.data(), dy.data(), y.data(), dtype, s, 0, kRows);
        s.past_caches = true;
        softmax_backward(got.data(), dy.data(), y.data(), dtype, s, 0, kRows);
        EXPECT_SAME(got, want);
      }
    }
  });
}

TEST(Softmax, LongRowsAreLikeShortOnes) {
  for (DType dtype : kFloats) {
    for (int64_t columns : {16384, 16385, 50001}) {
      Array x(dtype, columns), got(dtype, columns), want(dtype, columns);
      x.fill(3, -20.0f, 20.0f);
      for (int64_t i = 0; i < columns; ++i) x.set(i, x.get(i) + static_cast<float>(i) * 1e-3f);  // the maximum moves on
      softmax(got.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 0, 1);
      softmax_ref(want.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 0, 1);
      expect_close(got, want, want, columns, 2e-5);  // |z| is up to 70 here
      x.fill(4, -kInf, -kInf);
      for (int64_t i = 0; i < columns; ++i) x.set(i, -kInf);
      softmax(got.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 0, 1);
      for (int64_t i = 0; i < columns; ++i) ASSERT_EQ(got.get(i), 0.0f);
      x.set(columns - 1, 5.0f);
      softmax(got.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 0, 1);
      EXPECT_EQ(got.get(columns - 1), 1.0f);
      EXPECT_EQ(got.get(0), 0.0f);
    }
  }
}

TEST(Softmax, WorksInPlace) {
  for (DType dtype : kFloats) {
    for (DType mask_dtype : {DType::F32, DType::BOOL}) {
      constexpr int64_t kColumns = 139;
      const SoftmaxRows s{kColumns, 0.9f, 0};
      const Mask mask = make_mask(mask_dtype, kColumns, 5);
      Array x(dtype, kRows * kColumns), y(dtype, kRows * kColumns), dy(dtype, kRows * kColumns), dx(dtype, kRows * kColumns);
      for (const MaskView& view : {MaskView{}, mask.view}) {
        x.fill(1);
        dy.fill(2);
        softmax(y.data(), x.data(), dtype, s, view, 0, kRows);
        softmax(x.data(), x.data(), dtype, s, view, 0, kRows);
        EXPECT_SAME(x, y);
        softmax_backward(dx.data(), dy.data(), y.data(), dtype, s, 0, kRows);
        softmax_backward(dy.data(), dy.data(), y.data(), dtype, s, 0, kRows);
        EXPECT_SAME(dy, dx);
        dy.fill(2);
        softmax_backward(y.data(), dy.data(), y.data(), dtype, s, 0, kRows);
        EXPECT_SAME(y, dx);
      }
    }
  }
}

TEST(Softmax, KeepsNansAndInfinities) {
  for_every_slice([](int64_t columns, int64_t offset) {
    if (columns == 0) return;
    for (DType dtype : kFloats) {
      for (float rest : {0.0f, -kInf}) {
        for (float odd : {kNan, kInf}) {
          for (int64_t where : {int64_t{0}, columns / 2, columns - 1}) {
            Array x(dtype, columns, offset), y(dtype, columns, offset);
            for (int64_t i = 0; i < columns; ++i) x.set(i, i == where ? odd : rest);
            softmax(y.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 0, 1);
            for (int64_t i = 0; i < columns; ++i) ASSERT_TRUE(std::isnan(y.get(i))) << i;
          }
        }
      }
    }
  });
}

// Gradients come in pairs of g and -g, so the sum of g * y is 0 and what is written is scale * g * y, rounded once: where the last bits that are
// kept are odd or even, what is cut off is half, more or less.
TEST(Softmax, BackwardRoundsToNearestEven) {
  constexpr int64_t kColumns = 512;
  for (DType dtype : {DType::BF16, DType::F16}) {
    for (float scale : {1.0f, 0.125f, 0.7f, 4.0f}) {
      Array y(dtype, kColumns), dy(dtype, kColumns), dx(dtype, kColumns), want(dtype, kColumns);
      for (int64_t i = 0; i < kColumns; ++i) {
        const float step = static_cast<float>(i / 2 % 128) / 128.0f;
        y.set(i, 1.0f + static_cast<float>(1 + i / 256) / 128.0f);
        dy.set(i, i % 2 == 0 ? 1.0f + step : -1.0f - step);
        want.set(i, scale * y.get(i) * dy.get(i));
      }
      softmax_backward(dx.data(), dy.data(), y.data(), dtype, {kColumns, scale, 0}, 0, 1);
      EXPECT_SAME(dx, want);
    }
  }
}

TEST(Softmax, BackwardKeepsNansAndInfinities) {
  constexpr int64_t kColumns = 200;
  for (DType dtype : kFloats) {
    for (float scale : {1.0f, 0.7f}) {
      for (float odd : {kNan, kInf, -kInf, dtype == DType::F16 ? 6e4f : 3.38e38f}) {
        for (int64_t where : {int64_t{0}, int64_t{1}, int64_t{97}, kColumns - 1}) {
          for (float y_there : {0.0f, 0.5f, 1.0f}) {
            Array y(dtype, kColumns), dy(dtype, kColumns), dx(dtype, kColumns), want(dtype, kColumns);
            for (int64_t i = 0; i < kColumns; ++i) {
              y.set(i, i == where ? y_there : i % 3 == 0 ? 0.0f : 0.001f);
              dy.set(i, i == where ? odd : i % 2 == 0 ? -2.0f : 3.0f);
            }
            softmax_backward(dx.data(), dy.data(), y.data(), dtype, {kColumns, scale, 0}, 0, 1);
            softmax_backward_ref(want.data(), dy.data(), y.data(), dtype, {kColumns, scale, 0}, 0, 1);
            for (int64_t i = 0; i < kColumns; ++i) {
              const float a = dx.get(i), b = want.get(i);
              ASSERT_EQ(std::isnan(a), std::isnan(b)) << i << " of " << odd << " at " << where << ", y " << y_there;
              const float cancelled = i == where && std::isfinite(odd) ? 4e-7f * std::fabs(odd) : 0.0f;
              if (std::isfinite(b)) ASSERT_NEAR(a, b, std::fabs(b) * 0.01f + 1e-6f + cancelled) << i;
              if (std::isinf(b)) ASSERT_EQ(a, b) << i;
            }
          }
        }
      }
    }
  }
}

TEST(Softmax, LargeLogitsDoNotOverflow) {
  for (float value : {3e38f, 1e30f, -3e38f}) {
    for (float scale : {1.0f, 0.3f}) {
      Array x(DType::F32, 40), y(DType::F32, 40);
      for (int64_t i = 0; i < 40; ++i) x.set(i, value);
      softmax(y.data(), x.data(), DType::F32, {40, scale, 0}, {}, 0, 1);
      for (int64_t i = 0; i < 40; ++i) EXPECT_FLOAT_EQ(y.get(i), 1.0f / 40);
    }
  }
}

TEST(Softmax, RefusesBadArguments) {
  float x[4] = {}, y[4];
  EXPECT_THROW(softmax(y, nullptr, DType::F32, {4, 1.0f, 0}, {}, 0, 1), ValueError);
  EXPECT_THROW(softmax(y, x, DType::I32, {4, 1.0f, 0}, {}, 0, 1), ValueError);
  EXPECT_THROW(softmax(y, x, DType::F32, {-4, 1.0f, 0}, {}, 0, 1), ValueError);
  EXPECT_THROW(softmax(y, x, DType::F32, {4, 1.0f, 0}, {}, 1, int64_t{0}), ValueError);
  EXPECT_THROW(softmax_backward(y, x, nullptr, DType::F32, {4, 1.0f, 0}, 0, 1), ValueError);
  MaskView mask;
  mask.data = x;
  mask.dtype = DType::I64;
  EXPECT_THROW(softmax(y, x, DType::F32, {4, 1.0f, 0}, mask, 0, 1), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
