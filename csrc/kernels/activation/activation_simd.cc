// SPDX-License-Identifier: Apache-2.0
// An activation is a functor that gives the value of a vector, or value and slope; the loops bring it x + bias, several rows at a time, so that biases are
// loaded and their gradients' sums are stored once for all of those rows.
#include "kernels/simd_targets.h"

#include <algorithm>

#include "kernels/activation/activation.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/activation/activation_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/simd_math-inl.h"
#include "kernels/simd_pair-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

struct ValueAndSlope {
  V value, slope;
};

template <class P>
struct GeluErfOf {
  static HWY_INLINE V value(V x) { return hn::Mul(x, normal<P>(x).cdf); }
  static HWY_INLINE ValueAndSlope at(V x) {
    const Normal n = normal<P>(x);
    return {hn::Mul(x, n.cdf), hn::MulAdd(hn::Mul(x, constant(0.398942280401432678f)), n.bell, n.cdf)};
  }
};

// 0.5 (1 + tanh(u)) is the logistic function of 2 u.
template <class P>
struct GeluTanhOf {
  static constexpr float kLinear = 1.59576912160573071f, kCubic = 0.0713548162726009f;  // 2 sqrt(2 / pi), times 0.044715
  static HWY_INLINE V square(V x) { return hn::Min(hn::Mul(x, x), constant(1e4f)); }    // saturated long before; keeps infinity out
  static HWY_INLINE V twice_u(V x, V square) { return hn::Mul(x, hn::MulAdd(square, constant(kCubic), constant(kLinear))); }
  static HWY_INLINE V value(V x) { return hn::Mul(x, logistic_value<P>(twice_u(x, square(x)))); }
  static HWY_INLINE ValueAndSlope at(V x) {
    const V x2 = square(x);
    const Logistic l = logistic<P>(twice_u(x, x2));
    const V inner = hn::MulAdd(x2, constant(3.0f * kCubic), constant(kLinear));
    return {hn::Mul(x, l.s), hn::MulAdd(hn::Mul(x, l.s), hn::Mul(l.rest, inner), l.s)};
  }
};

template <class P>
struct SiluOf {
  static HWY_INLINE V value(V x) { return hn::Mul(x, logistic_value<P>(x)); }
  static HWY_INLINE ValueAndSlope at(V x) {
    const Logistic l = logistic<P>(x);
    const V y = hn::Mul(x, l.s);
    return {y, hn::MulAdd(y, l.rest, l.s)};
  }
};

template <class P>
struct ReluOf {  // NaN goes through
  static HWY_INLINE V value(V x) { return hn::IfThenElse(hn::Lt(x, hn::Zero(FloatTag())), hn::Zero(FloatTag()), x); }
  static HWY_INLINE ValueAndSlope at(V x) {
    const V zero = hn::Zero(FloatTag());
    return {value(x), hn::IfThenElse(hn::Le(x, zero), zero, constant(1.0f))};
  }
};

template <bool kWhole, bool kBias, class T>
HWY_INLINE Pair get_biased(const typename T::Raw* p, const Pair& bias, int64_t n) {
  const Pair x = get_pair<kWhole>(T{}, p, n);
  if (!kBias) return x;
  return {hn::Add(x.a, bias.a), hn::Add(x.b, bias.b)};
}

template <bool kWhole, bool kBias>
HWY_INLINE Pair get_bias(const float* bias, int64_t i, int64_t n) {
  if (kBias) return get_pair<kWhole>(F32{}, bias + i, n);
  return {hn::Zero(FloatTag()), hn::Zero(FloatTag())};
}

template <bool kWhole>
HWY_INLINE void add_to(const Pair& v, float* sums, int64_t n) {
  const Pair old = get_pair<kWhole>(F32{}, sums, n);
  put_pair<kWhole>(F32{}, Pair{hn::Add(old.a, v.a), hn::Add(old.b, v.b)}, sums, n);
}

template <class A, class T, bool kBias>
struct ForwardRow {
  const typename T::Raw* x;
  const float* bias;
  typename T::Raw* y;
  bool past_caches;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    const Pair in = get_biased<kWhole, kBias, T>(x + i, get_bias<kWhole, kBias>(bias, i, n), n);
    put_pair<kWhole>(T{}, Pair{A::value(in.a), A::value(in.b)}, y + i, n, past_caches);
  }
};

