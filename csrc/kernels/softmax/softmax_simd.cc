// SPDX-License-Identifier: Apache-2.0
#include "kernels/exact_fp.h"
#include "kernels/simd_targets.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/softmax/softmax.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/softmax/softmax_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/softmax/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

constexpr int64_t kScratch = 16384;  // floats on the stack: longer 16-bit rows go chunk by chunk
constexpr int64_t kFirstCacheBytes = 24 << 10;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// y = e / sum (0 where the sum is 0); y may be e. float32: multiplied by the inverse, then corrected by what is left over, which costs a
// third of a division and is as good; 16-bit results need no correction.
template <class T>
HWY_INLINE void divide_row(T tag, typename T::Raw* y, const float* e, float sum, int64_t n) {
  const V divisor = hn::Set(FloatTag(), sum), inverse = hn::Set(FloatTag(), sum == 0.0f ? 0.0f : 1.0f / sum);
  const auto divide = [&](V v) HWY_ATTR {
    const V quotient = hn::Mul(v, inverse);
    return std::is_same_v<T, F32> ? hn::MulAdd(hn::NegMulAdd(quotient, divisor, v), inverse, quotient) : quotient;
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int u = 0; u < kUnroll; u += 2) {
      const float* from = e + i + u * kLanes;
      store_pair_as(tag, divide(load_as(F32{}, from)), divide(load_as(F32{}, from + kLanes)), y + i + u * kLanes);
    }
  }
  for (; i + kLanes <= n; i += kLanes) store_as(tag, divide(load_as(F32{}, e + i)), y + i);
  if (i < n) store_tail(tag, divide(load_tail(F32{}, e + i, n - i)), y + i, n - i);
}

// The parts [i, i + n) of a row of logits.
template <class T, class M>
HWY_INLINE Logits<T, M> part(const Logits<T, M>& row, int64_t i) {
  return {row.x + i, row.mask == nullptr ? nullptr : row.mask + i, row.scale};
}

// Rows of 16-bit elements longer than the scratch: their exponentials are computed twice.
template <class T, class M>
void softmax_long_row(T tag, typename T::Raw* y, const Logits<T, M>& row, int64_t n, float* scratch) {
  float largest = -kInfinity, sum = 0.0f;
  for (int64_t i = 0; i < n; i += kScratch) {
    const int64_t count = std::min(kScratch, n - i);
    const float top = largest_logit<true>(part(row, i), count, scratch);
    if (top > largest) {
      sum *= largest == -kInfinity ? 1.0f : std::exp(largest - top);
      largest = top;
    }
    sum += sum_exponentials<false, false>(plain<F32>(scratch), shift_of(largest), count, scratch);
  }
  for (int64_t i = 0; i < n; i += kScratch) {
    const int64_t count = std::min(kScratch, n - i);
    largest_logit<true>(part(row, i), count, scratch);
    sum_exponentials<false, true>(plain<F32>(scratch), shift_of(largest), count, scratch);
    divide_row(tag, y + i, scratch, sum, count);
  }
}

// float32 rows keep their exponentials in y, others in the scratch.
template <class T, class M>
HWY_INLINE void softmax_row(T tag, typename T::Raw* y, const Logits<T, M>& row, int64_t n, float* scratch) {
  constexpr bool kFloat = std::is_same_v<T, F32>;
  constexpr bool kReadTwice = kFloat && std::is_same_v<M, None>;
  if (!kFloat && n > kScratch) return softmax_long_row(tag, y, row, n, scratch);
  float* e = scratch;
  if constexpr (kFloat) e = y;
  const float shift = shift_of(largest_logit<!kReadTwice>(row, n, e));
  float sum;
  if constexpr (kReadTwice) {
    sum = sum_exponentials<true, true>(row, shift, n, e);
  } else {
    sum = sum_exponentials<kFloat, true>(plain<F32>(e), shift, n, e);
  }
  divide_row(tag, y, e, sum, n);
}

