// SPDX-License-Identifier: Apache-2.0
// The SIMD activations against the float64 reference: how much value and slope err over the whole range, then every loop, dtype and tail.
#include "kernels/activation/activation.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

constexpr Activation kAll[] = {Activation::GeluErf, Activation::GeluTanh, Activation::Silu, Activation::Relu};
constexpr double kEps32 = 0x1p-23;

template <typename Body>
void for_every_target(const Body& body) {
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    SCOPED_TRACE(hwy::TargetName(target));
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

// Rounding the argument of an exponential costs the result as many eps as the argument is large, times the number of roundings over two.
double exponent_of(Activation act, double x) {
  switch (act) {
    case Activation::GeluErf: return 0.5 * x * x;                                      // two
    case Activation::GeluTanh: return 1.5 * 1.6 * std::abs(x) * (1 + 0.0447 * x * x);  // three
    default: return 0.0;
  }
}

// Every 4099th float of either sign up to 100 and 20 thousand evenly spaced ones.
std::vector<float> whole_range() {
  std::vector<float> all;
  for (uint32_t bits = 0; float_from_bits(bits) <= 100.0f; bits += 4099) {
    all.push_back(float_from_bits(bits));
    all.push_back(-float_from_bits(bits));
  }
  for (int i = -10000; i <= 10000; ++i) all.push_back(static_cast<float>(i) / 625.0f);
  return all;
}

TEST(Activation, ValuesAreAccurateOverTheWholeRange) {
  std::vector<float> x = whole_range(), y(x.size());
  for_every_target([&] {
    for (Activation act : kAll) {
      bias_act(act, DType::F32, x.data(), nullptr, y.data(), 1, static_cast<int64_t>(x.size()));
      double worst = 0.0, where = 0.0;
      for (size_t i = 0; i < x.size(); ++i) {
        const double exact = activation_value(act, x[i]);
        if (std::abs(exact) < 1e-30) {  // the far tail goes to zero a little early
          EXPECT_LE(std::abs(y[i]), 1e-30) << x[i];
          continue;
        }
        const double allowed = kEps32 * std::abs(exact) * (4.0 + (x[i] < 0 ? exponent_of(act, x[i]) : 0.0));
        const double share = std::abs(y[i] - exact) / allowed;
        if (share > worst) worst = share, where = x[i];
      }
      EXPECT_LE(worst, 1.0) << "activation " << static_cast<int>(act) << " at " << where;
    }
  });
}

TEST(Activation, SlopesAreAccurateOverTheWholeRange) {
  std::vector<float> x = whole_range(), one(x.size(), 1.0f), slope(x.size());
  for_every_target([&] {
    for (Activation act : kAll) {
      bias_act_backward(act, DType::F32, one.data(), x.data(), nullptr, slope.data(), nullptr, 1, static_cast<int64_t>(x.size()));
      double worst = 0.0, where = 0.0;
      for (size_t i = 0; i < x.size(); ++i) {
        const double error = std::abs(slope[i] - activation_slope(act, x[i]));
        if (error > worst) worst = error, where = x[i];
      }
      EXPECT_LE(worst, 4.0 * kEps32) << "activation " << static_cast<int>(act) << " at " << where;
    }
  });
}

TEST(Activation, NanGoesThroughAndLargeValuesSaturate) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  for_every_target([&] {
    for (Activation act : kAll) {
      std::vector<float> x = {nan, 3e38f, -3e38f, inf, 1e20f, -1e20f, 0.0f, -0.0f}, one(x.size(), 1.0f), y(x.size()), slope(x.size());
      bias_act(act, DType::F32, x.data(), nullptr, y.data(), 1, 8);
      bias_act_backward(act, DType::F32, one.data(), x.data(), nullptr, slope.data(), nullptr, 1, 8);
      EXPECT_TRUE(std::isnan(y[0]));
      EXPECT_EQ(std::isnan(slope[0]), act != Activation::Relu);
      EXPECT_EQ(y[1], 3e38f);
      EXPECT_EQ(y[2], 0.0f);
      EXPECT_EQ(y[3], inf);
      EXPECT_EQ(slope[4], 1.0f);
      EXPECT_EQ(slope[5], 0.0f);
      EXPECT_EQ(y[6], 0.0f);
      EXPECT_EQ(slope[6], act == Activation::Relu ? 0.0f : 0.5f);
    }
  });
}

