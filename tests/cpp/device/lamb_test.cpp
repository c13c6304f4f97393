// SPDX-License-Identifier: Apache-2.0
// LAMB on the device has the bits of the reference: the trust ratio too, which there never comes to the host.
#include "arrays.h"
#include "kernels/optim/element.h"
#include "kernels/optim/optim.h"
#include "kernels/reduce/reduce.h"

namespace ds::kernels::testing {
namespace {

constexpr LambScale kScale{0.01, 0.05, 3.0};

// The scale of p decides whether the ratio is clamped below, above or not at all; of zeros it is 1.
struct Case {
  int64_t n, offset;
  float p_size;
};

void step(const Case& c, DType g_dt, DType low_dt) {
  const Lamb h{kScale.lr, 0.9, 0.99, 1e-6, 0.1, true, 3};
  in_every_order([&] {
    std::vector<DeviceArray> got, want;
    for (auto* side : {&got, &want}) {
      for (int k = 0; k < 4; ++k) {  // p, m, v, u
        side->emplace_back(DType::F32, c.n, c.offset);
        side->back().fill(static_cast<unsigned>(k), k == 2 ? 0.0f : -1.0f, 1.0f);
      }
      (*side)[0].fill(9, -c.p_size, c.p_size);
    }
    DeviceArray g(g_dt, c.n, c.offset), low(low_dt, c.n, c.offset), want_low(low_dt, c.n, c.offset);
    g.fill(5);
    DeviceArray norms(DType::F32, 4), ratio(DType::F32, 2), workspace(DType::F32, kCudaReduceWorkspaceBytes / 4);
    lamb_direction(h, 0.5f, got[0].floats(), g.data(), g_dt, got[1].floats(), got[2].floats(), got[3].floats(), c.n, norms.as<double>(),
                   workspace.data(), nullptr);
    double want_norms[2] = {0.0, 0.0};
    lamb_direction_ref(h, 0.5f, want[0].floats(), g.data(), g_dt, want[1].floats(), want[2].floats(), want[3].floats(), c.n, want_norms);
    for (size_t k = 1; k < 4; ++k) EXPECT_SAME(got[k], want[k]);
    for (int k = 0; k < 2; ++k) EXPECT_NEAR(norms.as<double>()[k], want_norms[k], 1e-12 * want_norms[k]);
    lamb_apply(kScale, norms.as<double>(), ratio.as<double>(), got[0].floats(), got[3].floats(), low.data(), low_dt, c.n, nullptr);
    const double found = *ratio.as<double>();
    EXPECT_EQ(found, trust_ratio(norms.as<double>(), kScale));
    lamb_apply_ref(static_cast<float>(kScale.lr * found), want[0].floats(), want[3].floats(), want_low.data(), low_dt, c.n);
    EXPECT_SAME(got[0], want[0]);
    EXPECT_SAME(low, want_low);
    EXPECT_TRUE(norms.guards_intact() && ratio.guards_intact() && workspace.guards_intact());
    return got[0].bits() + low.bits() + norms.bits() + ratio.bits();
  });
}

TEST(DeviceLamb, HasTheBitsOfTheReference) {
  for (const Case& c : {Case{1, 0, 1.0f}, Case{5, 1, 1.0f}, Case{1027, 0, 1.0f}, Case{4096, 3, 1e-3f}, Case{4096, 0, 1e3f}, Case{300, 0, 0.0f}}) {
    for (DType g_dt : kFloats) {
      SCOPED_TRACE(std::to_string(c.n) + " " + dtype_name(g_dt));
      step(c, g_dt, DType::BF16);
    }
  }
}

TEST(DeviceLamb, TheRatioIsClampedAndOneWhereANormIsZero) {
  const auto ratio = [](double p, double u) {
    const double norms[] = {p * p, u * u};
    return trust_ratio(norms, kScale);
  };
  EXPECT_EQ(ratio(2.0, 1.0), 2.0);
  EXPECT_EQ(ratio(9.0, 1.0), 3.0);
  EXPECT_EQ(ratio(1.0, 99.0), 0.05);
  EXPECT_EQ(ratio(0.0, 1.0), 1.0);
  EXPECT_EQ(ratio(1.0, 0.0), 1.0);
}

}  // namespace
}  // namespace ds::kernels::testing
