// SPDX-License-Identifier: Apache-2.0
// The CUDA dropout, run on the host: the reference's mask to the bit, its values to a rounding, its sums exactly where they are exact.
#include "kernels/dropout/dropout.h"

#include <algorithm>
#include <tuple>

#include "arrays.h"
#include "base/error.h"
#include "kernels/activation/activation.h"

namespace ds::kernels::testing {
namespace {

constexpr uint64_t kSeed = 0xfeedfacecafebeefu, kOffset = (uint64_t{1} << 34) + 8;

double eps_of(DType t) { return t == DType::F32 ? 0x1p-23 : t == DType::F16 ? 0x1p-10 : 0x1p-7; }
int64_t vector_of(DType t) { return 16 / static_cast<int64_t>(dtype_size(t)); }

struct State {
  State() { write_philox_state(at(), kSeed, kOffset, nullptr, nullptr, nullptr); }
  int64_t* at() { return memory.as<int64_t>(); }
  DeviceArray memory{DType::I64, 2};
};

struct Case {
  DType dtype, bias_dtype;
  int64_t rows, cols;
  bool has_bias;
  int64_t x, residual, y;  // where they begin; in the backward pass dy, dx and the sums
  double p;
};

std::string words(const Case& c) {
  const std::string shape = " rows " + std::to_string(c.rows) + " cols " + std::to_string(c.cols);
  const std::string offsets = " offsets " + std::to_string(c.x) + std::to_string(c.residual) + std::to_string(c.y);
  const std::string bias = std::string(" bias ") + (c.has_bias ? dtype_name(c.bias_dtype) : "none");
  return dtype_name(c.dtype) + bias + shape + offsets + " p " + std::to_string(c.p);
}

std::vector<float> as_floats(DeviceArray& a) {
  std::vector<float> all;
  for (int64_t i = 0; i < a.size(); ++i) all.push_back(a.get(i));
  return all;
}

std::string expect_forward(const Case& c) {
  const int64_t n = c.rows * c.cols;
  DeviceArray x(c.dtype, n, c.x), residual(c.dtype, n, c.residual), y(c.dtype, n, c.y), bias(c.bias_dtype, c.cols, c.y), want(c.dtype, n);
  x.fill(1), residual.fill(3), bias.fill(2);
  const std::vector<float> values = as_floats(bias);
  State state;
  const void* b = c.has_bias ? bias.data() : nullptr;
  dropout_add(c.dtype, x.data(), b, c.bias_dtype, residual.data(), y.data(), c.p, state.at(), c.rows, c.cols, nullptr);
  const float* known = c.has_bias ? values.data() : nullptr;
  dropout_add_ref(c.dtype, x.data(), known, residual.data(), want.data(), {c.p, kSeed, kOffset}, 0, c.rows, c.cols);
  for (int64_t i = 0; i < n; ++i) {  // three float32 roundings of numbers below 40 before the last
    EXPECT_NEAR(y.get(i), want.get(i), eps_of(c.dtype) * std::abs(want.get(i)) + 40 * 0x1p-23 + 0x1p-24) << i;
    if (::testing::Test::HasFailure()) break;
  }
  EXPECT_TRUE(y.guards_intact() && x.guards_intact() && residual.guards_intact() && bias.guards_intact());
  const std::string bits = y.bits();
  for (DeviceArray* in_place : {&x, &residual}) {
    DeviceArray to(c.dtype, n, in_place == &x ? c.x : c.residual), other(c.dtype, n, in_place == &x ? c.residual : c.x);
    to.copy(*in_place);
    other.copy(in_place == &x ? residual : x);
    const void *first = in_place == &x ? to.data() : other.data(), *second = in_place == &x ? other.data() : to.data();
    dropout_add(c.dtype, first, b, c.bias_dtype, second, to.data(), c.p, state.at(), c.rows, c.cols, nullptr);
    EXPECT_SAME(to, y);
  }
  return bits;
}

// Whole numbers, which 1 / (1 - p) = 1 or 2 and sums of float32 keep: any other order of additions has the same bits, too.
void fill_whole(DeviceArray& a, unsigned seed) {
  std::mt19937 generator(seed);
  for (int64_t i = 0; i < a.size(); ++i) a.set(i, static_cast<float>(static_cast<int>(generator() % 5) - 2));
}

std::string expect_backward(const Case& c, bool whole) {
  const int64_t n = c.rows * c.cols;
  DeviceArray dy(c.dtype, n, c.x), dx(c.dtype, n, c.residual), sums(c.bias_dtype, c.cols, c.y);
  DeviceArray want(c.dtype, n), want_sums(c.bias_dtype, c.cols);
  whole ? fill_whole(dy, 1) : dy.fill(1);
  sums.fill(2);
  DeviceArray workspace(DType::F32, cuda_bias_sums_bytes(c.rows, c.cols) / 4, 1);
  for (int64_t i = 0; i < workspace.size(); ++i) workspace.set(i, std::numeric_limits<float>::quiet_NaN());
  State state;
  dropout_add_backward(c.dtype, dy.data(), dx.data(), c.has_bias ? sums.data() : nullptr, c.bias_dtype, c.p, state.at(), c.rows, c.cols,
                       c.has_bias ? workspace.data() : nullptr, nullptr);
  std::vector<float> exact(static_cast<size_t>(c.cols));
  dropout_add_backward_ref(c.dtype, dy.data(), want.data(), exact.data(), {c.p, kSeed, kOffset}, 0, c.rows, c.cols);
  for (int64_t i = 0; i < n; ++i) {
    EXPECT_NEAR(dx.get(i), want.get(i), eps_of(c.dtype) * std::abs(want.get(i))) << i;  // zero exactly where the mask is
    if (::testing::Test::HasFailure()) break;
  }
  EXPECT_TRUE(dx.guards_intact() && dy.guards_intact() && sums.guards_intact() && workspace.guards_intact());
  if (c.has_bias) {
    for (int64_t col = 0; col < c.cols; ++col) {
      const float right = exact[static_cast<size_t>(col)];
      want_sums.set(col, right);
      if (whole) continue;
      // 1 / (1 - p), the product, and a block's additions one after the other, of at most 1024 rows here; the rest is in float64.
      double magnitude = 0.0;
      for (int64_t r = 0; r < c.rows; ++r) magnitude += 2.0 / (1.0 - std::min(c.p, 0.9)) * (want.get(r * c.cols + col) != 0.0f);
      const double allowed = (static_cast<double>(std::min<int64_t>(c.rows, 1024)) + 3) * 0x1p-24 * magnitude;
      EXPECT_NEAR(sums.get(col), right, allowed + eps_of(c.bias_dtype) * (std::abs(right) + allowed)) << col;
      if (::testing::Test::HasFailure()) break;
    }
    if (whole) {
      EXPECT_SAME(sums, want_sums);
    }
  }
  const std::string bits = dx.bits() + sums.bits();
  // In place, and as a flat array.
  dropout_add_backward(c.dtype, dy.data(), dy.data(), nullptr, c.bias_dtype, c.p, state.at(), c.rows, c.cols, nullptr, nullptr);
  EXPECT_SAME(dy, dx);
  return bits;
}

TEST(DeviceDropout, IsTheReferenceOverAFlatArray) {
  for (DType dtype : kFloats) {
    const int64_t v = vector_of(dtype), row = 256 * v;
    for (int64_t n : {int64_t{1}, int64_t{3}, v - 1, v, v + 1, row - 1, row, row + 1, row + v, 4 * row, 4 * row + v + 1, 9 * row + 5}) {
      for (double p : {0.0, 0.1, 0.5, 1.0}) {
        for (const auto& [x, residual, y] : {std::tuple{0, 0, 0}, {1, 1, 1}, {3, 0, 0}, {0, 1, 0}, {0, 0, 1}}) {
          if (x + residual + y != 0 && n > row + v) continue;
          const Case c{dtype, DType::F32, 1, n, false, x, residual, y, p};
          SCOPED_TRACE(words(c));
          expect_forward(c);
          expect_backward(c, false);
          if (HasFailure()) return;
        }
      }
    }
  }
}

// Columns: around a vector, a block's width in vectors and in elements. Rows: around the four rows at a time that a thread has.
TEST(DeviceDropout, IsTheReferenceOverRows) {
  for (DType dtype : kFloats) {
    const int64_t v = vector_of(dtype);
    for (int64_t cols : {int64_t{1}, int64_t{3}, v, 2 * v, 5 * v, 33 * v, int64_t{255}, int64_t{257}, 256 * v, 257 * v}) {
      for (int64_t rows : {1, 4, 5, 9, 33}) {
        if (rows * cols > 12000) continue;
        for (const auto& [x, residual, y] : {std::tuple{0, 0, 0}, {1, 1, 1}, {0, 3, 1}}) {
          for (DType bias_dtype : {dtype, DType::F32}) {
            const Case c{dtype, bias_dtype, rows, cols, true, x, residual, y, rows % 2 ? 0.1 : 0.5};
            SCOPED_TRACE(words(c));
            expect_forward(c);
            expect_backward(c, false);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

// Rows in plenty: several row blocks (1024 rows of one vector, 4 of 256 vectors), and more of them than partial sums are kept.
TEST(DeviceDropout, SumsAreExactInEveryOrder) {
  const Case all[] = {
      {DType::F32, DType::F32, 1023, 4, true, 0, 0, 0, 0.5},   {DType::BF16, DType::F32, 1025, 8, true, 0, 0, 0, 0.5},
      {DType::F16, DType::F16, 2100, 3, true, 0, 0, 0, 0.5},   {DType::F32, DType::F32, 77, 40, true, 0, 0, 0, 0.0},
      {DType::F32, DType::F32, 9, 1100, true, 0, 0, 0, 0.5},   {DType::BF16, DType::BF16, 1024, 200, true, 0, 0, 0, 0.5},
      {DType::BF16, DType::F32, 1024, 200, true, 1, 1, 1, 0.5}, {DType::F16, DType::F32, 1030, 250, true, 1, 0, 1, 0.5},
  };
  for (const Case& c : all) {
    SCOPED_TRACE(words(c));
    in_every_order([&] { return expect_backward(c, true); });
    Case rough = c;
    rough.p = 0.1;
    expect_backward(rough, false);
    if (HasFailure()) return;
  }
}

TEST(DeviceDropout, SumsOfNoRowsAreZero) {
  State state;
  DeviceArray sums(DType::BF16, 5), none(DType::F32, 1);
  sums.fill(1);
  dropout_add_backward(DType::F32, nullptr, nullptr, sums.data(), DType::BF16, 0.5, state.at(), 0, 5, nullptr, nullptr);
  for (int64_t c = 0; c < 5; ++c) EXPECT_EQ(sums.get(c), 0.0f);
  dropout_add_backward(DType::F32, nullptr, nullptr, sums.data(), DType::BF16, 0.5, state.at(), 5, 0, nullptr, nullptr);
  dropout_add(DType::F32, nullptr, nullptr, DType::F32, nullptr, nullptr, 0.5, state.at(), 0, 5, nullptr);
  dropout_add(DType::F32, nullptr, none.data(), DType::F32, nullptr, nullptr, 0.5, state.at(), 5, 0, nullptr);
}

TEST(DeviceDropout, DroppedValuesDoNotMatterAndNothingIsDrawnForNothing) {
  State state;
  DeviceArray x(DType::F32, 67), residual(DType::F32, 67), y(DType::F32, 67);
  for (int64_t i = 0; i < 67; ++i) x.set(i, std::numeric_limits<float>::quiet_NaN());
  residual.fill(1);
  dropout_add(DType::F32, x.data(), nullptr, DType::F32, residual.data(), y.data(), 1.0, state.at(), 1, 67, nullptr);
  EXPECT_SAME(y, residual);
  dropout_add_backward(DType::F32, residual.data(), y.data(), nullptr, DType::F32, 0.0, nullptr, 1, 67, nullptr, nullptr);
  EXPECT_SAME(y, residual);
}

TEST(DeviceDropout, StateIsTheValuesOrWhatLiesAtPointers) {
  DeviceArray state(DType::I64, 2), seed(DType::I64, 1), offset(DType::I64, 1);
  seed.as<int64_t>()[0] = -5, offset.as<int64_t>()[0] = int64_t{1} << 40;
  const auto expect = [&](int64_t want_seed, int64_t want_offset) {
    EXPECT_EQ(state.as<int64_t>()[0], want_seed);
    EXPECT_EQ(state.as<int64_t>()[1], want_offset);
    EXPECT_TRUE(state.guards_intact());
  };
  write_philox_state(state.as<int64_t>(), kSeed, 12, nullptr, nullptr, nullptr);
  expect(static_cast<int64_t>(kSeed), 12);
  write_philox_state(state.as<int64_t>(), kSeed, 12, seed.as<int64_t>(), nullptr, nullptr);
  expect(-5, 12);
  write_philox_state(state.as<int64_t>(), kSeed, 12, nullptr, offset.as<int64_t>(), nullptr);
  expect(static_cast<int64_t>(kSeed), (int64_t{1} << 40) + 12);
  write_philox_state(state.as<int64_t>(), 0, 0, seed.as<int64_t>(), offset.as<int64_t>(), nullptr);
  expect(-5, int64_t{1} << 40);
  EXPECT_THROW(write_philox_state(nullptr, 0, 0, nullptr, nullptr, nullptr), ValueError);
}

TEST(DeviceDropout, RefusesBadArguments) {
  State state;
  alignas(16) float x[4] = {};
  int64_t* s = state.at();
  EXPECT_THROW(dropout_add(DType::I32, x, nullptr, DType::F32, x, x, 0.1, s, 1, 4, nullptr), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, nullptr, DType::F32, nullptr, x, 0.1, s, 1, 4, nullptr), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, nullptr, DType::F32, x, x, 1.1, s, 1, 4, nullptr), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, nullptr, DType::F32, x, x, 0.1, nullptr, 1, 4, nullptr), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, nullptr, DType::F32, x, x, 0.1, s, -1, 4, nullptr), ValueError);
  EXPECT_THROW(dropout_add(DType::F32, x, x, DType::BF16, x, x, 0.1, s, 1, 4, nullptr), ValueError);
  EXPECT_THROW(dropout_add(DType::BF16, x, x, DType::F16, x, x, 0.1, s, 1, 4, nullptr), ValueError);
  EXPECT_THROW(dropout_add_backward(DType::F32, x, x, x, DType::F32, 0.1, s, 1, 4, nullptr, nullptr), ValueError);
  EXPECT_THROW(dropout_add_backward(DType::F32, x, x, x, DType::I8, 0.1, s, 1, 4, x, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
