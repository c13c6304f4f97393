// SPDX-License-Identifier: Apache-2.0
// The SIMD updates have the bits of the scalar reference for every branch, gradient and copy dtype; the reference is held
// against double precision here and against torch.optim in tests/unit/ops.
#include "kernels/optim/optim.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

constexpr DType kNoCopy = DType::U8;
constexpr DType kCopies[] = {kNoCopy, DType::F32, DType::BF16, DType::F16};

// One slice with two states, twice: for the kernel and for the reference.
struct Slices {
  Array g, p, s0, s1, low, want_p, want_s0, want_s1, want_low;
  bool copy;
  Slices(int64_t n, int64_t offset, DType g_dt, DType low_dt)
      : g(g_dt, n, offset), p(DType::F32, n, offset), s0(DType::F32, n, offset + 1), s1(DType::F32, n, offset),
        low(low_dt == kNoCopy ? DType::F32 : low_dt, n, offset), want_p(DType::F32, n), want_s0(DType::F32, n),
        want_s1(DType::F32, n), want_low(low.dtype(), n), copy(low_dt != kNoCopy) {
    g.fill(1);
    p.fill(2);
    s0.fill(3, -0.1f, 0.1f);
    s1.fill(4, 0.0f, 0.1f);
    if (n > 2) g.set(1, 0.0f);
    want_p.copy(p);
    want_s0.copy(s0);
    want_s1.copy(s1);
  }
  void* copy_pointer() { return copy ? low.data() : nullptr; }
  void* want_copy_pointer() { return copy ? want_low.data() : nullptr; }
  void expect_same() {
    EXPECT_SAME(p, want_p);
    EXPECT_SAME(s0, want_s0);
    EXPECT_SAME(s1, want_s1);
    EXPECT_SAME(low, want_low);
  }
};

// body(slices, g_dt, low_dt, n) runs kernel and reference on the two halves.
template <typename Body>
void for_every_case(const Body& body) {
  for_every_slice([&](int64_t n, int64_t offset) {
    for (DType g_dt : kFloats) {
      for (DType low_dt : kCopies) {
        Slices slices(n, offset, g_dt, low_dt);
        body(slices, g_dt, slices.low.dtype(), n);
        slices.expect_same();
      }
    }
  });
}

TEST(Adam, HasTheBitsOfTheReference) {
  for (bool adamw : {false, true}) {
    for (double weight_decay : {0.0, 0.1}) {
      for (double beta1 : {0.9, 0.3}) {  // either side of the two ways to interpolate
        const Adam h{1e-2, beta1, 0.999, 1e-8, weight_decay, adamw, beta1 > 0.5, 3};
        for_every_case([&](Slices& s, DType g_dt, DType low_dt, int64_t n) {
          adam(h, 0.5f, s.p.floats(), s.g.data(), g_dt, s.s0.floats(), s.s1.floats(), s.copy_pointer(), low_dt, n);
          adam_ref(h, 0.5f, s.want_p.floats(), s.g.data(), g_dt, s.want_s0.floats(), s.want_s1.floats(),
                   s.want_copy_pointer(), low_dt, n);
        });
      }
    }
  }
}

TEST(Lion, HasTheBitsOfTheReference) {
  for (double beta : {0.9, 0.2}) {
    const Lion h{1e-2, beta, 0.99, 0.1};
    for_every_case([&](Slices& s, DType g_dt, DType low_dt, int64_t n) {
      lion(h, 0.5f, s.p.floats(), s.g.data(), g_dt, s.s0.floats(), s.copy_pointer(), low_dt, n);
      lion_ref(h, 0.5f, s.want_p.floats(), s.g.data(), g_dt, s.want_s0.floats(), s.want_copy_pointer(), low_dt, n);
    });
  }
}