template <class T, class M>
void softmax_rows(T tag, void* y, const void* x, const SoftmaxRows& s, const MaskView& mask, int64_t begin, int64_t end) {
  alignas(64) float scratch[std::is_same_v<T, F32> ? 1 : kScratch];
  for (int64_t r = begin; r < end; ++r) {
    auto* out = static_cast<typename T::Raw*>(y) + r * s.columns;
    auto* in = static_cast<const typename T::Raw*>(x) + r * s.columns;
    auto* row_mask = static_cast<const typename M::Raw*>(mask.data);
    if (row_mask != nullptr) row_mask += mask_offset(mask, r);
    const int64_t visible = visible_columns(s, r);
    softmax_row(tag, out, Logits<T, M>{in, row_mask, s.scale}, visible, scratch);
    std::fill(out + visible, out + s.columns, typename T::Raw{0});
  }
}

void Softmax(void* y, const void* x, DType dtype, const SoftmaxRows& s, const MaskView& mask, int64_t begin, int64_t end) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    if (mask.data == nullptr) return softmax_rows<T, None>(tag, y, x, s, mask, begin, end);
    if (mask.dtype == DType::BOOL) return softmax_rows<T, Bool>(tag, y, x, s, mask, begin, end);
    dispatch_float(mask.dtype, "mask", [&](auto m) { softmax_rows<T, decltype(m)>(tag, y, x, s, mask, begin, end); });
  });
}

// To the second-level cache. No harm is done beyond an array.
template <class Raw>
HWY_INLINE void ask_for_pair(const Raw* p) {
  __builtin_prefetch(p, 0, 2);
  if constexpr (2 * kLanes * sizeof(Raw) > 64) __builtin_prefetch(p + kLanes, 0, 2);
}

template <class T>
HWY_INLINE float dot_row(T tag, const typename T::Raw* a, const typename T::Raw* b, int64_t n) {
  const V zero = hn::Zero(FloatTag());
  V sum[kUnroll] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int u = 0; u < kUnroll; u += 2) {
      V a0, a1, b0, b1;
      load_two(tag, a + i + u * kLanes, a0, a1);
      load_two(tag, b + i + u * kLanes, b0, b1);
      sum[u] = hn::MulAdd(a0, b0, sum[u]);
      sum[u + 1] = hn::MulAdd(a1, b1, sum[u + 1]);
    }
  }
  for (; i + kLanes <= n; i += kLanes) sum[0] = hn::MulAdd(load_as(tag, a + i), load_as(tag, b + i), sum[0]);
  if (i < n) sum[1] = hn::MulAdd(load_tail(tag, a + i, n - i), load_tail(tag, b + i, n - i), sum[1]);
  return sum_lanes(hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3])));
}

// Note [plain rows]: where the scale is a power of two of at most 1, scale * (g - dot) is one operation and as exact. Where in addition the sum dot
// of g * p is a number, and not a huge one, g and p are numbers and so is the result: nobody need look for NaNs before rounding to 16 bits.
constexpr float kLargestPlainDot = 1e30f;  // the largest bfloat16 can be moved by it and stays a number

bool is_plain_scale(float x) {
  int exponent;
  return std::frexp(x, &exponent) == 0.5f && exponent <= 1 && exponent > -60;
}

// scale * p * (g - dot).
template <bool kPlain>
struct Gradient {
  V scale, dot;
  HWY_INLINE Gradient(float scale_, float dot_) : scale(hn::Set(FloatTag(), scale_)), dot(hn::Set(FloatTag(), kPlain ? scale_ * dot_ : dot_)) {}
  HWY_INLINE V operator()(V g, V p) const {
    if constexpr (kPlain) return hn::Mul(p, hn::MulSub(scale, g, dot));
    return hn::Mul(hn::Mul(scale, p), hn::Sub(g, dot));
  }
};