template <class A, class T, bool kBias, int kRows>
struct BackwardRows {
  const typename T::Raw *dy, *x;
  const float* bias;
  typename T::Raw* dx;
  float* dbias;
  int64_t cols;
  bool past_caches;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    const Pair b = get_bias<kWhole, kBias>(bias, i, n);
    Pair sum = {hn::Zero(FloatTag()), hn::Zero(FloatTag())};
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * cols + i;
      const Pair in = get_biased<kWhole, kBias, T>(x + at, b, n);
      const Pair grad = get_pair<kWhole>(T{}, dy + at, n);
      const Pair out = {hn::Mul(grad.a, A::at(in.a).slope), hn::Mul(grad.b, A::at(in.b).slope)};
      put_pair<kWhole>(T{}, out, dx + at, n, past_caches);
      sum = {hn::Add(sum.a, out.a), hn::Add(sum.b, out.b)};
    }
    if (kBias && dbias != nullptr) add_to<kWhole>(sum, dbias + i, n);
  }
};

template <class A, class T, bool kBias>
struct GatedRow {
  const typename T::Raw *gate, *up;
  const float *gate_bias, *up_bias;
  typename T::Raw* y;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    const Pair g = get_biased<kWhole, kBias, T>(gate + i, get_bias<kWhole, kBias>(gate_bias, i, n), n);
    const Pair u = get_biased<kWhole, kBias, T>(up + i, get_bias<kWhole, kBias>(up_bias, i, n), n);
    put_pair<kWhole>(T{}, Pair{hn::Mul(A::value(g.a), u.a), hn::Mul(A::value(g.b), u.b)}, y + i, n);
  }
};

template <class A, class T, bool kBias, int kRows>
struct GatedBackwardRows {
  const typename T::Raw *gate, *up, *dy;
  const float *gate_bias, *up_bias;
  typename T::Raw *dgate, *dup;
  float *dgate_bias, *dup_bias;
  int64_t cols, stride, grad_stride;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    const Pair gb = get_bias<kWhole, kBias>(gate_bias, i, n), ub = get_bias<kWhole, kBias>(up_bias, i, n);
    const V zero = hn::Zero(FloatTag());
    Pair gate_sum = {zero, zero}, up_sum = {zero, zero};
    for (int r = 0; r < kRows; ++r) {
      const Pair g = get_biased<kWhole, kBias, T>(gate + r * stride + i, gb, n);
      const Pair u = get_biased<kWhole, kBias, T>(up + r * stride + i, ub, n);
      const Pair grad = get_pair<kWhole>(T{}, dy + r * cols + i, n);
      const ValueAndSlope a = A::at(g.a), b = A::at(g.b);
      const Pair dg = {hn::Mul(hn::Mul(grad.a, u.a), a.slope), hn::Mul(hn::Mul(grad.b, u.b), b.slope)};
      const Pair du = {hn::Mul(grad.a, a.value), hn::Mul(grad.b, b.value)};
      put_pair<kWhole>(T{}, dg, dgate + r * grad_stride + i, n);
      put_pair<kWhole>(T{}, du, dup + r * grad_stride + i, n);
      gate_sum = {hn::Add(gate_sum.a, dg.a), hn::Add(gate_sum.b, dg.b)};
      up_sum = {hn::Add(up_sum.a, du.a), hn::Add(up_sum.b, du.b)};
    }
    if (kBias && dgate_bias != nullptr) {
      add_to<kWhole>(gate_sum, dgate_bias + i, n);
      add_to<kWhole>(up_sum, dup_bias + i, n);
    }
  }
};

constexpr int kRowsAtOnce = 4;

// Calls f(A<precision of T>(), bias yes or no).
template <class T, template <class> class A, class F>
void with_bias(bool has_bias, const F& f) {
  using Act = A<typename Precision<T>::Type>;
  has_bias ? f(Act(), std::true_type()) : f(Act(), std::false_type());
}

template <class F>
void with_activation(Activation act, DType dtype, bool has_bias, const F& f) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    const auto g = [&](auto a, auto bias) { f(tag, a, bias); };
    switch (act) {
      case Activation::GeluErf: return with_bias<T, GeluErfOf>(has_bias, g);
      case Activation::GeluTanh: return with_bias<T, GeluTanhOf>(has_bias, g);
      case Activation::Silu: return with_bias<T, SiluOf>(has_bias, g);
      case Activation::Relu: return with_bias<T, ReluOf>(has_bias, g);
    }
    DS_FAIL_VALUE("act: not an activation: " << static_cast<int>(act));
  });
}

