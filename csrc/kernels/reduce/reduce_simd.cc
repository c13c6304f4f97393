// SPDX-License-Identifier: Apache-2.0
#include "kernels/exact_fp.h"
#include "kernels/simd_targets.h"

#include <cstring>

#include "kernels/reduce/reduce.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/reduce/reduce_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/reduce/squares-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

struct ReduceArgs {
  float* dst;
  const void* const* src;
  int nsrc;
  float scale;
  int64_t n;
};

template <class T>
HWY_INLINE const typename T::Raw* source(const ReduceArgs& a, int k) {
  return static_cast<const typename T::Raw*>(a.src[k]);
}

// The last n % kStatLanes elements, through zero-padded copies: zeros change neither sum nor lanes.
template <class T, bool kAccumulate, bool kStats>
HWY_INLINE void reduce_tail(T tag, const ReduceArgs& a, int64_t begin, Squares& squares) {
  const size_t left = static_cast<size_t>(a.n - begin);
  typename T::Raw raw[kStatLanes] = {};
  float sums[kStatLanes] = {};
  for (int k = 0; k < a.nsrc; ++k) {
    std::memcpy(raw, source<T>(a, k) + begin, left * sizeof(raw[0]));
    for (int i = 0; i < kStatLanes; i += kLanes) {
      const V x = load_as(tag, raw + i);
      store_as(F32{}, k == 0 ? x : hn::Add(load_as(F32{}, sums + i), x), sums + i);
    }
  }
  float old[kStatLanes] = {};
  if (kAccumulate) std::memcpy(old, a.dst + begin, left * sizeof(float));
  const V scale = hn::Set(FloatTag(), a.scale);
  for (int u = 0; u < kStatLanes / kLanes; ++u) {
    V v = hn::Mul(load_as(F32{}, sums + u * kLanes), scale);
    if (kAccumulate) v = hn::Add(load_as(F32{}, old + u * kLanes), v);
    store_as(F32{}, v, sums + u * kLanes);
  }
  std::memcpy(a.dst + begin, sums, left * sizeof(float));
  if (kStats) {
    for (size_t i = left; i < kStatLanes; ++i) sums[i] = 0.0f;  // 0 * inf, if the scale is not finite
    for (int u = 0; u < kStatLanes / kLanes; ++u) squares.add(u, load_as(F32{}, sums + u * kLanes));
  }
}

// kSources: how many sources, 0 when only a.nsrc knows.
template <class T, int kSources, bool kAccumulate, bool kStats>
void reduce_loop(T tag, const ReduceArgs& a, double* lanes) {
  const V scale = hn::Set(FloatTag(), a.scale);
  const int nsrc = kSources != 0 ? kSources : a.nsrc;
  Squares squares;
  int64_t i = 0;
  for (; i + kStatLanes <= a.n; i += kStatLanes) {
    for (int u = 0; u < kStatLanes / kLanes; ++u) {
      const int64_t at = i + u * kLanes;
      V v = load_as(tag, source<T>(a, 0) + at);
      for (int k = 1; k < nsrc; ++k) v = hn::Add(v, load_as(tag, source<T>(a, k) + at));
      v = hn::Mul(v, scale);
      if (kAccumulate) v = hn::Add(load_as(F32{}, a.dst + at), v);
      store_as(F32{}, v, a.dst + at);
      if (kStats) squares.add(u, v);
    }
  }
  if (i < a.n) reduce_tail<T, kAccumulate, kStats>(tag, a, i, squares);
  if (kStats) squares.store(lanes);
}

template <class T, bool kAccumulate, bool kStats>
void reduce_sources(T tag, const ReduceArgs& a, double* lanes) {
  switch (a.nsrc) {
    case 1: return reduce_loop<T, 1, kAccumulate, kStats>(tag, a, lanes);
    case 2: return reduce_loop<T, 2, kAccumulate, kStats>(tag, a, lanes);
    default: return reduce_loop<T, 0, kAccumulate, kStats>(tag, a, lanes);
  }
}

// lanes: kStatLanes doubles to overwrite, or null when no statistics are wanted.
void ReduceSum(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n,
               double* lanes) {
  const ReduceArgs a{dst, src, nsrc, scale, n};
  dispatch_float(src_dt, "src", [&](auto tag) {
    using T = decltype(tag);
    if (accumulate) {
      lanes != nullptr ? reduce_sources<T, true, true>(tag, a, lanes) : reduce_sources<T, true, false>(tag, a, lanes);
    } else {
      lanes != nullptr ? reduce_sources<T, false, true>(tag, a, lanes) : reduce_sources<T, false, false>(tag, a, lanes);
    }
  });
}

template <class To, class From>
void copy_loop(To to, typename To::Raw* dst, From from, const typename From::Raw* src, float factor, int64_t n) {
  const V scale = hn::Set(FloatTag(), factor);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const V a = hn::Mul(load_as(from, src + i), scale);
    store_pair_as(to, a, hn::Mul(load_as(from, src + i + kLanes), scale), dst + i);
  }
  for (; i < n; ++i) dst[i] = To::store(From::load(src[i]) * factor);
}