// kPast: dx is written past the caches. kAhead: the row behind this one is asked for.
template <bool kPast, bool kAhead, bool kPlain, class T>
void write_gradient(T tag, typename T::Raw* dx, const typename T::Raw* dy, const typename T::Raw* y, const Gradient<kPlain>& row, int64_t n) {
  const Gradient<kPlain> gradient = row;
  const int64_t steps = n / kStep;
  // From the end when the row does not fit the first cache: what the sum read last still lies there.
  const bool from_the_end = 2 * n * static_cast<int64_t>(sizeof(typename T::Raw)) > kFirstCacheBytes;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t i = (from_the_end ? steps - 1 - step : step) * kStep;
    for (int64_t k = i; k < i + kStep; k += 2 * kLanes) {
      if constexpr (kAhead) ask_for_pair(dy + n + k);
      if constexpr (kAhead) ask_for_pair(y + n + k);
      V g0, g1, p0, p1;
      load_two(tag, dy + k, g0, g1);
      load_two(tag, y + k, p0, p1);
      store_two<kPlain, kPast>(tag, gradient(g0, p0), gradient(g1, p1), dx + k);
    }
  }
  int64_t i = steps * kStep;
  for (; i + kLanes <= n; i += kLanes) store_as(tag, gradient(load_as(tag, dy + i), load_as(tag, y + i)), dx + i);
  if (i < n) store_tail(tag, gradient(load_tail(tag, dy + i, n - i), load_tail(tag, y + i, n - i)), dx + i, n - i);
}

template <bool kPast, bool kAhead, class T>
void gradient_rows(T tag, typename T::Raw* dx, const typename T::Raw* dy, const typename T::Raw* y, const SoftmaxRows& s, int64_t begin,
                   int64_t end) {
  constexpr bool kNarrow = !std::is_same_v<T, F32>;  // what is read as float32 waits for memory, not for arithmetic
  const bool plain_scale = kNarrow && is_plain_scale(s.scale);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t visible = visible_columns(s, r), at = r * s.columns;
    const float dot = dot_row(tag, dy + at, y + at, visible);
    if (plain_scale && std::fabs(dot) <= kLargestPlainDot) {
      write_gradient<kPast, kAhead, kNarrow>(tag, dx + at, dy + at, y + at, Gradient<kNarrow>(s.scale, dot), visible);
    } else {
      write_gradient<kPast, kAhead, false>(tag, dx + at, dy + at, y + at, Gradient<false>(s.scale, dot), visible);
    }
    if (visible < s.columns) std::fill(dx + at + visible, dx + at + s.columns, typename T::Raw{0});
  }
}

void SoftmaxBackward(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t begin, int64_t end) {
  dispatch_float(dtype, "y", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    auto* out = static_cast<Raw*>(dx);
    auto *grad = static_cast<const Raw*>(dy), *p = static_cast<const Raw*>(y);
    const bool past = s.past_caches && is_streamable(out) && static_cast<size_t>(s.columns) * sizeof(Raw) % kStreamBytes == 0;
    if (past) {
      s.from_memory ? gradient_rows<true, true>(tag, out, grad, p, s, begin, end) : gradient_rows<true, false>(tag, out, grad, p, s, begin, end);
    } else {
      s.from_memory ? gradient_rows<false, true>(tag, out, grad, p, s, begin, end)
                    : gradient_rows<false, false>(tag, out, grad, p, s, begin, end);
    }
  });
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(Softmax);
HWY_EXPORT(SoftmaxBackward);

namespace {

// The elements of the rows asked for; refuses a range that is none.
int64_t check_rows(const SoftmaxRows& s, int64_t begin, int64_t end) {
  DS_CHECK_VALUE(s.columns >= 0, "columns must not be negative, got " << s.columns);
  DS_CHECK_VALUE(s.queries >= 0, "queries must not be negative, got " << s.queries);
  DS_CHECK_VALUE(0 <= begin && begin <= end, "rows [" << begin << ", " << end << ") are no range");
  return (end - begin) * s.columns;
}

}  // namespace

void softmax(void* y, const void* x, DType dtype, const SoftmaxRows& s, const MaskView& mask, int64_t begin, int64_t end) {
  const int64_t n = check_rows(s, begin, end);
  check_arrays(n, {{y, "y"}, {x, "x"}});
  if (n != 0) HWY_DYNAMIC_DISPATCH(Softmax)(y, x, dtype, s, mask, begin, end);
}

void softmax_backward(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t begin, int64_t end) {
  const int64_t n = check_rows(s, begin, end);
  check_arrays(n, {{dx, "dx"}, {dy, "dy"}, {y, "y"}});
  if (n != 0) HWY_DYNAMIC_DISPATCH(SoftmaxBackward)(dx, dy, y, dtype, s, begin, end);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