TEST(Lion, SignOfZeroIsZero) {
  float p[3] = {1, 1, 1}, g[3] = {0, 2, -2}, m[3] = {0, 0, 0};
  lion({0.5, 0.9, 0.99, 0.0}, 1.0f, p, g, DType::F32, m, nullptr, DType::F32, 3);
  EXPECT_EQ(p[0], 1.0f);
  EXPECT_EQ(p[1], 0.5f);
  EXPECT_EQ(p[2], 1.5f);
}

TEST(Adagrad, HasTheBitsOfTheReference) {
  for (double weight_decay : {0.0, 0.1}) {
    const Adagrad h{1e-2, 1e-10, weight_decay};
    for_every_case([&](Slices& s, DType g_dt, DType low_dt, int64_t n) {
      adagrad(h, 0.5f, s.p.floats(), s.g.data(), g_dt, s.s1.floats(), s.copy_pointer(), low_dt, n);
      adagrad_ref(h, 0.5f, s.want_p.floats(), s.g.data(), g_dt, s.want_s1.floats(), s.want_copy_pointer(), low_dt, n);
    });
  }
}

TEST(Sgd, HasTheBitsOfTheReference) {
  const Sgd cases[] = {{1e-2, 0, 0, 0, false, true},      {1e-2, 0, 0, 0.1, false, false},
                       {1e-2, 0.9, 0, 0, false, true},    {1e-2, 0.9, 0, 0.1, false, false},
                       {1e-2, 0.9, 0.3, 0, false, false}, {1e-2, 0.9, 0, 0, true, true},
                       {1e-2, 0.9, 0, 0.1, true, false}};
  for (const Sgd& h : cases) {
    for_every_case([&](Slices& s, DType g_dt, DType low_dt, int64_t n) {
      float* buf = h.momentum == 0.0 ? nullptr : s.s0.floats();
      float* want_buf = h.momentum == 0.0 ? nullptr : s.want_s0.floats();
      sgd(h, 0.5f, s.p.floats(), s.g.data(), g_dt, buf, s.copy_pointer(), low_dt, n);
      sgd_ref(h, 0.5f, s.want_p.floats(), s.g.data(), g_dt, want_buf, s.want_copy_pointer(), low_dt, n);
    });
  }
}

TEST(Lamb, HasTheBitsOfTheReference) {
  for (bool inside : {false, true}) {
    const Lamb h{1e-2, 0.9, 0.999, 1e-6, 0.1, !inside, 3, inside};
    for_every_slice([&](int64_t n, int64_t offset) {
      for (DType g_dt : kFloats) {
        Slices s(n, offset, g_dt, DType::F32);  // `low` serves as u
        double norms[2] = {1.0, 2.0}, want_norms[2] = {1.0, 2.0};
        lamb_direction(h, 0.5f, s.p.floats(), s.g.data(), g_dt, s.s0.floats(), s.s1.floats(), s.low.floats(), n, norms);
        lamb_direction_ref(h, 0.5f, s.want_p.floats(), s.g.data(), g_dt, s.want_s0.floats(), s.want_s1.floats(),
                           s.want_low.floats(), n, want_norms);
        s.expect_same();
        EXPECT_EQ(norms[0], want_norms[0]);
        EXPECT_EQ(norms[1], want_norms[1]);
      }
    });
  }
}

TEST(Lamb, ApplyHasTheBitsOfTheReference) {
  for_every_case([&](Slices& s, DType, DType low_dt, int64_t n) {
    lamb_apply(0.3f, s.p.floats(), s.s0.floats(), s.copy_pointer(), low_dt, n);
    lamb_apply_ref(0.3f, s.want_p.floats(), s.want_s0.floats(), s.want_copy_pointer(), low_dt, n);
  });
}