template <class A, class T, bool kBias>
HWY_NOINLINE void forward_loop(const void* x, const float* bias, Output y, int64_t rows, int64_t cols) {
  using Raw = typename T::Raw;
  for (int64_t r = 0; r < rows; ++r) {
    Raw* out = static_cast<Raw*>(y.data) + r * cols;
    for_pairs(ForwardRow<A, T, kBias>{static_cast<const Raw*>(x) + r * cols, bias, out, y.past_caches && is_streamable(out)}, cols);
  }
}

template <class A, class T, bool kBias, int kRows>
HWY_INLINE int64_t backward_rows(const void* dy, const void* x, const float* bias, Output dx, float* dbias, int64_t r, int64_t rows,
                                 int64_t cols) {
  using Raw = typename T::Raw;
  for (; r + kRows <= rows; r += kRows) {
    const int64_t at = r * cols;
    Raw* out = static_cast<Raw*>(dx.data) + at;
    const bool past_caches = dx.past_caches && is_streamable(out) && (kRows == 1 || is_streamable(out + cols));
    for_pairs(BackwardRows<A, T, kBias, kRows>{static_cast<const Raw*>(dy) + at, static_cast<const Raw*>(x) + at, bias, out, dbias, cols,
                                               past_caches}, cols);
  }
  return r;
}

template <class A, class T, bool kBias>
HWY_NOINLINE void backward_loop(const void* dy, const void* x, const float* bias, Output dx, float* dbias, int64_t rows, int64_t cols) {
  int64_t r = 0;
  if (kBias) r = backward_rows<A, T, kBias, kRowsAtOnce>(dy, x, bias, dx, dbias, r, rows, cols);
  backward_rows<A, T, kBias, 1>(dy, x, bias, dx, dbias, r, rows, cols);
}

template <class A, class T, bool kBias>
HWY_NOINLINE void gated_loop(const GatedInput& in, void* y, int64_t rows, int64_t cols) {
  using Raw = typename T::Raw;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * in.stride;
    for_pairs(GatedRow<A, T, kBias>{static_cast<const Raw*>(in.gate) + at, static_cast<const Raw*>(in.up) + at, in.gate_bias, in.up_bias,
                                    static_cast<Raw*>(y) + r * cols}, cols);
  }
}

template <class A, class T, bool kBias, int kRows>
HWY_INLINE int64_t gated_backward_rows(const GatedInput& in, const void* dy, const GatedGrads& out, int64_t r, int64_t rows, int64_t cols) {
  using Raw = typename T::Raw;
  for (; r + kRows <= rows; r += kRows) {
    const int64_t at = r * in.stride, to = r * out.stride;
    for_pairs(GatedBackwardRows<A, T, kBias, kRows>{static_cast<const Raw*>(in.gate) + at, static_cast<const Raw*>(in.up) + at,
                                                    static_cast<const Raw*>(dy) + r * cols, in.gate_bias, in.up_bias,
                                                    static_cast<Raw*>(out.gate) + to, static_cast<Raw*>(out.up) + to, out.gate_bias,
                                                    out.up_bias, cols, in.stride, out.stride}, cols);
  }
  return r;
}

template <class A, class T, bool kBias>
HWY_NOINLINE void gated_backward_loop(const GatedInput& in, const void* dy, const GatedGrads& out, int64_t rows, int64_t cols) {
  int64_t r = 0;
  if (kBias) r = gated_backward_rows<A, T, kBias, kRowsAtOnce>(in, dy, out, r, rows, cols);
  gated_backward_rows<A, T, kBias, 1>(in, dy, out, r, rows, cols);
}

void BiasAct(Activation act, DType dtype, const void* x, const float* bias, Output y, int64_t rows, int64_t cols) {
  with_activation(act, dtype, bias != nullptr, [&](auto tag, auto a, auto has_bias) {
    forward_loop<decltype(a), decltype(tag), has_bias.value>(x, bias, y, rows, cols);
  });
}

