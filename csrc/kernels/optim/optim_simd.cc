// SPDX-License-Identifier: Apache-2.0
// The updates of element.h in vectors. An update is a functor on (g, p, state0, state1); one loop feeds them all.
#include "kernels/exact_fp.h"
#include "kernels/simd_targets.h"

#include <cstring>
#include <type_traits>

#include "kernels/optim/element.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/optim/optim_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/reduce/squares-inl.h"

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

template <class G, class Low>
struct Arrays {
  float* p;
  const typename G::Raw* g;
  float* states[2];
  typename Low::Raw* low;
};

template <class Update, class G, class Low>
HWY_INLINE V update_vector(const Update& update, V scale, const Arrays<G, Low>& a, int64_t i) {
  const V g = hn::Mul(load_as(G{}, a.g + i), scale);
  V p = load_as(F32{}, a.p + i);
  V s0 = Update::kStates > 0 ? load_as(F32{}, a.states[0] + i) : set(0.0f);
  V s1 = Update::kStates > 1 ? load_as(F32{}, a.states[1] + i) : set(0.0f);
  update(g, p, s0, s1);
  store_as(F32{}, p, a.p + i);
  if (Update::kStates > 0) store_as(F32{}, s0, a.states[0] + i);
  if (Update::kStates > 1) store_as(F32{}, s1, a.states[1] + i);
  return p;
}

constexpr int64_t kPair = 2 * kLanes;

template <class Update, class G, class Low>
HWY_INLINE void update_pair(const Update& update, V scale, const Arrays<G, Low>& a, int64_t i) {
  const V first = update_vector(update, scale, a, i);
  const V second = update_vector(update, scale, a, i + kLanes);
  if constexpr (!std::is_same_v<Low, None>) store_pair_as(Low{}, first, second, a.low + i);
}

// The last elements go through the same vector code, in copies, so that an element's bits do not depend on its place.
template <class Update, class G, class Low>
void update_tail(const Update& update, V scale, const Arrays<G, Low>& a, int64_t begin, size_t count) {
  float p[kPair] = {}, s0[kPair] = {}, s1[kPair] = {};
  typename G::Raw g[kPair] = {};
  typename Low::Raw low[kPair];
  const size_t bytes = count * sizeof(float);
  std::memcpy(p, a.p + begin, bytes);
  std::memcpy(g, a.g + begin, count * sizeof(g[0]));
  if (Update::kStates > 0) std::memcpy(s0, a.states[0] + begin, bytes);
  if (Update::kStates > 1) std::memcpy(s1, a.states[1] + begin, bytes);
  update_pair(update, scale, Arrays<G, Low>{p, g, {s0, s1}, low}, 0);
  std::memcpy(a.p + begin, p, bytes);
  if (Update::kStates > 0) std::memcpy(a.states[0] + begin, s0, bytes);
  if (Update::kStates > 1) std::memcpy(a.states[1] + begin, s1, bytes);
  if constexpr (!std::is_same_v<Low, None>) std::memcpy(a.low + begin, low, count * sizeof(low[0]));
}

template <class Update, class G, class Low>
void update_loop(const Update& constants, float grad_scale, const Arrays<G, Low>& arrays, int64_t n) {
  const Update update = constants;  // local, or every store to an array would make the compiler load them again
  const Arrays<G, Low> a = arrays;
  const V scale = set(grad_scale);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) update_pair(update, scale, a, i);
  if (i < n) update_tail(update, scale, a, i, static_cast<size_t>(n - i));
}

template <class Update>
void update_slice(const Update& update, float grad_scale, float* p, const void* g, DType g_dt, float* s0, float* s1,
                  void* low, DType low_dt, int64_t n) {
  dispatch_float(g_dt, "g", [&](auto in) {
    dispatch_optional(low, low_dt, "low", [&](auto out) {
      using G = decltype(in);
      using Low = decltype(out);
      const Arrays<G, Low> a{p, static_cast<const typename G::Raw*>(g), {s0, s1}, static_cast<typename Low::Raw*>(low)};
      update_loop(update, grad_scale, a, n);
    });
  });
}

void AdamSlice(const AdamConstants& c, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v,
               void* low, DType low_dt, int64_t n) {
  c.has_l2 ? update_slice(AdamUpdate<true>(c), grad_scale, p, g, g_dt, m, v, low, low_dt, n)
           : update_slice(AdamUpdate<false>(c), grad_scale, p, g, g_dt, m, v, low, low_dt, n);
}

void LionSlice(const LionConstants& c, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low,
               DType low_dt, int64_t n) {
  update_slice(LionUpdate(c), grad_scale, p, g, g_dt, m, nullptr, low, low_dt, n);
}

void AdagradSlice(const AdagradConstants& c, float grad_scale, float* p, const void* g, DType g_dt, float* sum,
                  void* low, DType low_dt, int64_t n) {
  c.has_l2 ? update_slice(AdagradUpdate<true>(c), grad_scale, p, g, g_dt, sum, nullptr, low, low_dt, n)
           : update_slice(AdagradUpdate<false>(c), grad_scale, p, g, g_dt, sum, nullptr, low, low_dt, n);
}

template <bool kMomentum>
void sgd_slice(const SgdConstants& c, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low,
               DType low_dt, int64_t n) {
  c.has_l2 ? update_slice(SgdUpdate<true, kMomentum>(c), grad_scale, p, g, g_dt, buf, nullptr, low, low_dt, n)
           : update_slice(SgdUpdate<false, kMomentum>(c), grad_scale, p, g, g_dt, buf, nullptr, low, low_dt, n);
}

