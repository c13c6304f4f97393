// SPDX-License-Identifier: Apache-2.0
#include "kernels/exact_fp.h"
#include "kernels/simd_targets.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/cross_entropy/element.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cross_entropy/cross_entropy_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/softmax/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

constexpr int64_t kPiece = 4096;  // columns whose maximum is taken and that are then summed, while they lie in the first cache

template <class T>
HWY_INLINE float sum_row(T tag, const typename T::Raw* x, int64_t n) {
  const V zero = hn::Zero(FloatTag());
  V sum[kUnroll] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) sum[u] = hn::Add(sum[u], load_as(tag, x + i + u * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) sum[0] = hn::Add(sum[0], load_as(tag, x + i));
  if (i < n) sum[1] = hn::Add(sum[1], load_tail(tag, x + i, n - i));
  return sum_lanes(hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3])));
}

// x is read from memory once: its sum of exponentials is carried along under the largest logit so far.
template <class T>
HWY_INLINE RowStats row_stats(T tag, const typename T::Raw* x, int64_t n) {
  RowStats stats{-std::numeric_limits<float>::infinity(), 0.0f};
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = std::min(kPiece, n - i);
    const float top = largest_logit<false>(plain<T>(x + i), count, nullptr);
    if (top > stats.largest) {
      if (stats.sum != 0.0f) stats.sum *= std::exp(stats.largest - top);
      stats.largest = top;
    }
    stats.sum += sum_exponentials<true, false>(plain<T>(x + i), shift_of(stats.largest), count, nullptr);
  }
  return stats;
}

void CrossEntropyForward(float* loss, float* stats, const void* x, DType dtype, const int64_t* labels, const CrossEntropy& c, int64_t begin,
                         int64_t end) {
  dispatch_float(dtype, "x", [&](auto tag) {
    for (int64_t r = begin; r < end; ++r) {
      auto* row = static_cast<const typename decltype(tag)::Raw*>(x) + r * c.columns;
      const bool ignored = labels[r] == c.ignored;
      const RowStats s = ignored ? RowStats{0.0f, 1.0f} : row_stats(tag, row, c.columns);
      stats[2 * r] = s.largest;
      stats[2 * r + 1] = s.sum;
      const float total = ignored || c.smoothing == 0.0f ? 0.0f : sum_row(tag, row, c.columns);
      loss[r] = ignored ? 0.0f : row_loss(c, s, tag.load(row[labels[r]]), total);
    }
  });
}

template <class T>
HWY_INLINE void gradient_of_row(T tag, typename T::Raw* dx, const typename T::Raw* x, float largest, const RowGradient& g, int64_t n) {
  constexpr bool kExact = std::is_same_v<T, F32>;
  const FloatTag df;
  const V top = hn::Set(df, largest), factor = hn::Set(df, g.factor), minus = hn::Set(df, -g.everywhere);
  const auto gradient = [&](V v) HWY_ATTR { return hn::MulAdd(exp_nonpositive<kExact>(hn::Sub(v, top)), factor, minus); };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    V a, b;
    load_two(tag, x + i, a, b);
    store_two(tag, gradient(a), gradient(b), dx + i);
  }
  for (; i + kLanes <= n; i += kLanes) store_as(tag, gradient(load_as(tag, x + i)), dx + i);
  if (i < n) store_tail(tag, gradient(load_tail(tag, x + i, n - i)), dx + i, n - i);
}

void CrossEntropyBackward(void* dx, const void* x, DType dtype, const int64_t* labels, const float* stats, const float* weights, float weight,
                          const CrossEntropy& c, int64_t begin, int64_t end) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t r = begin; r < end; ++r) {
      auto* row = static_cast<const Raw*>(x) + r * c.columns;
      auto* out = static_cast<Raw*>(dx) + r * c.columns;
      const float w = weights != nullptr ? weights[r] : weight;
      if (labels[r] == c.ignored || w == 0.0f) {
        std::fill_n(out, c.columns, Raw{0});
        continue;
      }
      const RowStats s{stats[2 * r], stats[2 * r + 1]};
      const RowGradient g(c, s, w);
      const float own = g.at_label(std::exp(tag.load(row[labels[r]]) - s.largest));  // before dx, which may be x, is written
      gradient_of_row(tag, out, row, s.largest, g, c.columns);
      out[labels[r]] = tag.store(own);
    }
  });
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(CrossEntropyForward);
HWY_EXPORT(CrossEntropyBackward);

namespace {

bool any_rows(const CrossEntropy& c, int64_t begin, int64_t end) {
  DS_CHECK_VALUE(0 <= begin && begin <= end, "rows [" << begin << ", " << end << ") are no range");
  DS_CHECK_VALUE(begin == end || c.columns > 0, "columns must be positive, got " << c.columns);
  return begin != end;
}

}  // namespace

void cross_entropy(float* loss, float* stats, const void* x, DType dtype, const int64_t* labels, const CrossEntropy& c, int64_t begin,
                   int64_t end) {
  if (!any_rows(c, begin, end)) return;
  check_arrays(end - begin, {{loss, "loss"}, {stats, "stats"}, {x, "x"}, {labels, "labels"}});
  HWY_DYNAMIC_DISPATCH(CrossEntropyForward)(loss, stats, x, dtype, labels, c, begin, end);
}

void cross_entropy_backward(void* dx, const void* x, DType dtype, const int64_t* labels, const float* stats, const float* weights,
                            float weight, const CrossEntropy& c, int64_t begin, int64_t end) {
  if (!any_rows(c, begin, end)) return;
  check_arrays(end - begin, {{dx, "dx"}, {x, "x"}, {labels, "labels"}, {stats, "stats"}});
  HWY_DYNAMIC_DISPATCH(CrossEntropyBackward)(dx, x, dtype, labels, stats, weights, weight, c, begin, end);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