// What the method errs before the result is rounded.
double own_error(DType t) { return t == DType::F32 ? 4 * kEps32 : t == DType::F16 ? 0x1p-15 : 0x1p-13; }

// How far a result may lie from the rounded reference: one unit in the last place, the method's error before rounding, and the rounding of
// x + bias, which are below 8.
void expect_near(Array& got, Array& want, int64_t i, double magnitude) {
  const DType t = got.dtype();
  const double eps = t == DType::F32 ? kEps32 : t == DType::F16 ? 0x1p-10 : 0x1p-7;
  const double own = own_error(t);
  const double tiny = t == DType::F16 ? 0x1p-24 : 1e-30;
  ASSERT_NEAR(got.get(i), want.get(i), eps * std::abs(want.get(i)) + own * magnitude + 4 * kEps32 + tiny) << dtype_name(t) << " element " << i;
}

void expect_sums(Array& got, Array& want, DType dtype, int64_t rows, int64_t cols, double magnitude) {
  const double own = own_error(dtype);
  for (int64_t c = 0; c < cols; ++c) ASSERT_NEAR(got.get(c), want.get(c), rows * magnitude * (own + rows * kEps32)) << c;
  EXPECT_TRUE(got.guards_intact());
}

TEST(BiasAct, IsTheReference) {
  for_every_slice([](int64_t cols, int64_t offset) {
    const int64_t rows = cols > 300 ? 2 : 6, n = rows * cols;
    for (DType dtype : kFloats) {
      for (Activation act : kAll) {
        for (bool has_bias : {false, true}) {
          Array x(dtype, n, offset), bias(DType::F32, cols, offset), dy(dtype, n, offset + 1), y(dtype, n, offset), want(dtype, n);
          Array dx(dtype, n, 2 * offset), want_dx(dtype, n), sums(DType::F32, cols, offset), want_sums(DType::F32, cols);
          x.fill(1, -6, 6), bias.fill(2), dy.fill(3), sums.fill(4);
          const float* b = has_bias ? bias.floats() : nullptr;
          bias_act(act, dtype, x.data(), b, y.data(), rows, cols);
          bias_act_ref(act, dtype, x.data(), b, want.data(), rows, cols);
          for (int64_t i = 0; i < n; ++i) expect_near(y, want, i, std::abs(want.get(i)));
          EXPECT_TRUE(y.guards_intact());
          bias_act_backward(act, dtype, dy.data(), x.data(), b, dx.data(), has_bias ? sums.floats() : nullptr, rows, cols);
          bias_act_backward_ref(act, dtype, dy.data(), x.data(), b, want_dx.data(), want_sums.floats(), rows, cols);
          for (int64_t i = 0; i < n; ++i) expect_near(dx, want_dx, i, 2.0 * std::abs(dy.get(i)));
          EXPECT_TRUE(dx.guards_intact());
          Array past_y(dtype, n, offset), past_dx(dtype, n, 2 * offset);
          bias_act(act, dtype, x.data(), b, {past_y.data(), true}, rows, cols);
          bias_act_backward(act, dtype, dy.data(), x.data(), b, {past_dx.data(), true}, nullptr, rows, cols);
          EXPECT_SAME(past_y, y);
          EXPECT_SAME(past_dx, dx);
          if (has_bias) expect_sums(sums, want_sums, dtype, rows, cols, 2.0 * 2.0);
          bias_act(act, dtype, x.data(), b, x.data(), rows, cols);  // in place
          EXPECT_SAME(x, y);
        }
      }
    }
  });
}