void BiasActBackward(Activation act, DType dtype, const void* dy, const void* x, const float* bias, Output dx, float* dbias, int64_t rows,
                     int64_t cols) {
  with_activation(act, dtype, bias != nullptr, [&](auto tag, auto a, auto has_bias) {
    backward_loop<decltype(a), decltype(tag), has_bias.value>(dy, x, bias, dx, dbias, rows, cols);
  });
}

void Gated(Activation act, DType dtype, const GatedInput& in, void* y, int64_t rows, int64_t cols) {
  with_activation(act, dtype, in.gate_bias != nullptr, [&](auto tag, auto a, auto has_bias) {
    gated_loop<decltype(a), decltype(tag), has_bias.value>(in, y, rows, cols);
  });
}

void GatedBackward(Activation act, DType dtype, const GatedInput& in, const void* dy, const GatedGrads& out, int64_t rows, int64_t cols) {
  with_activation(act, dtype, in.gate_bias != nullptr, [&](auto tag, auto a, auto has_bias) {
    gated_backward_loop<decltype(a), decltype(tag), has_bias.value>(in, dy, out, rows, cols);
  });
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(BiasAct);
HWY_EXPORT(BiasActBackward);
HWY_EXPORT(Gated);
HWY_EXPORT(GatedBackward);

namespace {

// Whether there is anything to do.
bool check_rows(int64_t rows, int64_t cols, std::initializer_list<NamedArray> arrays) {
  DS_CHECK_VALUE(rows >= 0 && cols >= 0, "rows and cols must not be negative, got " << rows << " and " << cols);
  check_arrays(std::min<int64_t>(rows, 1) * cols, arrays);
  return rows > 0 && cols > 0;
}

void check_sums(const float* bias, const float* sums, const char* name) {
  DS_CHECK_VALUE(sums == nullptr || bias != nullptr, name << ": a gradient is asked of a bias that is not there");
}

void clear(float* sums, int64_t cols) {
  if (sums != nullptr) std::fill_n(sums, cols, 0.0f);
}

}  // namespace

void bias_act(Activation act, DType dtype, const void* x, const float* bias, Output y, int64_t rows, int64_t cols) {
  if (!check_rows(rows, cols, {{x, "x"}, {y.data, "y"}})) return;
  HWY_DYNAMIC_DISPATCH(BiasAct)(act, dtype, x, bias, y, rows, cols);
}

void bias_act_backward(Activation act, DType dtype, const void* dy, const void* x, const float* bias, Output dx, float* dbias, int64_t rows,
                       int64_t cols) {
  const bool any = check_rows(rows, cols, {{dy, "dy"}, {x, "x"}, {dx.data, "dx"}});
  check_sums(bias, dbias, "dbias");
  clear(dbias, cols);
  if (any) HWY_DYNAMIC_DISPATCH(BiasActBackward)(act, dtype, dy, x, bias, dx, dbias, rows, cols);
}

void gated(Activation act, DType dtype, const GatedInput& in, void* y, int64_t rows, int64_t cols) {
  if (!check_rows(rows, cols, {{in.gate, "gate"}, {in.up, "up"}, {y, "y"}})) return;
  DS_CHECK_VALUE((in.gate_bias == nullptr) == (in.up_bias == nullptr), "gate_bias and up_bias come together");
  HWY_DYNAMIC_DISPATCH(Gated)(act, dtype, in, y, rows, cols);
}

void gated_backward(Activation act, DType dtype, const GatedInput& in, const void* dy, const GatedGrads& out, int64_t rows, int64_t cols) {
  const bool any =
      check_rows(rows, cols, {{in.gate, "gate"}, {in.up, "up"}, {dy, "dy"}, {out.gate, "the gate's gradient"}, {out.up, "up's gradient"}});
  DS_CHECK_VALUE((in.gate_bias == nullptr) == (in.up_bias == nullptr), "gate_bias and up_bias come together");
  DS_CHECK_VALUE((out.gate_bias == nullptr) == (out.up_bias == nullptr), "the sums for gate_bias and up_bias come together");
  check_sums(in.gate_bias, out.gate_bias, "gate_bias");
  clear(out.gate_bias, cols);
  clear(out.up_bias, cols);
  if (any) HWY_DYNAMIC_DISPATCH(GatedBackward)(act, dtype, in, dy, out, rows, cols);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