void SgdSlice(const SgdConstants& c, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low,
              DType low_dt, int64_t n) {
  c.has_momentum ? sgd_slice<true>(c, grad_scale, p, g, g_dt, buf, low, low_dt, n)
                 : sgd_slice<false>(c, grad_scale, p, g, g_dt, buf, low, low_dt, n);
}

void LambApplySlice(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n) {
  update_slice(LambApply(), lr_times_ratio, p, u, DType::F32, nullptr, nullptr, low, low_dt, n);
}

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

// One group of kStatLanes elements.
template <class G>
HWY_INLINE void lamb_group(const LambDirection& direction, V scale, const float* p, const typename G::Raw* g, float* m,
                           float* v, float* u, Squares& p_squares, Squares& u_squares) {
  for (int k = 0; k < kStatLanes / kLanes; ++k) {
    const int64_t i = k * kLanes;
    const V x = load_as(F32{}, p + i);
    V m_new = load_as(F32{}, m + i), v_new = load_as(F32{}, v + i);
    const V update = direction(hn::Mul(load_as(G{}, g + i), scale), x, m_new, v_new);
    store_as(F32{}, m_new, m + i);
    store_as(F32{}, v_new, v + i);
    store_as(F32{}, update, u + i);
    p_squares.add(k, x);
    u_squares.add(k, update);
  }
}

template <class G>
void lamb_loop(const LambDirection& direction, float grad_scale, const float* p, const typename G::Raw* g, float* m,
               float* v, float* u, int64_t n, double* lanes) {
  const V scale = set(grad_scale);
  Squares p_squares, u_squares;
  int64_t i = 0;
  for (; i + kStatLanes <= n; i += kStatLanes) {
    lamb_group<G>(direction, scale, p + i, g + i, m + i, v + i, u + i, p_squares, u_squares);
  }
  p_squares.store(lanes);
  u_squares.store(lanes + kStatLanes);
  if (i == n) return;
  const size_t count = static_cast<size_t>(n - i), bytes = count * sizeof(float);
  float tail_p[kStatLanes] = {}, tail_m[kStatLanes] = {}, tail_v[kStatLanes] = {}, tail_u[kStatLanes];
  typename G::Raw tail_g[kStatLanes] = {};
  std::memcpy(tail_p, p + i, bytes);
  std::memcpy(tail_m, m + i, bytes);
  std::memcpy(tail_v, v + i, bytes);
  std::memcpy(tail_g, g + i, count * sizeof(tail_g[0]));
  Squares unused_p, unused_u;  // the padding's update may be 0 / 0, so the few squares are added here
  lamb_group<G>(direction, scale, tail_p, tail_g, tail_m, tail_v, tail_u, unused_p, unused_u);
  std::memcpy(m + i, tail_m, bytes);
  std::memcpy(v + i, tail_v, bytes);
  std::memcpy(u + i, tail_u, bytes);
  for (size_t j = 0; j < count; ++j) {
    lanes[j] += static_cast<double>(tail_p[j]) * tail_p[j];
    lanes[kStatLanes + j] += static_cast<double>(tail_u[j]) * tail_u[j];
  }
}

// lanes: kStatLanes for p, then kStatLanes for u; overwritten.
void LambDirectionSlice(const LambConstants& c, float grad_scale, const float* p, const void* g, DType g_dt, float* m,
                        float* v, float* u, int64_t n, double* lanes) {
  const LambDirection direction(c);
  dispatch_float(g_dt, "g", [&](auto in) {
    using G = decltype(in);
    lamb_loop<G>(direction, grad_scale, p, static_cast<const typename G::Raw*>(g), m, v, u, n, lanes);
  });
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(AdamSlice);
HWY_EXPORT(LionSlice);
HWY_EXPORT(AdagradSlice);
HWY_EXPORT(SgdSlice);
HWY_EXPORT(LambDirectionSlice);
HWY_EXPORT(LambApplySlice);

void adam(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low,
          DType low_dt, int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}, {v, "v"}});
  HWY_DYNAMIC_DISPATCH(AdamSlice)(AdamConstants(h), grad_scale, p, g, g_dt, m, v, low, low_dt, n);
}

void lion(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt,
          int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}});
  HWY_DYNAMIC_DISPATCH(LionSlice)(LionConstants(h), grad_scale, p, g, g_dt, m, low, low_dt, n);
}

void adagrad(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low,
             DType low_dt, int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {sum, "sum"}});
  HWY_DYNAMIC_DISPATCH(AdagradSlice)(AdagradConstants(h), grad_scale, p, g, g_dt, sum, low, low_dt, n);
}

void sgd(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt,
         int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}});
  if (h.momentum != 0.0) check_arrays(n, {{buf, "buf"}});
  HWY_DYNAMIC_DISPATCH(SgdSlice)(SgdConstants(h), grad_scale, p, g, g_dt, buf, low, low_dt, n);
}

void lamb_direction(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v,
                    float* u, int64_t n, double* norms) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}, {v, "v"}, {u, "u"}});
  double lanes[2 * kStatLanes];
  HWY_DYNAMIC_DISPATCH(LambDirectionSlice)(LambConstants(h), grad_scale, p, g, g_dt, m, v, u, n, lanes);
  norms[0] += add_lanes(lanes);
  norms[1] += add_lanes(lanes + kStatLanes);
}

void lamb_apply(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n) {
  check_arrays(n, {{p, "p"}, {u, "u"}});
  HWY_DYNAMIC_DISPATCH(LambApplySlice)(lr_times_ratio, p, u, low, low_dt, n);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
