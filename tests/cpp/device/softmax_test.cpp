// SPDX-License-Identifier: Apache-2.0
// The CUDA softmax, run on the host, against the float64 reference, element by element.
#include "kernels/softmax/softmax.h"

#include <set>

#include "arrays.h"
#include "base/error.h"

namespace ds::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Both ends of every range of lengths that in_registers() tells apart, in single elements and in vectors of 4 and of 8; longer ones are read twice.
const std::vector<int64_t>& lengths() {
  static const auto* const all = [] {
    std::set<int64_t> found = {3, 5, 516, 2052, 8196, 16384, 16385, 16388, 16392};
    for (int64_t most : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
      for (int64_t vec : {1, 4, 8}) {
        if (most * vec > 16384) continue;
        found.insert(most * vec);
        found.insert((most + 1) * vec);
      }
    }
    return new std::vector<int64_t>(found.begin(), found.end());
  }();
  return *all;
}

int64_t rows_for(int64_t columns) { return columns <= 1024 ? 9 : 3; }  // a warp a row: the second block has one

// One rounding of the result at its storage format.
double rounding(DType dtype, double value) {
  const double eps = dtype == DType::F32 ? 6e-8 : dtype == DType::BF16 ? 3.91e-3 : 4.89e-4;
  return eps * std::fabs(value) + (dtype == DType::F16 ? 6e-8 : 0.0);  // half a subnormal
}

// |got - want| <= the two roundings of the result and `slack` of `magnitude`, which is how large what was rounded on the way is.
void expect_close(DeviceArray& got, DeviceArray& want, DeviceArray& magnitude, double slack) {
  EXPECT_TRUE(got.guards_intact());
  for (int64_t i = 0; i < got.size(); ++i) {
    const double a = got.get(i), b = want.get(i);
    const double allowed = 2 * rounding(want.dtype(), b) + slack * std::fabs(magnitude.get(i)) + 2e-38;
    ASSERT_LE(std::fabs(a - b), allowed) << i << ": " << a << " for " << b;
  }
}

// z = scale * x + mask, |z| <= 6, is rounded to float32 twice where the reference has float64, and so are sums of at most 80 terms one
// after the other: relative errors of y.
constexpr double kSlack = 6e-6;

// NaN in every format, so that what a kernel leaves alone is seen.
void spoil(DeviceArray& a) { std::memset(a.data(), 0xff, static_cast<size_t>(a.size()) * dtype_size(a.dtype())); }

// Three masks in turn for rows of [rows / 3, 3, columns], broadcast over the first dimension. The third hides all.
struct Mask {
  Mask(DType dtype, int64_t rows, int64_t columns, int64_t apart) : values(dtype, 3 * columns, apart) {
    std::mt19937 random(7 + static_cast<unsigned>(columns));
    if (dtype != DType::BOOL) values.fill(5, -1.0f, 1.0f);
    for (int64_t i = 0; i < 3 * columns; ++i) {
      const bool hidden = random() % 3 == 0 || i / columns == 2;
      if (dtype == DType::BOOL) values.as<uint8_t>()[i] = hidden ? static_cast<uint8_t>(1 + random() % 255) : 0;
      else if (hidden) values.set(i, -kInf);
    }
    view.data = values.data();
    view.dtype = dtype;
    view.dims = 2;
    view.sizes[0] = rows / 3, view.sizes[1] = 3;
    view.strides[0] = 0, view.strides[1] = columns;
  }
  DeviceArray values;
  MaskView view;
};

void compare_forward(DType dtype, int64_t columns, int64_t apart_x, int64_t apart_y, const SoftmaxRows& s, const MaskView& mask) {
  const int64_t rows = rows_for(columns);
  SCOPED_TRACE(std::string(dtype_name(dtype)) + " columns " + std::to_string(columns) + " queries " + std::to_string(s.queries) + " mask " +
               (mask.data == nullptr ? "none" : dtype_name(mask.dtype)));
  DeviceArray x(dtype, rows * columns, apart_x), got(dtype, rows * columns, apart_y), want(dtype, rows * columns);
  x.fill(static_cast<unsigned>(columns), -5.0f, 5.0f);
  softmax_ref(want.data(), x.data(), dtype, s, mask, 0, rows);
  in_every_order([&] {
    spoil(got);
    softmax(got.data(), x.data(), dtype, s, mask, rows, nullptr);
    expect_close(got, want, want, kSlack);
    return got.bits();
  });
}

TEST(DeviceSoftmax, EveryTeamForward) {
  for (DType dtype : kFloats) {
    for (int64_t columns : lengths()) {
      compare_forward(dtype, columns, 0, 0, {columns, 0.9f, 0}, {});
      compare_forward(dtype, columns, 0, 0, {columns, -0.37f, 3}, {});  // causal
      if (HasFailure()) return;
    }
  }
}

