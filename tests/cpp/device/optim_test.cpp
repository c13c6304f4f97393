// SPDX-License-Identifier: Apache-2.0
// The CUDA updates of float32 slices, run on the host: the bits of the scalar reference and of the SIMD kernels, step after step.
#include "kernels/optim/optim.h"

#include <array>
#include <functional>

#include "arrays.h"
#include "base/error.h"
#include "kernels/optim/element.h"
#include "kernels/reduce/reduce.h"

namespace ds::kernels::testing {
namespace {

constexpr DType kNoCopy = DType::U8;
constexpr DType kCopies[] = {kNoCopy, DType::F32, DType::BF16, DType::F16};
constexpr float kScale = 0.3f;
constexpr int kSteps = 3;
constexpr int64_t kSizes[] = {0, 1, 3, 4, 5, 1023, 1024, 1025, 2050};  // around a thread's group and a block's 1024 elements

enum class Way { Cuda, Simd, Reference };

// Elements by which p, g, s0, s1 and low begin beyond an aligned address.
using Offsets = std::array<int64_t, 5>;
std::vector<Offsets> offsets_for(int64_t n) {
  std::vector<Offsets> all = {{0, 0, 0, 0, 0}, {1, 1, 1, 1, 1}, {3, 3, 3, 3, 3}};
  if (n != 1025) return all;
  for (size_t k = 0; k < 5; ++k) {  // any one of them takes the whole groups away
    all.push_back({});
    all.back()[k] = 1;
  }
  return all;
}

// What an update changes.
struct Held {
  DeviceArray p, s0, s1, low;
  bool copies;
  Held(int64_t n, DType low_dt, const Offsets& at)
      : p(DType::F32, n, at[0]), s0(DType::F32, n, at[2]), s1(DType::F32, n, at[3]), low(low_dt == kNoCopy ? DType::F32 : low_dt, n, at[4]),
        copies(low_dt != kNoCopy) {
    p.fill(2);
    s0.fill(3, -0.1f, 0.1f);
    s1.fill(4, 0.0f, 0.1f);
  }
  void* copy() { return copies ? low.data() : nullptr; }
  bool same(Held& other) { return p.same_bits(other.p) && s0.same_bits(other.s0) && s1.same_bits(other.s1) && low.same_bits(other.low); }
  bool guards_intact() const { return p.guards_intact() && s0.guards_intact() && s1.guards_intact() && low.guards_intact(); }
};

void fill_gradient(DeviceArray& g, int64_t step) {
  g.fill(static_cast<unsigned>(10 + step));
  if (g.size() > 2) g.set(1, 0.0f), g.set(2, -0.0f);
}

// body(way, step, held, g, n): one update.
using Update = std::function<void(Way, int64_t, Held&, DeviceArray&, int64_t)>;

void expect_equal_steps(int64_t n, DType g_dt, DType low_dt, const Offsets& at, const Update& update) {
  Held got(n, low_dt, at), simd(n, low_dt, at), want(n, low_dt, {});
  DeviceArray g(g_dt, n, at[1]);
  for (int64_t step = 1; step <= kSteps; ++step) {
    fill_gradient(g, step);
    const std::string before = g.bits();
    update(Way::Cuda, step, got, g, n);
    update(Way::Simd, step, simd, g, n);
    update(Way::Reference, step, want, g, n);
    ASSERT_TRUE(got.same(want)) << "step " << step;
    ASSERT_TRUE(simd.same(want)) << "SIMD, step " << step;
    ASSERT_TRUE(g.bits() == before);
    ASSERT_TRUE(got.guards_intact() && g.guards_intact());
  }
}

// All dtypes meet at one size, aligned or not; elsewhere one pair does.
void for_every_slice(const Update& update) {
  for (int64_t n : kSizes) {
    for (const Offsets& at : offsets_for(n)) {
      for (DType g_dt : kFloats) {
        for (DType low_dt : kCopies) {
          const bool is_meeting = n == 1025 && at[0] == at[4] && at[0] != 3;
          if (!is_meeting && (g_dt != DType::BF16 || low_dt != (n % 2 == 0 ? kNoCopy : DType::BF16))) continue;
          std::string where;
          for (int64_t offset : at) where += " " + std::to_string(offset);
          SCOPED_TRACE("n " + std::to_string(n) + " g " + dtype_name(g_dt) + " low " + dtype_name(low_dt) + " offsets" + where);
          expect_equal_steps(n, g_dt, low_dt, at, update);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(DeviceOptim, AdamHasTheBitsOfTheReference) {
  for (bool adamw : {false, true}) {
    for (double weight_decay : {0.0, 0.1}) {
      for (double beta1 : {0.9, 0.3}) {  // either side of the two ways to interpolate
        for_every_slice([&](Way way, int64_t step, Held& s, DeviceArray& g, int64_t n) {
          const Adam h{1e-2, beta1, 0.999, 1e-8, weight_decay, adamw, beta1 > 0.5, step};
          float *p = s.p.floats(), *m = s.s0.floats(), *v = s.s1.floats();
          const DType low_dt = s.low.dtype();
          if (way == Way::Cuda) adam(h, kScale, p, g.data(), g.dtype(), m, v, s.copy(), low_dt, n, nullptr);
          else if (way == Way::Simd) adam(h, kScale, p, g.data(), g.dtype(), m, v, s.copy(), low_dt, n);
          else adam_ref(h, kScale, p, g.data(), g.dtype(), m, v, s.copy(), low_dt, n);
        });
        if (HasFailure()) return;
      }
    }
  }
}

TEST(DeviceOptim, LionHasTheBitsOfTheReference) {
  for (double beta : {0.9, 0.2}) {
    for_every_slice([&](Way way, int64_t, Held& s, DeviceArray& g, int64_t n) {
      const Lion h{1e-2, beta, beta + 0.09, 0.1};
      float *p = s.p.floats(), *m = s.s0.floats();
      const DType low_dt = s.low.dtype();
      if (way == Way::Cuda) lion(h, kScale, p, g.data(), g.dtype(), m, s.copy(), low_dt, n, nullptr);
      else if (way == Way::Simd) lion(h, kScale, p, g.data(), g.dtype(), m, s.copy(), low_dt, n);
      else lion_ref(h, kScale, p, g.data(), g.dtype(), m, s.copy(), low_dt, n);
    });
  }
}

TEST(DeviceOptim, AdagradHasTheBitsOfTheReference) {
  for (double weight_decay : {0.0, 0.1}) {
    for_every_slice([&](Way way, int64_t, Held& s, DeviceArray& g, int64_t n) {
      const Adagrad h{1e-2, 1e-10, weight_decay};
      float *p = s.p.floats(), *sum = s.s1.floats();
      const DType low_dt = s.low.dtype();
      if (way == Way::Cuda) adagrad(h, kScale, p, g.data(), g.dtype(), sum, s.copy(), low_dt, n, nullptr);
      else if (way == Way::Simd) adagrad(h, kScale, p, g.data(), g.dtype(), sum, s.copy(), low_dt, n);
      else adagrad_ref(h, kScale, p, g.data(), g.dtype(), sum, s.copy(), low_dt, n);
    });
  }
}

TEST(DeviceOptim, SgdHasTheBitsOfTheReference) {
  const Sgd cases[] = {{1e-2, 0, 0, 0, false, true},      {1e-2, 0, 0, 0.1, false, false}, {1e-2, 0.9, 0.3, 0, false, true},
                       {1e-2, 0.9, 0, 0.1, false, false}, {1e-2, 0.9, 0, 0.1, true, true}, {1e-2, 0.9, 0, 0, true, false}};
  for (const Sgd& first : cases) {
    for_every_slice([&](Way way, int64_t step, Held& s, DeviceArray& g, int64_t n) {
      Sgd h = first;
      h.first_step = first.first_step && step == 1;
      float *p = s.p.floats(), *buf = h.momentum == 0.0 ? nullptr : s.s0.floats();
      const DType low_dt = s.low.dtype();
      if (way == Way::Cuda) sgd(h, kScale, p, g.data(), g.dtype(), buf, s.copy(), low_dt, n, nullptr);
      else if (way == Way::Simd) sgd(h, kScale, p, g.data(), g.dtype(), buf, s.copy(), low_dt, n);
      else sgd_ref(h, kScale, p, g.data(), g.dtype(), buf, s.copy(), low_dt, n);
    });
  }
}

TEST(DeviceOptim, LambApplyHasTheBitsOfTheReference) {
  for_every_slice([&](Way way, int64_t step, Held& s, DeviceArray&, int64_t n) {
    const float ratio = 0.3f / static_cast<float>(step);
    float *p = s.p.floats(), *u = s.s0.floats();
    const DType low_dt = s.low.dtype();
    if (way == Way::Cuda) lamb_apply(ratio, p, u, s.copy(), low_dt, n, nullptr);
    else if (way == Way::Simd) lamb_apply(ratio, p, u, s.copy(), low_dt, n);
    else lamb_apply_ref(ratio, p, u, s.copy(), low_dt, n);
  });
}

// The same with lr times a ratio that lies on the device: none of the elements' doing, so it is there without elements, too.
TEST(DeviceOptim, LambApplyByNormsHasTheBitsOfTheReference) {
  const LambScale scale{1e-2, 0.05, 3.0};
  for_every_slice([&](Way way, int64_t step, Held& s, DeviceArray&, int64_t n) {
    DeviceArray norms(DType::F64, 2), ratio(DType::F64, 1);
    norms.as<double>()[0] = 5.0;
    norms.as<double>()[1] = static_cast<double>(step);
    const double found = trust_ratio(norms.as<double>(), scale);
    const float by = static_cast<float>(scale.lr * found);
    float *p = s.p.floats(), *u = s.s0.floats();
    const DType low_dt = s.low.dtype();
    if (way == Way::Simd) return lamb_apply(by, p, u, s.copy(), low_dt, n);
    if (way == Way::Reference) return lamb_apply_ref(by, p, u, s.copy(), low_dt, n);
    lamb_apply(scale, norms.as<double>(), ratio.as<double>(), p, u, s.copy(), low_dt, n, nullptr);
    EXPECT_EQ(*ratio.as<double>(), found);
    EXPECT_TRUE(norms.guards_intact() && ratio.guards_intact());
  });
}

// Of a sum of n squares in doubles. A square goes through up to n / 16 + 6 additions in the reference, on the device through 4 n / 2^20 + 4
// in its thread and 29 in trees and the join: together fewer than n / 16 + 60 for n up to 2^21.
double norm_tolerance(int64_t n) { return 0x1p-53 * (static_cast<double>(n) / 16 + 60); }

std::string expect_equal_directions(const Lamb& h, int64_t n, DType g_dt, const Offsets& at) {
  Held got(n, DType::F32, at), want(n, DType::F32, {});  // `low` serves as u
  DeviceArray g(g_dt, n, at[1]), workspace(DType::F32, kCudaReduceWorkspaceBytes / 4), norms(DType::F64, 2);
  double p_squares = 1.0, want_norms[2] = {1.0, 2.0};
  for (int64_t i = 0; i < n; ++i) {  // squares whose sums are exact
    got.p.set(i, static_cast<float>(i % 61 - 30) / 16);
    p_squares += double{got.p.get(i)} * got.p.get(i);
  }
  want.p.copy(got.p);
  norms.as<double>()[0] = 1.0;
  norms.as<double>()[1] = 2.0;
  fill_gradient(g, h.step);
  const std::string before = g.bits();
  lamb_direction(h, kScale, got.p.floats(), g.data(), g_dt, got.s0.floats(), got.s1.floats(), got.low.floats(), n, norms.as<double>(),
                 workspace.data(), nullptr);
  lamb_direction_ref(h, kScale, want.p.floats(), g.data(), g_dt, want.s0.floats(), want.s1.floats(), want.low.floats(), n, want_norms);
  EXPECT_TRUE(got.same(want));
  EXPECT_TRUE(got.guards_intact() && g.guards_intact() && workspace.guards_intact() && norms.guards_intact() && g.bits() == before);
  EXPECT_EQ(norms.as<double>()[0], p_squares);
  EXPECT_NEAR(norms.as<double>()[1], want_norms[1], norm_tolerance(n) * want_norms[1]);
  return got.low.bits() + norms.bits();
}

TEST(DeviceOptim, LambDirectionHasTheBitsOfTheReference) {
  for (bool inside : {false, true}) {
    for (double beta1 : {0.9, 0.3}) {
      const Lamb h{1e-2, beta1, 0.999, 1e-6, 0.1, beta1 > 0.5, 3, inside};
      for (int64_t n : kSizes) {
        for (const Offsets& at : offsets_for(n)) {
          for (DType g_dt : kFloats) {
            if (n != 1025 && g_dt != kFloats[n % 3]) continue;
            SCOPED_TRACE("n " + std::to_string(n) + " g " + dtype_name(g_dt));
            in_every_order([&] { return expect_equal_directions(h, n, g_dt, at); });
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

// More than the 1024 blocks that leave sums: threads take several groups.
TEST(DeviceOptim, LambDirectionOfALargeSlice) {
  expect_equal_directions({1e-2, 0.9, 0.999, 1e-6, 0.1, true, 3}, 1024 * 1027 + 2, DType::BF16, {});
}

// Of what is not there a thread's last group makes 0 / 0, which no norm hears of.
TEST(DeviceOptim, LambDirectionWithoutEps) {
  expect_equal_directions({1e-2, 0.9, 0.999, 0.0, 0.1, true, 3}, 1023, DType::F32, {});
}

// The header: equal bits wherever the elements lie, so alignment changes no sum either.
TEST(DeviceOptim, NormsDoNotDependOnAlignment) {
  const int64_t n = 5003;
  std::string bits;
  for (int64_t offset : {0, 1, 2, 3}) {
    Held s(n, DType::F32, {offset, offset, 0, offset, offset});
    DeviceArray g(DType::F16, n, offset), workspace(DType::F32, kCudaReduceWorkspaceBytes / 4), norms(DType::F64, 2);
    g.fill(1);
    lamb_direction({1e-2, 0.9, 0.999, 1e-6, 0.1, true, 3}, kScale, s.p.floats(), g.data(), g.dtype(), s.s0.floats(), s.s1.floats(),
                   s.low.floats(), n, norms.as<double>(), workspace.data(), nullptr);
    if (offset == 0) bits = norms.bits();
    EXPECT_TRUE(norms.bits() == bits) << offset;
  }
}

TEST(DeviceOptim, TheCopyMayReplaceTheGradient) {
  for (DType dtype : kFloats) {
    for (int64_t offset : {0, 1}) {
      const int64_t n = 1027;
      Held got(n, dtype, {offset, offset, offset, offset, offset}), want(n, dtype, {});
      DeviceArray g(dtype, n, offset);
      g.fill(5);
      const Adam h{1e-2, 0.9, 0.999, 1e-8, 0.1, true, true, 2};
      adam_ref(h, 1.0f, want.p.floats(), g.data(), dtype, want.s0.floats(), want.s1.floats(), want.low.data(), dtype, n);
      adam(h, 1.0f, got.p.floats(), g.data(), dtype, got.s0.floats(), got.s1.floats(), g.data(), dtype, n, nullptr);
      EXPECT_SAME(g, want.low);
      EXPECT_SAME(got.p, want.p);
    }
  }
}

TEST(DeviceOptim, LionsSignOfZeroIsZeroAndNanStays) {
  DeviceArray p(DType::F32, 4), g(DType::F32, 4), m(DType::F32, 4);
  const float gradients[] = {0.0f, 2.0f, -2.0f, std::numeric_limits<float>::quiet_NaN()};
  for (int64_t i = 0; i < 4; ++i) p.set(i, 1.0f), g.set(i, gradients[i]);
  lion({0.5, 0.9, 0.99, 0.0}, 1.0f, p.floats(), g.data(), DType::F32, m.floats(), nullptr, DType::F32, 4, nullptr);
  EXPECT_EQ(p.get(0), 1.0f);
  EXPECT_EQ(p.get(1), 0.5f);
  EXPECT_EQ(p.get(2), 1.5f);
  EXPECT_TRUE(std::isnan(p.get(3)) && std::isnan(m.get(3)));
}

TEST(DeviceOptim, RefusesBadArguments) {
  float x[4] = {};
  double norms[2] = {};
  const Adam h{1e-2, 0.9, 0.999, 1e-8, 0, true, true, 1};
  EXPECT_THROW(adam(h, 1, x, x, DType::I32, x, x, nullptr, DType::F32, 4, nullptr), ValueError);
  EXPECT_THROW(adam(h, 1, x, x, DType::F32, nullptr, x, nullptr, DType::F32, 4, nullptr), ValueError);
  EXPECT_THROW(adam(h, 1, x, x, DType::F32, x, x, x, DType::F64, 4, nullptr), ValueError);
  EXPECT_THROW(adam(h, 1, x, x, DType::F32, x, x, nullptr, DType::F32, -4, nullptr), ValueError);
  EXPECT_THROW(lion({}, 1, x, nullptr, DType::F32, x, nullptr, DType::F32, 4, nullptr), ValueError);
  EXPECT_THROW(adagrad({}, 1, x, x, DType::F32, nullptr, nullptr, DType::F32, 4, nullptr), ValueError);
  EXPECT_THROW(sgd({1e-2, 0.9, 0, 0, false, true}, 1, x, x, DType::F32, nullptr, nullptr, DType::F32, 4, nullptr), ValueError);
  EXPECT_THROW(lamb_direction({}, 1, x, x, DType::F32, x, x, x, 4, nullptr, x, nullptr), ValueError);
  EXPECT_THROW(lamb_direction({}, 1, x, x, DType::F32, x, x, x, 4, norms, nullptr, nullptr), ValueError);
  EXPECT_THROW(lamb_apply(1, x, nullptr, nullptr, DType::F32, 4, nullptr), ValueError);
  EXPECT_THROW(lamb_apply({}, nullptr, norms, x, x, nullptr, DType::F32, 4, nullptr), ValueError);
  EXPECT_THROW(lamb_apply({}, norms, nullptr, x, x, nullptr, DType::F32, 4, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
