// SPDX-License-Identifier: Apache-2.0
// The CUDA activations, run on the host, against the float64 reference with the bounds of tests/cpp/kernels/activation_test.cpp. The
// host's exponential stands in for the device's fast one: how much that one errs is for a GPU to say.
#include "kernels/activation/activation.h"

#include <tuple>

#include "arrays.h"
#include "base/error.h"

namespace ds::kernels::testing {
namespace {

constexpr Activation kAll[] = {Activation::GeluErf, Activation::GeluTanh, Activation::Silu, Activation::Relu};
constexpr double kEps32 = 0x1p-23;

int64_t vector_of(DType t) { return 16 / static_cast<int64_t>(dtype_size(t)); }
double eps_of(DType t) { return t == DType::F32 ? kEps32 : t == DType::F16 ? 0x1p-10 : 0x1p-7; }
// What the method errs before the result is rounded.
double own_error(DType t) { return t == DType::F32 ? 4 * kEps32 : t == DType::F16 ? 0x1p-15 : 0x1p-13; }

// One unit in the last place, the method's error before rounding, and the rounding of x + bias, which are below 8.
void expect_near(DeviceArray& got, DeviceArray& want, int64_t i, double magnitude) {
  if (::testing::Test::HasFailure()) return;
  const DType t = got.dtype();
  const double tiny = t == DType::F16 ? 0x1p-24 : 1e-30;
  EXPECT_NEAR(got.get(i), want.get(i), eps_of(t) * std::abs(want.get(i)) + own_error(t) * magnitude + 4 * kEps32 + tiny)
      << dtype_name(t) << " element " << i;
}
// Sums of `rows` gradients of at most that magnitude, rounded to their own dtype.
void expect_sums(DeviceArray& got, const std::vector<float>& want, DType dtype, int64_t rows, double magnitude) {
  const double allowed = static_cast<double>(rows) * magnitude * (own_error(dtype) + static_cast<double>(rows) * kEps32);
  for (int64_t c = 0; c < got.size() && !::testing::Test::HasFailure(); ++c) {
    const double right = want[static_cast<size_t>(c)];
    EXPECT_NEAR(got.get(c), right, allowed + (got.dtype() == DType::F32 ? 0.0 : eps_of(got.dtype()) * (std::abs(right) + allowed))) << c;
  }
}

std::vector<float> as_floats(DeviceArray& a) {
  std::vector<float> all;
  for (int64_t i = 0; i < a.size(); ++i) all.push_back(a.get(i));
  return all;
}
// Whole numbers: what ReLU makes of them is exact, and so are their sums in float32, in whatever order.
void fill_whole(DeviceArray& a, unsigned seed) {
  std::mt19937 generator(seed);
  for (int64_t i = 0; i < a.size(); ++i) a.set(i, static_cast<float>(static_cast<int>(generator() % 5) - 2));
}
DeviceArray workspace_for(int64_t rows, int64_t sums) {
  DeviceArray workspace(DType::F32, cuda_bias_sums_bytes(rows, sums) / 4, 1);
  for (int64_t i = 0; i < workspace.size(); ++i) workspace.set(i, std::numeric_limits<float>::quiet_NaN());
  return workspace;
}

enum class Bias { None, OfDtype, Float32, Float32WithoutSums };

struct Case {
  Activation act;
  DType dtype;
  int64_t rows, cols;
  Bias bias;
  int64_t in, grad, out;  // where x, dy and dx (or y) begin
  DType bias_dtype() const { return bias == Bias::OfDtype ? dtype : DType::F32; }
  bool sums() const { return bias == Bias::OfDtype || bias == Bias::Float32; }
};

std::string words(const Case& c) {
  const std::string shape = " rows " + std::to_string(c.rows) + " cols " + std::to_string(c.cols);
  const std::string offsets = " offsets " + std::to_string(c.in) + std::to_string(c.grad) + std::to_string(c.out);
  return dtype_name(c.dtype) + shape + " activation " + std::to_string(static_cast<int>(c.act)) + " bias " +
         std::to_string(static_cast<int>(c.bias)) + offsets;
}

// ---- accuracy ----------------------------------------------------------------------------------------------------------

// Rounding the argument of an exponential costs the result as many eps as the argument is large, times the number of roundings over two.
double exponent_of(Activation act, double x) {
  switch (act) {
    case Activation::GeluErf: return 0.5 * x * x;                                      // two
    case Activation::GeluTanh: return 1.5 * 1.6 * std::abs(x) * (1 + 0.0447 * x * x);  // three
    default: return 0.0;
  }
}

TEST(DeviceActivation, ValuesAndSlopesAreAccurateOverTheWholeRange) {
  std::vector<float> all;
  for (uint32_t bits = 0; float_from_bits(bits) <= 100.0f; bits += 16 * 4099) all.push_back(float_from_bits(bits));
  for (int i = 0; i <= 10000; ++i) all.push_back(static_cast<float>(i) / 625.0f);
  const auto n = static_cast<int64_t>(2 * all.size());
  DeviceArray x(DType::F32, n), one(DType::F32, n), y(DType::F32, n), slope(DType::F32, n);
  for (int64_t i = 0; i < n; ++i) x.set(i, (i % 2 == 0 ? 1.0f : -1.0f) * all[static_cast<size_t>(i / 2)]), one.set(i, 1.0f);
  for (Activation act : kAll) {
    bias_act(act, DType::F32, x.data(), nullptr, DType::F32, y.data(), 1, n, nullptr);
    bias_act_backward(act, DType::F32, one.data(), x.data(), nullptr, DType::F32, slope.data(), nullptr, 1, n, nullptr, nullptr);
    for (int64_t i = 0; i < n; ++i) {
      const double at = x.get(i), exact = activation_value(act, at);
      // The far tail goes to zero a little early.
      const double allowed = std::abs(exact) < 1e-30 ? 1e-30 : kEps32 * std::abs(exact) * (4.0 + (at < 0 ? exponent_of(act, at) : 0.0));
      ASSERT_NEAR(y.get(i), exact, allowed) << "activation " << static_cast<int>(act) << " at " << at;
      ASSERT_NEAR(slope.get(i), activation_slope(act, at), 4.0 * kEps32) << "activation " << static_cast<int>(act) << " at " << at;
    }
  }
}

TEST(DeviceActivation, EveryNumberOf16BitsIsNearTheReference) {
  for (DType dtype : {DType::BF16, DType::F16}) {
    DeviceArray x(dtype, 1 << 16), one(dtype, 1 << 16), y(dtype, 1 << 16), slope(dtype, 1 << 16), want(dtype, 1 << 16);
    for (int64_t i = 0; i < x.size(); ++i) {
      x.as<uint16_t>()[i] = static_cast<uint16_t>(i);
      if (!(std::abs(x.get(i)) < 60000.0f)) x.set(i, 0.0f);
      one.set(i, 1.0f);
    }
    for (Activation act : kAll) {
      SCOPED_TRACE(static_cast<int>(act));
      bias_act(act, dtype, x.data(), nullptr, DType::F32, y.data(), 1, x.size(), nullptr);
      bias_act_ref(act, dtype, x.data(), nullptr, want.data(), 1, x.size());
      for (int64_t i = 0; i < x.size(); ++i) expect_near(y, want, i, std::abs(want.get(i)));
      bias_act_backward(act, dtype, one.data(), x.data(), nullptr, DType::F32, slope.data(), nullptr, 1, x.size(), nullptr, nullptr);
      bias_act_backward_ref(act, dtype, one.data(), x.data(), nullptr, want.data(), nullptr, 1, x.size());
      for (int64_t i = 0; i < x.size(); ++i) expect_near(slope, want, i, 2.0);
    }
  }
}

TEST(DeviceActivation, NanGoesThroughAndLargeValuesSaturate) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const float all[] = {nan, 3e38f, -3e38f, inf, 1e20f, -1e20f, 0.0f, -0.0f};
  for (DType dtype : {DType::F32, DType::BF16}) {
    for (Activation act : kAll) {
      DeviceArray x(dtype, 8), one(dtype, 8), y(dtype, 8), slope(dtype, 8);
      for (int64_t i = 0; i < 8; ++i) x.set(i, all[i]), one.set(i, 1.0f);
      bias_act(act, dtype, x.data(), nullptr, DType::F32, y.data(), 1, 8, nullptr);
      bias_act_backward(act, dtype, one.data(), x.data(), nullptr, DType::F32, slope.data(), nullptr, 1, 8, nullptr, nullptr);
      EXPECT_TRUE(std::isnan(y.get(0)));
      EXPECT_EQ(std::isnan(slope.get(0)), act != Activation::Relu);
      EXPECT_EQ(y.get(1), x.get(1));
      EXPECT_EQ(y.get(2), 0.0f);
      EXPECT_EQ(y.get(3), inf);
      EXPECT_EQ(slope.get(4), 1.0f);
      EXPECT_EQ(slope.get(5), 0.0f);
      EXPECT_EQ(y.get(6), 0.0f);
      EXPECT_EQ(slope.get(6), act == Activation::Relu ? 0.0f : 0.5f);
    }
  }
}

// ---- one input ---------------------------------------------------------------------------------------------------------

std::string expect_bias_act(const Case& c, bool whole) {
  const int64_t n = c.rows * c.cols;
  DeviceArray x(c.dtype, n, c.in), dy(c.dtype, n, c.grad), y(c.dtype, n, c.out), dx(c.dtype, n, c.out), want(c.dtype, n);
  DeviceArray bias(c.bias_dtype(), c.cols, c.in), sums(c.bias_dtype(), c.cols, c.out), exact_sums(c.bias_dtype(), c.cols);
  x.fill(1, -6, 6), bias.fill(2), dy.fill(3), sums.fill(4);
  if (whole) fill_whole(x, 1), fill_whole(bias, 2), fill_whole(dy, 3);
  std::vector<float> known = as_floats(bias), exact(static_cast<size_t>(c.cols));
  const void* b = c.bias == Bias::None ? nullptr : bias.data();
  const float* b_known = c.bias == Bias::None ? nullptr : known.data();
  bias_act(c.act, c.dtype, x.data(), b, c.bias_dtype(), y.data(), c.rows, c.cols, nullptr);
  bias_act_ref(c.act, c.dtype, x.data(), b_known, want.data(), c.rows, c.cols);
  for (int64_t i = 0; i < n; ++i) expect_near(y, want, i, std::abs(want.get(i)));

  DeviceArray workspace = workspace_for(c.rows, c.cols);
  bias_act_backward(c.act, c.dtype, dy.data(), x.data(), b, c.bias_dtype(), dx.data(), c.sums() ? sums.data() : nullptr, c.rows, c.cols,
                    c.sums() ? workspace.data() : nullptr, nullptr);
  bias_act_backward_ref(c.act, c.dtype, dy.data(), x.data(), b_known, want.data(), exact.data(), c.rows, c.cols);
  for (int64_t i = 0; i < n; ++i) expect_near(dx, want, i, 2.0 * std::abs(dy.get(i)));
  if (c.sums()) expect_sums(sums, exact, c.dtype, c.rows, 2.0 * 2.0);
  for (int64_t col = 0; col < c.cols; ++col) exact_sums.set(col, exact[static_cast<size_t>(col)]);
  if (whole && c.sums()) {
    EXPECT_SAME(sums, exact_sums);
  }
  for (DeviceArray* a : {&x, &dy, &y, &dx, &bias, &sums, &workspace}) EXPECT_TRUE(a->guards_intact());
  // In place.
  bias_act_backward(c.act, c.dtype, dy.data(), x.data(), b, c.bias_dtype(), dy.data(), nullptr, c.rows, c.cols, nullptr, nullptr);
  EXPECT_SAME(dy, dx);
  bias_act(c.act, c.dtype, x.data(), b, c.bias_dtype(), x.data(), c.rows, c.cols, nullptr);
  EXPECT_SAME(x, y);
  return y.bits() + dx.bits() + sums.bits();
}

constexpr std::tuple<int, int, int> kOffsets[] = {{0, 0, 0}, {1, 1, 1}, {3, 0, 0}, {0, 1, 0}, {0, 0, 1}};

TEST(DeviceBiasAct, IsTheReference) {
  for (DType dtype : kFloats) {
    const int64_t v = vector_of(dtype);
    for (Activation act : kAll) {
      const std::pair<int64_t, int64_t> shapes[] = {{1, 1},      {1, v + 1}, {1, 1024 * v + v + 3}, {3, 255}, {9, v},
                                                    {5, 33 * v}, {3, 257 * v}, {5, 259}};
      for (const auto& [rows, cols] : shapes) {
        for (const auto& [in, grad, out] : kOffsets) {
          for (Bias bias : {Bias::None, Bias::OfDtype, Bias::Float32, Bias::Float32WithoutSums}) {
            if (in + grad + out > 0 && (rows * cols > 2000 || act != Activation::Silu)) continue;
            const Case c{act, dtype, rows, cols, bias, in, grad, out};
            SCOPED_TRACE(words(c));
            expect_bias_act(c, false);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(DeviceBiasAct, SumsAreExactInEveryOrder) {
  const Activation relu = Activation::Relu;
  const Case all[] = {{relu, DType::F32, 1025, 4, Bias::Float32, 0, 0, 0}, {relu, DType::BF16, 131, 40, Bias::OfDtype, 0, 0, 0},
                      {relu, DType::F16, 1030, 130, Bias::OfDtype, 1, 1, 1}, {relu, DType::F32, 5, 1100, Bias::Float32, 0, 0, 0}};
  for (const Case& c : all) {
    SCOPED_TRACE(words(c));
    in_every_order([&] { return expect_bias_act(c, true); });
  }
}

TEST(DeviceActivation, SumsOfNoRowsAreZero) {
  DeviceArray bias(DType::F32, 6), sums(DType::F32, 6);
  sums.fill(1);
  bias_act_backward(Activation::Silu, DType::F32, nullptr, nullptr, bias.data(), DType::F32, nullptr, sums.data(), 0, 6, nullptr, nullptr);
  for (int64_t c = 0; c < 6; ++c) EXPECT_EQ(sums.get(c), 0.0f);
  sums.fill(1);
  const CudaGatedInput in{nullptr, nullptr, 3, bias.data(), DType::F32};
  gated_backward(Activation::Silu, DType::F32, in, nullptr, nullptr, nullptr, 3, sums.data(), 0, 3, nullptr, nullptr);
  for (int64_t c = 0; c < 6; ++c) EXPECT_EQ(sums.get(c), 0.0f);
  bias_act(Activation::Silu, DType::F32, nullptr, nullptr, DType::F32, nullptr, 0, 3, nullptr);
  gated(Activation::Silu, DType::F32, in, nullptr, 0, 3, nullptr);
}

// ---- gate and up -------------------------------------------------------------------------------------------------------

// Rows of gate and up lie `stride` apart, those of their gradients `grad_stride`; up begins `second` after the gate in both.
struct Layout {
  int64_t stride, grad_stride, second;
};

std::string expect_gated(const Case& c, const Layout& at, bool whole) {
  const int64_t n = c.rows * c.cols, in_size = (c.rows - 1) * at.stride + at.second + c.cols;
  const int64_t out_size = (c.rows - 1) * at.grad_stride + at.second + c.cols, bytes = static_cast<int64_t>(dtype_size(c.dtype));
  DeviceArray in(c.dtype, in_size, c.in), dy(c.dtype, n, c.grad), y(c.dtype, n, c.out), grads(c.dtype, out_size, c.out);
  DeviceArray want(c.dtype, n), want_grads(c.dtype, out_size), bias(c.bias_dtype(), 2 * c.cols, c.in);
  DeviceArray sums(c.bias_dtype(), 2 * c.cols, c.out), exact_sums(c.bias_dtype(), 2 * c.cols);
  in.fill(1, -6, 6), bias.fill(2), dy.fill(3), sums.fill(4);
  if (whole) fill_whole(in, 1), fill_whole(bias, 2), fill_whole(dy, 3);
  std::vector<float> known = as_floats(bias), exact(static_cast<size_t>(2 * c.cols));
  const bool has_bias = c.bias != Bias::None;
  const auto place = [&](DeviceArray& a, int64_t i) { return a.as<char>() + i * bytes; };
  const CudaGatedInput input{in.data(), place(in, at.second), at.stride, has_bias ? bias.data() : nullptr, c.bias_dtype()};
  const GatedInput same{in.data(), input.up, at.stride, has_bias ? known.data() : nullptr, has_bias ? known.data() + c.cols : nullptr};
  gated(c.act, c.dtype, input, y.data(), c.rows, c.cols, nullptr);
  gated_ref(c.act, c.dtype, same, want.data(), c.rows, c.cols);
  for (int64_t i = 0; i < n; ++i) expect_near(y, want, i, std::abs(want.get(i)) + 8.0);

  DeviceArray workspace = workspace_for(c.rows, 2 * c.cols);
  gated_backward(c.act, c.dtype, input, dy.data(), grads.data(), place(grads, at.second), at.grad_stride, c.sums() ? sums.data() : nullptr,
                 c.rows, c.cols, c.sums() ? workspace.data() : nullptr, nullptr);
  const GatedGrads to{want_grads.data(), place(want_grads, at.second), at.grad_stride, exact.data(), exact.data() + c.cols};
  gated_backward_ref(c.act, c.dtype, same, dy.data(), to, c.rows, c.cols);
  for (int64_t i = 0; i < out_size; ++i) {  // also what lies between rows, which stays zero
    expect_near(grads, want_grads, i, 2.0 * 8.0);
  }
  if (c.sums()) expect_sums(sums, exact, c.dtype, c.rows, 2.0 * 8.0);
  for (int64_t col = 0; col < 2 * c.cols; ++col) exact_sums.set(col, exact[static_cast<size_t>(col)]);
  if (whole && c.sums()) {
    EXPECT_SAME(sums, exact_sums);
  }
  for (DeviceArray* a : {&in, &dy, &y, &grads, &bias, &sums, &workspace}) EXPECT_TRUE(a->guards_intact());
  if (at.stride == at.grad_stride) {  // in place
    gated_backward(c.act, c.dtype, input, dy.data(), in.data(), place(in, at.second), at.stride, nullptr, c.rows, c.cols, nullptr, nullptr);
    for (int64_t r = 0; r < c.rows; ++r) {
      EXPECT_EQ(std::memcmp(place(in, r * at.stride), place(grads, r * at.stride), static_cast<size_t>(c.cols * bytes)), 0) << r;
    }
  }
  return y.bits() + grads.bits() + sums.bits();
}

TEST(DeviceGated, IsTheReferenceForTensorsAndHalves) {
  for (DType dtype : kFloats) {
    const int64_t v = vector_of(dtype);
    for (Activation act : kAll) {
      const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {1, 2 * v + 1}, {1, 260 * v}, {3, 255}, {9, v}, {5, 33 * v}, {5, 259}};
      for (const auto& [rows, cols] : shapes) {
        const Layout layouts[] = {{cols, cols, rows * cols},      {2 * cols, 2 * cols, cols},     {2 * cols + v, 2 * cols, cols},
                                  {2 * cols + 1, 2 * cols, cols}, {2 * cols, 2 * cols + 1, cols}, {2 * cols + v, 2 * cols + v, cols + 1}};
        for (const Layout& layout : layouts) {
          for (const auto& [in, grad, out] : kOffsets) {
            for (Bias bias : {Bias::None, Bias::OfDtype, Bias::Float32, Bias::Float32WithoutSums}) {
              if (in + grad + out > 0 && (rows * cols > 300 || act != Activation::GeluTanh || &layout - layouts > 1)) continue;
              if (&layout - layouts > 1 && act != Activation::Silu) continue;
              const Case c{act, dtype, rows, cols, bias, in, grad, out};
              SCOPED_TRACE(words(c) + " stride " + std::to_string(layout.stride) + " " + std::to_string(layout.grad_stride));
              expect_gated(c, layout, false);
              if (HasFailure()) return;
            }
          }
        }
      }
    }
  }
}

TEST(DeviceGated, SumsAreExactInEveryOrder) {
  const Activation relu = Activation::Relu;
  const Case all[] = {{relu, DType::F32, 1025, 4, Bias::Float32, 0, 0, 0}, {relu, DType::BF16, 131, 40, Bias::OfDtype, 0, 0, 0},
                      {relu, DType::F16, 1030, 130, Bias::Float32, 1, 1, 1}, {relu, DType::F32, 5, 1100, Bias::Float32, 0, 0, 0}};
  for (const Case& c : all) {
    SCOPED_TRACE(words(c));
    in_every_order([&] { return expect_gated(c, {2 * c.cols, 2 * c.cols, c.cols}, true); });
  }
}

TEST(DeviceActivation, RefusesBadArguments) {
  alignas(16) float x[8] = {};
  const Activation silu = Activation::Silu;
  const DType f32 = DType::F32;
  EXPECT_THROW(bias_act(silu, DType::I32, x, nullptr, f32, x, 1, 4, nullptr), ValueError);
  EXPECT_THROW(bias_act(silu, f32, nullptr, nullptr, f32, x, 1, 4, nullptr), ValueError);
  EXPECT_THROW(bias_act(silu, f32, x, nullptr, f32, x, -1, 4, nullptr), ValueError);
  EXPECT_THROW(bias_act(static_cast<Activation>(9), f32, x, nullptr, f32, x, 1, 4, nullptr), ValueError);
  EXPECT_THROW(bias_act(silu, f32, x, x, DType::F16, x, 1, 4, nullptr), ValueError);
  EXPECT_THROW(bias_act_backward(silu, f32, x, x, nullptr, f32, x, x, 1, 4, x, nullptr), ValueError);
  EXPECT_THROW(bias_act_backward(silu, f32, x, x, x, f32, x, x, 1, 4, nullptr, nullptr), ValueError);
  EXPECT_THROW(bias_act_backward(silu, DType::BF16, x, x, x, DType::F16, x, nullptr, 1, 4, nullptr, nullptr), ValueError);
  EXPECT_THROW(gated(silu, DType::BF16, {x, x, 4, x, DType::F16}, x, 1, 4, nullptr), ValueError);
  EXPECT_THROW(gated(silu, f32, {x, nullptr, 4, nullptr, f32}, x, 1, 4, nullptr), ValueError);
  EXPECT_THROW(gated_backward(silu, f32, {x, x, 4, nullptr, f32}, x, x, x, 4, x, 1, 4, x, nullptr), ValueError);
  EXPECT_THROW(gated_backward(silu, f32, {x, x, 4, nullptr, f32}, x, x, x, 4, x, 2, 2, x, nullptr), ValueError);
  EXPECT_THROW(gated_backward(silu, f32, {x, x, 4, x, f32}, x, x, x, 4, x, 1, 4, nullptr, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