// An element does not notice where it lies: the whole slice, and the slice in pieces, have the same bits.
TEST(Adam, PiecesMakeTheWhole) {
  const int64_t n = 1003;
  Slices s(n, 0, DType::BF16, DType::F16);
  const Adam h{1e-2, 0.9, 0.999, 1e-8, 0.1, true, true, 2};
  adam(h, 0.5f, s.p.floats(), s.g.data(), DType::BF16, s.s0.floats(), s.s1.floats(), s.low.data(), DType::F16, n);
  for (int64_t begin = 0, piece = 1; begin < n; begin += piece, piece = std::min(piece * 2 + 1, n - begin)) {
    adam(h, 0.5f, s.want_p.floats() + begin, static_cast<uint16_t*>(s.g.data()) + begin, DType::BF16,
         s.want_s0.floats() + begin, s.want_s1.floats() + begin, static_cast<uint16_t*>(s.want_low.data()) + begin,
         DType::F16, std::min(piece, n - begin));
  }
  s.expect_same();
}

// `low` may be the gradient itself.
TEST(Adam, CopyMayReplaceTheGradient) {
  Slices s(333, 0, DType::BF16, DType::BF16);
  const Adam h{1e-2, 0.9, 0.999, 1e-8, 0.1, true, true, 2};
  adam_ref(h, 1.0f, s.want_p.floats(), s.g.data(), DType::BF16, s.want_s0.floats(), s.want_s1.floats(),
           s.want_low.data(), DType::BF16, 333);
  adam(h, 1.0f, s.p.floats(), s.g.data(), DType::BF16, s.s0.floats(), s.s1.floats(), s.g.data(), DType::BF16, 333);
  EXPECT_SAME(s.g, s.want_low);
  EXPECT_SAME(s.p, s.want_p);
}

// One update against double precision. m and v: three roundings of terms no larger than the larger operand. p: the
// quotient has at most 8 roundings, one more to subtract.
TEST(Adam, IsCloseToDoublePrecision) {
  const int64_t n = 1000;
  Slices s(n, 0, DType::F32, kNoCopy);
  const Adam h{1e-2, 0.9, 0.999, 1e-8, 0.1, true, true, 5};
  adam(h, 1.0f, s.p.floats(), s.g.data(), DType::F32, s.s0.floats(), s.s1.floats(), nullptr, DType::F32, n);
  const double eps = 0x1p-24;
  for (int64_t i = 0; i < n; ++i) {
    const double g = s.g.get(i);
    const double m = 0.9 * s.want_s0.get(i) + 0.1 * g, v = 0.999 * s.want_s1.get(i) + 0.001 * g * g;
    const double step = 1e-2 / (1 - std::pow(0.9, 5)) * m / (std::sqrt(v / (1 - std::pow(0.999, 5))) + 1e-8);
    const double p = s.want_p.get(i) * (1 - 1e-3) - step;
    const double size = std::max(std::abs(g), std::abs(double{s.want_s0.get(i)}));
    EXPECT_LE(std::abs(s.s0.get(i) - m), 4 * eps * size);
    EXPECT_LE(std::abs(s.s1.get(i) - v), 5 * eps * v);
    const double m_error = 4 * eps * size * std::abs(step / m);
    EXPECT_LE(std::abs(s.p.get(i) - p), 3 * eps * std::abs(s.want_p.get(i)) + 9 * eps * std::abs(step) + m_error);
  }
}

TEST(Adam, RefusesBadArguments) {
  float x[4] = {};
  const Adam h{1e-2, 0.9, 0.999, 1e-8, 0, true, true, 1};
  EXPECT_THROW(adam(h, 1, x, x, DType::I32, x, x, nullptr, DType::F32, 4), ValueError);
  EXPECT_THROW(adam(h, 1, x, x, DType::F32, nullptr, x, nullptr, DType::F32, 4), ValueError);
  EXPECT_THROW(adam(h, 1, x, x, DType::F32, x, x, x, DType::F64, 4), ValueError);
  EXPECT_THROW(adam(h, 1, x, x, DType::F32, x, x, nullptr, DType::F32, -4), ValueError);
  adam(h, 1, nullptr, nullptr, DType::F32, nullptr, nullptr, nullptr, DType::F32, 0);
}

}  // namespace
}  // namespace ds::kernels::testing
