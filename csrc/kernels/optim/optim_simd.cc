// SPDX-License-Identifier: Apache-2.0
// One loop feeds all elementwise updates. Arrays in float32 are updated where they lie; arrays in another form pass through float32 blocks that
// stay in the first-level cache, so memory is still read and written once.
#include "kernels/exact_fp.h"
#include "kernels/simd_targets.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/optim/stored.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/optim/optim_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/optim/forms-inl.h"
#include "kernels/optim/update-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

template <class G, class Low>
struct Arrays {
  float* p;
  const typename G::Raw* g;
  float* states[2];
  typename Low::Raw* low;
};

// Vectors updated at once, each array's together: the cores of today fetch a long run of one array after another faster than single lines in turn
// (a tenth of an Adam update of one thread). As many as registers hold.
constexpr int kGroupVectors = HWY_TARGET <= HWY_AVX3 ? 4 : 2;
constexpr int64_t kGroup = kGroupVectors * kLanes;

template <class T>
HWY_INLINE void load_group(T tag, const typename T::Raw* from, V (&to)[kGroupVectors]) {
  for (int k = 0; k < kGroupVectors; ++k) to[k] = load_as(tag, from + k * kLanes);
}
HWY_INLINE void store_group(const V (&from)[kGroupVectors], float* to) {
  for (int k = 0; k < kGroupVectors; ++k) store_as(F32{}, from[k], to + k * kLanes);
}

template <class Update, class G, class Low>
HWY_INLINE void update_group(const Update& update, V scale, const Arrays<G, Low>& a, int64_t i) {
  V g[kGroupVectors], p[kGroupVectors], s0[kGroupVectors], s1[kGroupVectors];
  load_group(G{}, a.g + i, g);
  load_group(F32{}, a.p + i, p);
  if (Update::kStates > 0) load_group(F32{}, a.states[0] + i, s0);
  if (Update::kStates > 1) load_group(F32{}, a.states[1] + i, s1);
  for (int k = 0; k < kGroupVectors; ++k) update(hn::Mul(g[k], scale), p[k], s0[k], s1[k]);
  store_group(p, a.p + i);
  if (Update::kStates > 0) store_group(s0, a.states[0] + i);
  if (Update::kStates > 1) store_group(s1, a.states[1] + i);
  if constexpr (!std::is_same_v<Low, None>) {
    for (int k = 0; k < kGroupVectors; k += 2) store_pair_as(Low{}, p[k], p[k + 1], a.low + i + k * kLanes);
  }
}