TEST(DeviceSoftmax, EveryMask) {
  for (DType dtype : kFloats) {
    for (DType mask_dtype : {DType::F32, DType::BF16, DType::F16, DType::BOOL}) {
      for (int64_t columns : {4, 7, 8, 1028, 1029, 1032, 4104, 16384, 16388}) {
        if (columns > 4104 && dtype != DType::F32 && mask_dtype != dtype) continue;
        for (int64_t apart : {0, 1}) {
          const Mask mask(mask_dtype, rows_for(columns), columns, apart);
          compare_forward(dtype, columns, 0, 0, {columns, 0.6f, 3 * apart}, mask.view);
          EXPECT_TRUE(mask.values.guards_intact());
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(DeviceSoftmax, EveryAlignment) {
  for (DType dtype : kFloats) {
    for (int64_t columns : {8, 132, 2052, 16388}) {
      for (auto [x, y] : {std::pair<int64_t, int64_t>{1, 0}, {0, 1}, {3, 3}, {2, 0}}) {
        compare_forward(dtype, columns, x, y, {columns, 1.0f, 0}, {});
      }
      if (HasFailure()) return;
    }
  }
}

// Rows that see no column at all, one, and all of them; blocks of rows that do not end with a matrix.
TEST(DeviceSoftmax, CausalRows) {
  for (int64_t columns : {1, 2, 5, 8, 130, 1030}) {
    for (int64_t queries : {1, 2, 6, 9}) compare_forward(DType::F32, columns, 0, 0, {columns, 1.0f, queries}, {});
  }
}

void compare_backward(DType dtype, int64_t columns, int64_t queries, int64_t apart_dx, int64_t apart_dy, int64_t apart_y) {
  const int64_t rows = rows_for(columns), n = rows * columns;
  SCOPED_TRACE(std::string(dtype_name(dtype)) + " columns " + std::to_string(columns) + " queries " + std::to_string(queries));
  DeviceArray y(dtype, n, apart_y), dy(dtype, n, apart_dy), got(dtype, n, apart_dx), want(dtype, n);
  const SoftmaxRows s{columns, 0.7f, queries};
  dy.fill(static_cast<unsigned>(columns));
  y.fill(static_cast<unsigned>(columns + 1), -3.0f, 3.0f);
  softmax_ref(y.data(), y.data(), dtype, s, {}, 0, rows);
  softmax_backward_ref(want.data(), dy.data(), y.data(), dtype, s, 0, rows);
  in_every_order([&] {
    spoil(got);
    softmax_backward(got.data(), dy.data(), y.data(), dtype, s, rows, nullptr);
    expect_close(got, want, y, 4e-6);  // dy - sum(dy * y) has terms up to 2
    return got.bits();
  });
}

TEST(DeviceSoftmax, EveryTeamBackward) {
  for (DType dtype : kFloats) {
    for (int64_t columns : lengths()) {
      compare_backward(dtype, columns, columns % 2 == 0 ? 0 : 3, 0, 0, 0);
      if (columns % 4 == 0) compare_backward(dtype, columns, 3, 0, 0, 0);
      if (HasFailure()) return;
    }
    for (int64_t columns : {8, 2052, 8196}) {
      for (int which = 0; which < 3; ++which) compare_backward(dtype, columns, 0, which == 0, which == 1, which == 2);
      if (HasFailure()) return;
    }
  }
}

TEST(DeviceSoftmax, WorksInPlace) {
  for (DType dtype : kFloats) {
    for (int64_t columns : {7, 8, 2052, 16388}) {
      const int64_t rows = rows_for(columns), n = rows * columns;
      const SoftmaxRows s{columns, 0.9f, 0};
      const Mask mask(DType::F32, rows, columns, 0);
      DeviceArray x(dtype, n), y(dtype, n), dy(dtype, n), dx(dtype, n), kept(dtype, n);
      x.fill(1);
      softmax(y.data(), x.data(), dtype, s, mask.view, rows, nullptr);
      in_every_order([&] {
        x.fill(1);
        dy.fill(2);
        softmax(x.data(), x.data(), dtype, s, mask.view, rows, nullptr);
        EXPECT_SAME(x, y);
        softmax_backward(dx.data(), dy.data(), x.data(), dtype, s, rows, nullptr);
        kept.copy(dy);
        softmax_backward(dy.data(), dy.data(), x.data(), dtype, s, rows, nullptr);
        EXPECT_SAME(dy, dx);
        softmax_backward(x.data(), kept.data(), x.data(), dtype, s, rows, nullptr);
        EXPECT_SAME(x, dx);
        return x.bits();
      });
    }
  }
}

// A row whose maximum moves on from group to group; rows of nothing; one element in nothing.
TEST(DeviceSoftmax, LongRowsAreLikeShortOnes) {
  for (DType dtype : kFloats) {
    for (int64_t columns : {1500, 16384, 20001}) {
      DeviceArray x(dtype, columns), got(dtype, columns), want(dtype, columns);
      x.fill(3, -20.0f, 20.0f);
      for (int64_t i = 0; i < columns; ++i) x.set(i, x.get(i) + static_cast<float>(i) * 1e-3f);
      softmax(got.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 1, nullptr);
      softmax_ref(want.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 0, 1);
      expect_close(got, want, want, 2e-5);  // |z| is up to 40 here
      for (int64_t i = 0; i < columns; ++i) x.set(i, -kInf);
      softmax(got.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 1, nullptr);
      for (int64_t i = 0; i < columns; ++i) ASSERT_EQ(got.get(i), 0.0f);
      x.set(columns - 1, 5.0f);
      softmax(got.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 1, nullptr);
      EXPECT_EQ(got.get(columns - 1), 1.0f);
      EXPECT_EQ(got.get(0), 0.0f);
    }
  }
}

TEST(DeviceSoftmax, KeepsNansAndInfinities) {
  for (int64_t columns : {1, 6, 40, 1500, 16400}) {
    for (DType dtype : kFloats) {
      for (float rest : {0.0f, -kInf}) {
        for (float odd : {kNan, kInf}) {
          for (int64_t where : {int64_t{0}, columns / 2, columns - 1}) {
            DeviceArray x(dtype, 2 * columns), y(dtype, 2 * columns);
            for (int64_t i = 0; i < columns; ++i) x.set(i, i == where ? odd : rest);
            softmax(y.data(), x.data(), dtype, {columns, 1.0f, 2}, {}, 2, nullptr);  // the first row does not see its last column
            for (int64_t i = 0; i < columns - 1; ++i) ASSERT_EQ(std::isnan(y.get(i)), where < columns - 1) << i;
            ASSERT_EQ(y.get(columns - 1), 0.0f);
            softmax(y.data(), x.data(), dtype, {columns, 1.0f, 0}, {}, 1, nullptr);
            for (int64_t i = 0; i < columns; ++i) ASSERT_TRUE(std::isnan(y.get(i))) << i;
          }
        }
      }
    }
  }
}

TEST(DeviceSoftmax, LargeLogitsDoNotOverflow) {
  for (int64_t columns : {40, 1500, 16400}) {
    for (float value : {3e38f, 1e30f, -3e38f}) {
      DeviceArray x(DType::F32, columns), y(DType::F32, columns);
      for (int64_t i = 0; i < columns; ++i) x.set(i, value);
      softmax(y.data(), x.data(), DType::F32, {columns, 0.3f, 0}, {}, 1, nullptr);
      for (int64_t i = 0; i < columns; ++i) ASSERT_FLOAT_EQ(y.get(i), 1.0f / static_cast<float>(columns));
    }
  }
}

TEST(DeviceSoftmax, RefusesBadArguments) {
  DeviceArray a(DType::F32, 4), b(DType::F32, 4);
  float *x = a.floats(), *y = b.floats();
  EXPECT_THROW(softmax(y, nullptr, DType::F32, {4, 1.0f, 0}, {}, 1, nullptr), ValueError);
  EXPECT_THROW(softmax(y, x, DType::I32, {4, 1.0f, 0}, {}, 1, nullptr), ValueError);
  EXPECT_THROW(softmax(y, x, DType::F32, {-4, 1.0f, 0}, {}, 1, nullptr), ValueError);
  EXPECT_THROW(softmax(y, x, DType::F32, {4, 1.0f, -1}, {}, 1, nullptr), ValueError);
  EXPECT_THROW(softmax(y, x, DType::F32, {4, 1.0f, 0}, {}, -1, nullptr), ValueError);
  EXPECT_THROW(softmax_backward(y, x, nullptr, DType::F32, {4, 1.0f, 0}, 1, nullptr), ValueError);
  EXPECT_THROW(softmax_backward(y, x, x, DType::F32, {-4, 1.0f, 0}, 1, nullptr), ValueError);
  MaskView mask;
  mask.data = x;
  mask.dtype = DType::I64;
  EXPECT_THROW(softmax(y, x, DType::F32, {4, 1.0f, 0}, mask, 1, nullptr), ValueError);
  softmax(nullptr, nullptr, DType::F32, {0, 1.0f, 0}, {}, 3, nullptr);  // rows of nothing
  softmax(nullptr, nullptr, DType::F32, {4, 1.0f, 0}, {}, 0, nullptr);
  softmax_backward(nullptr, nullptr, nullptr, DType::F32, {0, 1.0f, 0}, 3, nullptr);
}

}  // namespace
}  // namespace ds::kernels::testing
