// SPDX-License-Identifier: Apache-2.0
// Passes over one row of logits: its maximum, the exponentials and their sum. Shared by softmax and cross-entropy. Included once per
// instruction set, after hwy/highway.h and kernels/exact_fp.h: scale * x must be rounded before the maximum is taken from it, or the
// difference of two large numbers would not be 0 where they are equal.
#if defined(DS_KERNELS_SOFTMAX_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_SOFTMAX_ROWS_INL_H_
#undef DS_KERNELS_SOFTMAX_ROWS_INL_H_
#else
#define DS_KERNELS_SOFTMAX_ROWS_INL_H_
#endif

#include <cstring>
#include <limits>

#include "kernels/simd_exp-inl.h"
#include "kernels/simd_stream-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;

// The first `count` < kLanes elements from p, then zeros; and the other way.
template <class T>
HWY_INLINE V load_tail(T tag, const typename T::Raw* p, int64_t count) {
  typename T::Raw raw[kLanes] = {};
  std::memcpy(raw, p, static_cast<size_t>(count) * sizeof(raw[0]));
  return load_as(tag, raw);
}
template <class T>
HWY_INLINE void store_tail(T tag, V v, typename T::Raw* p, int64_t count) {
  typename T::Raw raw[kLanes];
  store_as(tag, v, raw);
  std::memcpy(p, raw, static_cast<size_t>(count) * sizeof(raw[0]));
}

// Note [two at a time]: 2 * kLanes elements as two vectors, in whatever order is cheapest; store_two puts them back where load_two found
// them. bfloat16: the odd elements are the upper halves of 32-bit words as they lie there, the even ones are one shift away, so that no
// bytes travel between lanes. kNumbers: there are no NaNs. kPast: past the caches, see output.h; p is streamable.
template <class T>
HWY_INLINE void load_two(T tag, const typename T::Raw* p, V& a, V& b) {
  a = load_as(tag, p);
  b = load_as(tag, p + kLanes);
}
template <bool kNumbers = false, bool kPast = false, class T>
HWY_INLINE void store_two(T tag, V a, V b, typename T::Raw* p) {
  if constexpr (kPast) return stream_pair_as(tag, a, b, p);
  store_as(tag, a, p);
  store_as(tag, b, p + kLanes);
}
#if HWY_TARGET != HWY_SCALAR && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
HWY_INLINE void load_two(BF16, const uint16_t* p, V& a, V& b) {
  const hn::Rebind<uint32_t, FloatTag> du32;
  const hn::Repartition<uint16_t, decltype(du32)> du16;
  const auto words = hn::BitCast(du32, hn::LoadU(du16, p));
  a = hn::BitCast(FloatTag(), hn::ShiftLeft<16>(words));
  b = hn::BitCast(FloatTag(), hn::And(words, hn::Set(du32, 0xffff0000u)));
}
template <bool kNumbers>
HWY_INLINE auto two_in_words(V a, V b) {
  const FloatTag df;
  const hn::Rebind<uint32_t, FloatTag> du32;
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  // All elements are rounded at once, as 16-bit words: what is cut off carries where it is more than half, or just half below an odd word.
  if (kNumbers || HWY_LIKELY(_mm512_cmp_ps_mask(a.raw, b.raw, _CMP_UNORD_Q) == 0)) {
    const auto low = hn::BitCast(du32, a), high = hn::BitCast(du32, b);
    const __m512i kept = hn::OrAnd(hn::ShiftRight<16>(low), high, hn::Set(du32, 0xffff0000u)).raw;
    const __m512i cut = hn::OrAnd(hn::ShiftLeft<16>(high), low, hn::Set(du32, 0xffffu)).raw;
    const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(INT16_MIN);
    const __mmask32 carries = _mm512_cmpgt_epu16_mask(_mm512_adds_epu16(cut, _mm512_and_si512(kept, one)), half);
    return hn::Vec<hn::ScalableTag<uint16_t>>{_mm512_mask_add_epi16(kept, carries, kept, one)};
  }
#endif
  const auto round = [&](V v) HWY_ATTR {
    const auto u = hn::BitCast(du32, v);
    return hn::Add(hn::Add(u, hn::Set(du32, 0x7fff)), hn::And(hn::ShiftRight<16>(u), hn::Set(du32, 1)));
  };
  auto even = hn::ShiftRight<16>(round(a)), odd = hn::And(round(b), hn::Set(du32, 0xffff0000u));
  if (!kNumbers && HWY_UNLIKELY(!hn::AllFalse(df, hn::IsNaN(hn::Add(a, b))))) {  // rounding would damage a NaN
    const auto quiet = [&](V v) HWY_ATTR { return hn::Or(hn::BitCast(du32, v), hn::Set(du32, 0x400000)); };
    even = hn::IfThenElse(hn::RebindMask(du32, hn::IsNaN(a)), hn::ShiftRight<16>(quiet(a)), even);
    odd = hn::IfThenElse(hn::RebindMask(du32, hn::IsNaN(b)), hn::And(quiet(b), hn::Set(du32, 0xffff0000u)), odd);
  }
  return hn::BitCast(hn::Repartition<uint16_t, decltype(du32)>(), hn::Or(even, odd));
}
template <bool kNumbers = false, bool kPast = false>
HWY_INLINE void store_two(BF16, V a, V b, uint16_t* p) {
  const auto words = two_in_words<kNumbers>(a, b);
  if constexpr (kPast) hn::Stream(words, hn::ScalableTag<uint16_t>(), p);
  else hn::StoreU(words, hn::ScalableTag<uint16_t>(), p);
}
#endif