// The last elements go through the same vector code, in copies, so that an element's bits do not depend on its place.
template <class Update, class G, class Low>
void update_tail(const Update& update, V scale, const Arrays<G, Low>& a, int64_t begin, size_t count) {
  float p[kGroup] = {}, s0[kGroup] = {}, s1[kGroup] = {};
  typename G::Raw g[kGroup] = {};
  typename Low::Raw low[kGroup];
  const size_t bytes = count * sizeof(float);
  std::memcpy(p, a.p + begin, bytes);
  std::memcpy(g, a.g + begin, count * sizeof(g[0]));
  if (Update::kStates > 0) std::memcpy(s0, a.states[0] + begin, bytes);
  if (Update::kStates > 1) std::memcpy(s1, a.states[1] + begin, bytes);
  update_group(update, scale, Arrays<G, Low>{p, g, {s0, s1}, low}, 0);
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
  for (; i + kGroup <= n; i += kGroup) update_group(update, scale, a, i);
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

// What the loops take: float32 arrays, and a gradient and a copy in any dtype.
struct Plain {
  float grad_scale;
  float* p;
  const void* g;
  DType g_dt;
  float* s0;
  float* s1;
  void* low;
  DType low_dt;
  int64_t n;
};

template <class Update>
void update_plain(const Update& update, const Plain& a) {
  update_slice(update, a.grad_scale, a.p, a.g, a.g_dt, a.s0, a.s1, a.low, a.low_dt, a.n);
}
void update_rule(const AdamConstants& c, const Plain& a) {
  c.has_l2 ? update_plain(AdamUpdate<true>(c), a) : update_plain(AdamUpdate<false>(c), a);
}
void update_rule(const LionConstants& c, const Plain& a) { update_plain(LionUpdate(c), a); }
void update_rule(const AdagradConstants& c, const Plain& a) {
  c.has_l2 ? update_plain(AdagradUpdate<true>(c), a) : update_plain(AdagradUpdate<false>(c), a);
}
void update_rule(const SgdConstants& c, const Plain& a) {
  if (c.has_momentum) c.has_l2 ? update_plain(SgdUpdate<true, true>(c), a) : update_plain(SgdUpdate<false, true>(c), a);
  else c.has_l2 ? update_plain(SgdUpdate<true, false>(c), a) : update_plain(SgdUpdate<false, false>(c), a);
}

constexpr int64_t kStepBlock = 2 * kCodeBlock;

// A float32 view of one array's block: the array itself, or a copy that `close` stores.
class Block {
 public:
  float* open(const Stored& array, bool is_used, int64_t n) {
    array_ = array;
    is_copied_ = is_used && array.form != Form::F32;
    if (!is_copied_) return is_used ? static_cast<float*>(array.data) : nullptr;
    Widen(array, copy_, n);
    return copy_;
  }
  void close(const Dice& dice, int64_t n) const {
    if (is_copied_) Narrow(copy_, array_, dice, n);
  }

 private:
  alignas(64) float copy_[kStepBlock];
  Stored array_;
  bool is_copied_ = false;
};

void StepSlice(const Rule& rule, float grad_scale, const Slice& a, int64_t n) {
  const int states = states_of(rule);
  const bool in_place = a.p.form == Form::F32 && (states < 1 || a.states[0].form == Form::F32) && (states < 2 || a.states[1].form == Form::F32);
  const int64_t block = in_place ? n : kStepBlock;
  Block p, s0, s1;
  for (int64_t begin = 0; begin < n; begin += block) {
    const Slice at = begin == 0 ? a : a.at(begin);
    const int64_t count = std::min(block, n - begin);
    float* values = p.open(at.p, true, count);
    float* first = s0.open(at.states[0], states > 0, count);
    float* second = s1.open(at.states[1], states > 1, count);
    const Plain plain{grad_scale, values, at.g, at.g_dt, first, second, at.low, at.low_dt, count};
    std::visit([&](const auto& constants) { update_rule(constants, plain); }, rule);
    p.close(at.dice, count);
    s0.close(at.dice, count);
    s1.close(at.dice, count);
  }
}

void LambApplySlice(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n) {
  update_slice(LambApply(), lr_times_ratio, p, u, DType::F32, nullptr, nullptr, low, low_dt, n);
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(StepSlice);
HWY_EXPORT(LambApplySlice);
HWY_EXPORT(Widen);
HWY_EXPORT(Narrow);

namespace {

Slice plain_slice(float* p, const void* g, DType g_dt, float* s0, float* s1, void* low, DType low_dt) {
  return {{Form::F32, p}, g, g_dt, {{Form::F32, s0}, {Form::F32, s1}}, low, low_dt, {}};
}

}  // namespace

void step(const Rule& rule, float grad_scale, const Slice& a, int64_t n) {
  check_slice(rule, a, n);
  HWY_DYNAMIC_DISPATCH(StepSlice)(rule, grad_scale, a, n);
}

void widen(const Stored& from, float* to, int64_t n) {
  check_stored(from, "from", n);
  check_arrays(n, {{to, "to"}});
  HWY_DYNAMIC_DISPATCH(Widen)(from, to, n);
}
void narrow(const float* from, const Stored& to, const Dice& dice, int64_t n) {
  check_arrays(n, {{from, "from"}});
  check_stored(to, "to", n);
  HWY_DYNAMIC_DISPATCH(Narrow)(from, to, dice, n);
}

void adam(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low,
          DType low_dt, int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}, {v, "v"}});
  HWY_DYNAMIC_DISPATCH(StepSlice)(AdamConstants(h), grad_scale, plain_slice(p, g, g_dt, m, v, low, low_dt), n);
}

void lion(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt,
          int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}});
  HWY_DYNAMIC_DISPATCH(StepSlice)(LionConstants(h), grad_scale, plain_slice(p, g, g_dt, m, nullptr, low, low_dt), n);
}

void adagrad(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low,
             DType low_dt, int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {sum, "sum"}});
  HWY_DYNAMIC_DISPATCH(StepSlice)(AdagradConstants(h), grad_scale, plain_slice(p, g, g_dt, sum, nullptr, low, low_dt), n);
}

void sgd(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt,
         int64_t n) {
  check_arrays(n, {{p, "p"}, {g, "g"}});
  if (h.momentum != 0.0) check_arrays(n, {{buf, "buf"}});
  HWY_DYNAMIC_DISPATCH(StepSlice)(SgdConstants(h), grad_scale, plain_slice(p, g, g_dt, buf, nullptr, low, low_dt), n);
}

void lamb_apply(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n) {
  check_arrays(n, {{p, "p"}, {u, "u"}});
  HWY_DYNAMIC_DISPATCH(LambApplySlice)(lr_times_ratio, p, u, low, low_dt, n);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
