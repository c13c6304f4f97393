// SPDX-License-Identifier: Apache-2.0
// The updates of element.h in vectors: functors on (g, p, state0, state1). Included once per instruction set.
#if defined(DS_KERNELS_OPTIM_UPDATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_OPTIM_UPDATE_INL_H_
#undef DS_KERNELS_OPTIM_UPDATE_INL_H_
#else
#define DS_KERNELS_OPTIM_UPDATE_INL_H_
#endif

#include "kernels/optim/element.h"
#include "kernels/simd_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

HWY_INLINE V set(float x) { return hn::Set(FloatTag(), x); }

struct VectorLerp {
  V weight;
  hn::Mask<FloatTag> from_b;
  explicit VectorLerp(const Lerp& c)
      : weight(set(c.from_b ? -c.rest : c.w)), from_b(hn::Ne(set(c.from_b ? 1.0f : 0.0f), set(0.0f))) {}
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Add(hn::IfThenElse(from_b, b, a), hn::Mul(weight, hn::Sub(b, a)));
  }
};

template <bool kL2>
struct AdamUpdate {
  static constexpr int kStates = 2;
  VectorLerp first;
  V beta2, rest2, inverse_root_bc2, eps, step_size, decay, l2;
  explicit AdamUpdate(const AdamConstants& c)
      : first(c.first), beta2(set(c.beta2)), rest2(set(c.rest2)), inverse_root_bc2(set(c.inverse_root_bc2)),
        eps(set(c.eps)), step_size(set(c.step_size)), decay(set(c.has_decay ? c.decay : 1.0f)), l2(set(c.l2)) {}
  HWY_INLINE void operator()(V g, V& p, V& m, V& v) const {
    p = hn::Mul(p, decay);
    if (kL2) g = hn::Add(g, hn::Mul(l2, p));
    m = first(m, g);
    v = hn::Add(hn::Mul(v, beta2), hn::Mul(hn::Mul(rest2, g), g));
    const V denominator = hn::Add(hn::Mul(hn::Sqrt(v), inverse_root_bc2), eps);
    p = hn::Sub(p, hn::Div(hn::Mul(step_size, m), denominator));
  }
};

struct LionUpdate {
  static constexpr int kStates = 1;
  VectorLerp update, average;
  V decay, lr;
  explicit LionUpdate(const LionConstants& c)
      : update(c.update), average(c.average), decay(set(c.decay)), lr(set(c.lr)) {}
  HWY_INLINE void operator()(V g, V& p, V& m, V&) const {
    const V u = update(m, g);
    const V down = hn::IfThenElse(hn::Lt(u, set(0.0f)), hn::Neg(lr), u);
    p = hn::Sub(hn::Mul(p, decay), hn::IfThenElse(hn::Gt(u, set(0.0f)), lr, down));
    m = average(m, g);
  }
};

template <bool kL2>
struct AdagradUpdate {
  static constexpr int kStates = 1;
  V lr, eps, l2;
  explicit AdagradUpdate(const AdagradConstants& c) : lr(set(c.lr)), eps(set(c.eps)), l2(set(c.l2)) {}
  HWY_INLINE void operator()(V g, V& p, V& sum, V&) const {
    if (kL2) g = hn::Add(g, hn::Mul(l2, p));
    sum = hn::Add(sum, hn::Mul(g, g));
    p = hn::Sub(p, hn::Div(hn::Mul(lr, g), hn::Add(hn::Sqrt(sum), eps)));
  }
};

template <bool kL2, bool kMomentum>
struct SgdUpdate {
  static constexpr int kStates = kMomentum ? 1 : 0;
  V lr, momentum, rest, l2;
  bool nesterov, first_step;
  explicit SgdUpdate(const SgdConstants& c)
      : lr(set(c.lr)), momentum(set(c.momentum)), rest(set(c.rest)), l2(set(c.l2)), nesterov(c.nesterov),
        first_step(c.first_step) {}
  HWY_INLINE void operator()(V g, V& p, V& buf, V&) const {
    if (kL2) g = hn::Add(g, hn::Mul(l2, p));
    if (kMomentum) {
      buf = first_step ? g : hn::Add(hn::Mul(buf, momentum), hn::Mul(rest, g));
      g = nesterov ? hn::Add(g, hn::Mul(momentum, buf)) : buf;
    }
    p = hn::Sub(p, hn::Mul(lr, g));
  }
};

struct LambApply {
  static constexpr int kStates = 0;
  HWY_INLINE void operator()(V g, V& p, V&, V&) const { p = hn::Sub(p, g); }
};

struct LambDirection {
  VectorLerp first;
  V beta2, rest2, inverse_bc1, inverse_bc2, inner_eps, outer_eps, weight_decay;
  explicit LambDirection(const LambConstants& c)
      : first(c.first), beta2(set(c.beta2)), rest2(set(c.rest2)), inverse_bc1(set(c.inverse_bc1)),
        inverse_bc2(set(c.inverse_bc2)), inner_eps(set(c.eps_inside_sqrt ? c.eps : 0.0f)),
        outer_eps(set(c.eps_inside_sqrt ? 0.0f : c.eps)), weight_decay(set(c.weight_decay)) {}
  HWY_INLINE V operator()(V g, V p, V& m, V& v) const {
    m = first(m, g);
    v = hn::Add(hn::Mul(v, beta2), hn::Mul(hn::Mul(rest2, g), g));
    const V denominator = hn::Add(hn::Sqrt(hn::Add(hn::Mul(v, inverse_bc2), inner_eps)), outer_eps);
    return hn::Add(hn::Div(hn::Mul(m, inverse_bc1), denominator), hn::Mul(weight_decay, p));
  }
};

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
