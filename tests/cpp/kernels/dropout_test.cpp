// SPDX-License-Identifier: Apache-2.0
// The SIMD dropout against the reference: the same mask to the bit, the same values to a rounding, for rows given together or apart.
#include "kernels/dropout/dropout.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

double eps_of(DType t) { return t == DType::F32 ? 0x1p-23 : t == DType::F16 ? 0x1p-10 : 0x1p-7; }

TEST(DropoutAdd, IsTheReference) {
  for_every_slice([](int64_t cols, int64_t offset) {
    const int64_t rows = cols > 300 ? 2 : 7, n = rows * cols, first_row = offset * 1000003;
    for (DType dtype : kFloats) {
      for (double p : {0.0, 0.1, 0.5, 1.0}) {
        for (bool has_bias : {false, true}) {
          const Dropout dropout{p, 0xfeedfacecafebeefu, 8};
          Array x(dtype, n, offset), bias(DType::F32, cols, offset), residual(dtype, n, offset), y(dtype, n, offset), want(dtype, n);
          x.fill(1), bias.fill(2), residual.fill(3);
          const float* b = has_bias ? bias.floats() : nullptr;
          dropout_add(dtype, x.data(), b, residual.data(), y.data(), dropout, first_row, rows, cols);
          dropout_add_ref(dtype, x.data(), b, residual.data(), want.data(), dropout, first_row, rows, cols);
          for (int64_t i = 0; i < n; ++i) {  // three float32 roundings of numbers below 40 before the last
            ASSERT_NEAR(y.get(i), want.get(i), eps_of(dtype) * std::abs(want.get(i)) + 40 * 0x1p-23 + 0x1p-24) << i;
          }
          EXPECT_TRUE(y.guards_intact());
          Array dx(dtype, n, offset), want_dx(dtype, n), sums(DType::F32, cols, offset), want_sums(DType::F32, cols);
          sums.fill(5);
          dropout_add_backward(dtype, residual.data(), dx.data(), has_bias ? sums.floats() : nullptr, dropout, first_row, rows, cols);
          dropout_add_backward_ref(dtype, residual.data(), want_dx.data(), want_sums.floats(), dropout, first_row, rows, cols);
          for (int64_t i = 0; i < n; ++i) {
            ASSERT_NEAR(dx.get(i), want_dx.get(i), eps_of(dtype) * std::abs(want_dx.get(i)));  // zero exactly where the mask is
          }
          EXPECT_TRUE(dx.guards_intact());
          Array past(dtype, n, offset);
          dropout_add_backward(dtype, residual.data(), {past.data(), true}, nullptr, dropout, first_row, rows, cols);
          EXPECT_SAME(past, dx);
          for (int64_t c = 0; has_bias && c < cols; ++c) ASSERT_NEAR(sums.get(c), want_sums.get(c), rows * rows * 4 * 0x1p-23);
          EXPECT_TRUE(sums.guards_intact());
        }
      }
    }
  });
}

TEST(DropoutAdd, RowsApartHaveTheBitsOfRowsTogether) {
  for_every_slice([](int64_t cols, int64_t offset) {
    if (cols > 300) return;
    const int64_t rows = 9;
    const Dropout dropout{0.3, 5, 4};
    Array x(DType::F32, rows * cols, offset), y(DType::F32, rows * cols, offset), apart(DType::F32, rows * cols, offset);
    x.fill(1);
    dropout_add(DType::F32, x.data(), nullptr, x.data(), y.data(), dropout, 0, rows, cols);
    for (int64_t r = 0; r < rows; ++r) {
      dropout_add(DType::F32, x.floats() + r * cols, nullptr, x.floats() + r * cols, apart.floats() + r * cols, dropout, r, 1, cols);
    }
    EXPECT_SAME(apart, y);
  });
}

TEST(DropoutAdd, DroppedValuesDoNotMatter) {
  float x[64], residual[64] = {}, y[64];
  for (float& v : x) v = std::numeric_limits<float>::quiet_NaN();
  dropout_add(DType::F32, x, nullptr, residual, y, {1.0, 1, 0}, 0, 1, 64);
  for (float v : y) EXPECT_EQ(v, 0.0f);
}

TEST(DropoutAdd, RefusesBadArguments) {
  float x[4] = {};
  EXPECT_THROW(dropout_add(DType::I32, x, nullptr, x, x, {0.1, 0, 0}, 0, 1, 4), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, nullptr, nullptr, x, {0.1, 0, 0}, 0, 1, 4), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, nullptr, x, x, {1.1, 0, 0}, 0, 1, 4), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, nullptr, x, x, {0.1, 0, 0}, -1, 1, 4), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