TEST(Gated, IsTheReferenceForTensorsAndHalves) {
  for_every_slice([](int64_t cols, int64_t offset) {
    const int64_t rows = cols > 300 ? 2 : 6, n = rows * cols;
    for (DType dtype : kFloats) {
      for (Activation act : kAll) {
        for (int halves : {0, 1, 2}) {  // two tensors; halves of one; with a bias
          const int64_t stride = halves ? 2 * cols : cols;
          Array in(dtype, 2 * n, offset), bias(DType::F32, 2 * cols, offset), dy(dtype, n, offset + 1), y(dtype, n, offset), want(dtype, n);
          Array grads(dtype, 2 * n, offset), want_grads(dtype, 2 * n), sums(DType::F32, 2 * cols, offset), want_sums(DType::F32, 2 * cols);
          in.fill(1, -6, 6), bias.fill(2), dy.fill(3), sums.fill(4);
          const int64_t second = (halves ? cols : n) * static_cast<int64_t>(dtype_size(dtype));
          const auto at = [&](Array& a) { return static_cast<char*>(a.data()); };
          const float* b = halves == 2 ? bias.floats() : nullptr;
          const GatedInput input{at(in), at(in) + second, stride, b, b ? b + cols : nullptr};
          gated(act, dtype, input, y.data(), rows, cols);
          gated_ref(act, dtype, input, want.data(), rows, cols);
          for (int64_t i = 0; i < n; ++i) expect_near(y, want, i, std::abs(want.get(i)) + 8.0);
          EXPECT_TRUE(y.guards_intact());
          const auto outputs = [&](Array& g, Array& s) {
            return GatedGrads{at(g), at(g) + second, stride, b ? s.floats() : nullptr, b ? s.floats() + cols : nullptr};
          };
          gated_backward(act, dtype, input, dy.data(), outputs(grads, sums), rows, cols);
          gated_backward_ref(act, dtype, input, dy.data(), outputs(want_grads, want_sums), rows, cols);
          for (int64_t i = 0; i < 2 * n; ++i) expect_near(grads, want_grads, i, 2.0 * 8.0);
          EXPECT_TRUE(grads.guards_intact());
          if (b != nullptr) expect_sums(sums, want_sums, dtype, rows, 2 * cols, 2.0 * 8.0);
        }
      }
    }
  });
}

TEST(Activation, SumsOfNoRowsAreZero) {
  float bias[3] = {1, 2, 3}, sums[3] = {7, 7, 7}, none = 0;
  bias_act_backward(Activation::Silu, DType::F32, &none, &none, bias, &none, sums, 0, 3);
  for (float s : sums) EXPECT_EQ(s, 0.0f);
}

TEST(Activation, RefusesBadArguments) {
  float x[4] = {}, sums[4];
  EXPECT_THROW(bias_act(Activation::Silu, DType::I32, x, nullptr, x, 1, 4), ValueError);
  EXPECT_THROW(bias_act(Activation::Silu, DType::F32, nullptr, nullptr, x, 1, 4), ValueError);
  EXPECT_THROW(bias_act(Activation::Silu, DType::F32, x, nullptr, x, -1, 4), ValueError);
  EXPECT_THROW(bias_act(static_cast<Activation>(9), DType::F32, x, nullptr, x, 1, 4), ValueError);
  EXPECT_THROW(bias_act_backward(Activation::Silu, DType::F32, x, x, nullptr, x, sums, 1, 4), ValueError);
  EXPECT_THROW(gated(Activation::Silu, DType::F32, {x, x, 4, x, nullptr}, x, 1, 4), ValueError);
  EXPECT_THROW(gated_backward(Activation::Silu, DType::F32, {x, x, 4, x, x}, x, {x, x, 4, sums, nullptr}, 1, 4), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