HWY_INLINE V minus_infinity() { return hn::Set(FloatTag(), -std::numeric_limits<float>::infinity()); }

// z with -inf where the boolean mask is not 0.
HWY_INLINE V hide(V z, const uint8_t* mask) {
  const hn::Rebind<uint8_t, FloatTag> du8;
  const hn::Rebind<uint32_t, FloatTag> du32;
  const auto hidden = hn::Ne(hn::PromoteTo(du32, hn::LoadU(du8, mask)), hn::Zero(du32));
  return hn::IfThenElse(hn::RebindMask(FloatTag(), hidden), minus_infinity(), z);
}

struct Bool {
  using Raw = uint8_t;
};

// A row of logits, z = scale * x + mask, read a vector at a time; the last one is padded with -inf, of which every exponential is 0.
template <class T, class M>
struct Logits {
  const typename T::Raw* x;
  const typename M::Raw* mask;
  float scale;

  HWY_INLINE V at(int64_t i) const {
    const V z = hn::Mul(load_as(T{}, x + i), hn::Set(FloatTag(), scale));
    if constexpr (std::is_same_v<M, None>) return z;
    else if constexpr (std::is_same_v<M, Bool>) return hide(z, mask + i);
    else return hn::Add(z, load_as(M{}, mask + i));
  }
  HWY_INLINE V tail(int64_t i, int64_t count) const {
    V z = hn::Mul(load_tail(T{}, x + i, count), hn::Set(FloatTag(), scale));
    if constexpr (std::is_same_v<M, Bool>) {
      uint8_t hidden[kLanes] = {};
      std::memcpy(hidden, mask + i, static_cast<size_t>(count));
      z = hide(z, hidden);
    } else if constexpr (!std::is_same_v<M, None>) {
      z = hn::Add(z, load_tail(M{}, mask + i, count));
    }
    return hn::IfThenElse(hn::FirstN(FloatTag(), static_cast<size_t>(count)), z, minus_infinity());
  }
};
template <class T>
HWY_INLINE Logits<T, None> plain(const typename T::Raw* x, float scale = 1.0f) {
  return {x, nullptr, scale};
}

HWY_INLINE float largest_lane(V v) { return hn::GetLane(hn::MaxOfLanes(FloatTag(), v)); }
HWY_INLINE float sum_lanes(V v) { return hn::GetLane(hn::SumOfLanes(FloatTag(), v)); }

// The largest of n logits, -inf if there are none; kStore: writes them to z, which may be where they are read from. NaNs may be
// overlooked here: they come out of the sum of exponentials.
template <bool kStore, class R>
HWY_INLINE float largest_logit(const R& row, int64_t n, float* z) {
  V top[kUnroll] = {minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity()};
  const auto take = [&](int u, int64_t i) HWY_ATTR {
    const V v = row.at(i);
    top[u] = hn::Max(top[u], v);
    if (kStore) store_as(F32{}, v, z + i);
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) take(u, i + u * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) take(0, i);
  if (i < n) {
    const V v = row.tail(i, n - i);
    top[1] = hn::Max(top[1], v);
    if (kStore) store_tail(F32{}, v, z + i, n - i);
  }
  return largest_lane(hn::Max(hn::Max(top[0], top[1]), hn::Max(top[2], top[3])));
}

// What to subtract from the logits: the largest, or 0 if all are -inf: then the exponentials and their sum are 0, unless there is a NaN,
// which the sum shows.
HWY_INLINE float shift_of(float largest) { return largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest; }

// The sum of exp(z - largest) over n logits; kStore: writes the exponentials to e, which may be where the logits are read from.
template <bool kExact, bool kStore, class R>
HWY_INLINE float sum_exponentials(const R& row, float largest, int64_t n, float* e) {
  const FloatTag df;
  const V zero = hn::Zero(df), top = hn::Set(df, largest);
  V sum[kUnroll] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) {
      const V v = exp_nonpositive<kExact>(hn::Sub(row.at(i + u * kLanes), top));
      sum[u] = hn::Add(sum[u], v);
      if (kStore) store_as(F32{}, v, e + i + u * kLanes);
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    const V v = exp_nonpositive<kExact>(hn::Sub(row.at(i), top));
    sum[0] = hn::Add(sum[0], v);
    if (kStore) store_as(F32{}, v, e + i);
  }
  if (i < n) {
    const V v = exp_nonpositive<kExact>(hn::Sub(row.tail(i, n - i), top));
    sum[1] = hn::Add(sum[1], v);
    if (kStore) store_tail(F32{}, v, e + i, n - i);
  }
  return sum_lanes(hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3])));
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