void CopyScale(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n) {
  dispatch_float(dst_dt, "dst", [&](auto to) {
    dispatch_float(src_dt, "src", [&](auto from) {
      copy_loop(to, static_cast<typename decltype(to)::Raw*>(dst), from,
                static_cast<const typename decltype(from)::Raw*>(src), scale, n);
    });
  });
}

template <class T>
void square_loop(T tag, const typename T::Raw* x, int64_t n, double* lanes) {
  Squares squares;
  int64_t i = 0;
  for (; i + kStatLanes <= n; i += kStatLanes) {
    for (int u = 0; u < kStatLanes / kLanes; ++u) squares.add(u, load_as(tag, x + i + u * kLanes));
  }
  if (i < n) {
    typename T::Raw rest[kStatLanes] = {};
    std::memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(rest[0]));
    for (int u = 0; u < kStatLanes / kLanes; ++u) squares.add(u, load_as(tag, rest + u * kLanes));
  }
  squares.store(lanes);
}

void SumSquares(const void* x, DType dt, int64_t n, double* lanes) {
  dispatch_float(dt, "x", [&](auto tag) { square_loop(tag, static_cast<const typename decltype(tag)::Raw*>(x), n, lanes); });
}

// First index whose exponent bits are all ones, -1 if none.
template <class U>
int64_t find_exponent(const U* x, int64_t n, U ones) {
  const hn::ScalableTag<U> d;
  constexpr int64_t kVector = static_cast<int64_t>(hn::MaxLanes(hn::ScalableTag<U>()));
  const auto mask = hn::Set(d, ones);
  int64_t i = 0;
  for (; i + 4 * kVector <= n; i += 4 * kVector) {
    auto found = hn::Eq(hn::And(hn::LoadU(d, x + i), mask), mask);
    for (int64_t k = 1; k < 4; ++k) {
      found = hn::Or(found, hn::Eq(hn::And(hn::LoadU(d, x + i + k * kVector), mask), mask));
    }
    if (!hn::AllFalse(d, found)) break;
  }
  for (; i < n; ++i) {
    if ((x[i] & ones) == ones) return i;
  }
  return -1;
}

int64_t FirstNonfinite(const void* src, DType src_dt, int64_t n) {
  switch (src_dt) {
    case DType::F32: return find_exponent<uint32_t>(static_cast<const uint32_t*>(src), n, 0x7f800000u);
    case DType::BF16: return find_exponent<uint16_t>(static_cast<const uint16_t*>(src), n, uint16_t{0x7f80});
    case DType::F16: return find_exponent<uint16_t>(static_cast<const uint16_t*>(src), n, uint16_t{0x7c00});
    default: DS_FAIL_VALUE("src: dtype must be F32, F16 or BF16, not " << dtype_name(src_dt));
  }
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(ReduceSum);
HWY_EXPORT(CopyScale);
HWY_EXPORT(SumSquares);
HWY_EXPORT(FirstNonfinite);

void reduce_sum(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n,
                double* stats) {
  check_arrays(n, {{dst, "dst"}});
  DS_CHECK_VALUE(nsrc >= 1, "nsrc must be at least 1, got " << nsrc);
  for (int k = 0; k < nsrc; ++k) check_arrays(n, {{src[k], "src"}});
  double lanes[kStatLanes];
  HWY_DYNAMIC_DISPATCH(ReduceSum)(dst, src, nsrc, src_dt, scale, accumulate, n, stats != nullptr ? lanes : nullptr);
  if (stats != nullptr) finish_statistics(lanes, [&](int64_t i) { return dst[i]; }, n, stats);
}

void copy_scale(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n) {
  check_arrays(n, {{dst, "dst"}, {src, "src"}});
  if (dst_dt == src_dt && scale == 1.0f) {
    if (dst != src && n != 0) std::memcpy(dst, src, static_cast<size_t>(n) * dtype_size(src_dt));
    return;
  }
  HWY_DYNAMIC_DISPATCH(CopyScale)(dst, dst_dt, src, src_dt, scale, n);
}

void accumulate(float* dst, const void* src, DType src_dt, float scale, int64_t n) {
  reduce_sum(dst, &src, 1, src_dt, scale, true, n, nullptr);
}

int64_t first_nonfinite(const void* src, DType src_dt, int64_t n) {
  check_arrays(n, {{src, "src"}});
  return HWY_DYNAMIC_DISPATCH(FirstNonfinite)(src, src_dt, n);
}

void sum_squares(const void* x, DType dt, int64_t n, double* stats) {
  check_arrays(n, {{x, "x"}});
  double lanes[kStatLanes];
  HWY_DYNAMIC_DISPATCH(SumSquares)(x, dt, n, lanes);
  dispatch_float(dt, "x", [&](auto tag) {
    using T = decltype(tag);
    const auto* values = static_cast<const typename T::Raw*>(x);
    finish_statistics(lanes, [&](int64_t i) { return T::load(values[i]); }, n, stats);
  });
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
