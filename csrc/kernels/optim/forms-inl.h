// SPDX-License-Identifier: Apache-2.0
// The forms of forms.h in vectors: whole arrays to float32 and back. Included once per instruction set.
#if defined(DS_KERNELS_OPTIM_FORMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_OPTIM_FORMS_INL_H_
#undef DS_KERNELS_OPTIM_FORMS_INL_H_
#else
#define DS_KERNELS_OPTIM_FORMS_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "kernels/optim/forms.h"
#include "kernels/optim/stored.h"
#include "kernels/philox.h"
#include "kernels/simd_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

using Half = hn::Rebind<uint16_t, FloatTag>;
using SignedHalf = hn::Rebind<int16_t, FloatTag>;
using Bits = hn::Rebind<uint32_t, FloatTag>;
using Int = hn::Rebind<int32_t, FloatTag>;

// vector(i) for whole vectors, element(i) for the rest.
template <class Vector, class Element>
HWY_INLINE void each_vector(int64_t n, const Vector& vector, const Element& element) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vector(i);
  for (; i < n; ++i) element(i);
}

template <class T>
void widen_as(T tag, const typename T::Raw* from, float* to, int64_t n) {
  each_vector(n, [&](int64_t i) HWY_ATTR { store_as(F32{}, load_as(tag, from + i), to + i); }, [&](int64_t i) { to[i] = T::load(from[i]); });
}

template <class T>
void narrow_as(T tag, const float* from, typename T::Raw* to, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) store_pair_as(tag, load_as(F32{}, from + i), load_as(F32{}, from + i + kLanes), to + i);
  for (; i < n; ++i) to[i] = T::store(from[i]);
}

void widen_split(const uint16_t* weight, const uint16_t* low, float* to, int64_t n) {
  const auto vector = [&](int64_t i) HWY_ATTR {
    const auto high = hn::ShiftLeft<16>(hn::PromoteTo(Bits(), hn::LoadU(Half(), weight + i)));
    const auto rest = hn::PromoteTo(Int(), hn::BitCast(SignedHalf(), hn::LoadU(Half(), low + i)));
    const V joined = hn::BitCast(FloatTag(), hn::Add(high, hn::BitCast(Bits(), rest)));
    store_as(F32{}, hn::IfThenElse(hn::IsNaN(joined), hn::BitCast(FloatTag(), high), joined), to + i);
  };
  each_vector(n, vector, [&](int64_t i) { to[i] = join_split(weight[i], low[i]); });
}

void narrow_split(const float* from, uint16_t* weight, uint16_t* low, int64_t n) {
  const auto vector = [&](int64_t i) HWY_ATTR {
    const V x = load_as(F32{}, from + i);
    const auto u = hn::BitCast(Bits(), x);
    const auto nan = hn::RebindMask(Bits(), hn::IsNaN(x));
    const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::Set(Bits(), 0x8000u)));
    const auto quiet = hn::Or(hn::ShiftRight<16>(u), hn::Set(Bits(), 0x40u));
    store_low_halves(hn::IfThenElse(nan, quiet, rounded), weight + i);
    store_low_halves(hn::IfThenZeroElse(nan, hn::And(u, hn::Set(Bits(), 0xffffu))), low + i);
  };
  each_vector(n, vector, [&](int64_t i) {
    weight[i] = split_weight(from[i]);
    low[i] = split_low(from[i]);
  });
}

// bits: 16 random ones an element.
void narrow_with_dice(const float* from, const uint16_t* bits, uint16_t* to, int64_t n) {
  const auto vector = [&](int64_t i) HWY_ATTR {
    const V x = load_as(F32{}, from + i);
    const auto u = hn::BitCast(Bits(), x);
    const auto magnitude = hn::BitCast(Int(), hn::And(u, hn::Set(Bits(), 0x7fffffffu)));
    const auto infinity = hn::Set(Int(), static_cast<int32_t>(kInfinityBits));
    const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::PromoteTo(Bits(), hn::LoadU(Half(), bits + i))));
    const auto nan = hn::RebindMask(Bits(), hn::Gt(magnitude, infinity));
    const auto finite = hn::RebindMask(Bits(), hn::Lt(magnitude, infinity));
    const auto special = hn::Or(hn::ShiftRight<16>(u), hn::IfThenElseZero(nan, hn::Set(Bits(), 0x40u)));
    store_low_halves(hn::IfThenElse(finite, rounded, special), to + i);
  };
  each_vector(n, vector, [&](int64_t i) { to[i] = round_stochastically(from[i], bits[i]); });
}

void narrow_stochastically(const float* from, uint16_t* to, const Dice& dice, int64_t n) {
  constexpr int64_t kDraw = 512;  // elements at a time
  uint32_t words[kDraw / 2 + 4];
  uint16_t bits[kDraw];
  for (int64_t begin = 0; begin < n; begin += kDraw) {
    const int64_t count = std::min(kDraw, n - begin);
    const uint64_t element = dice.first + static_cast<uint64_t>(begin), aligned = element & ~uint64_t{7};  // philox_fill begins at fours of words
    const int64_t skip = static_cast<int64_t>(element - aligned);
    philox_fill(dice.seed, 4 * dice.draw, aligned / 2, (skip + count + 1) / 2, words);
    std::memcpy(bits, reinterpret_cast<const char*>(words) + 2 * skip, static_cast<size_t>(2 * count));  // little-endian, as every target is
    narrow_with_dice(from + begin, bits, to + begin, count);
  }
}

// ------------------------------------------------------------------------------------------------------ 8-bit codes

HWY_INLINE V decode(const int8_t* code, V scale) {
  const auto q = hn::PromoteTo(Int(), hn::LoadU(hn::Rebind<int8_t, FloatTag>(), code));
  return hn::Mul(hn::Mul(hn::ConvertTo(FloatTag(), hn::Mul(q, hn::Abs(q))), hn::Set(FloatTag(), kSignedUnit)), scale);
}
HWY_INLINE V decode(const uint8_t* code, V scale) {
  const auto q = hn::PromoteTo(Int(), hn::LoadU(hn::Rebind<uint8_t, FloatTag>(), code));
  const V t = hn::Mul(hn::ConvertTo(FloatTag(), hn::Add(q, hn::Set(Int(), 1))), hn::Set(FloatTag(), 0x1p-8f)), square = hn::Mul(t, t);
  return hn::Mul(hn::Mul(square, square), scale);
}
HWY_INLINE void encode(V x, V inverse, int8_t* code) {
  const V q = hn::Mul(hn::Sqrt(hn::Mul(hn::Abs(x), inverse)), hn::Set(FloatTag(), 127.0f));
  const hn::Rebind<int8_t, FloatTag> to;
  hn::StoreU(hn::DemoteTo(to, hn::NearestInt(hn::CopySign(q, x))), to, code);
}
HWY_INLINE void encode(V x, V inverse, uint8_t* code) {
  const V t = hn::Sqrt(hn::Sqrt(hn::Mul(x, inverse)));
  const auto q = hn::Sub(hn::NearestInt(hn::Mul(t, hn::Set(FloatTag(), 256.0f))), hn::Set(Int(), 1));
  const hn::Rebind<uint8_t, FloatTag> to;
  hn::StoreU(hn::DemoteTo(to, q), to, code);  // saturates at 0 and 255
}
inline float decode_one(int8_t code, float scale) { return decode_signed(code, scale); }
inline float decode_one(uint8_t code, float scale) { return decode_unsigned(code, scale); }
inline void encode_one(float x, float inverse, int8_t* code) { *code = encode_signed(x, inverse); }
inline void encode_one(float x, float inverse, uint8_t* code) { *code = encode_unsigned(x, inverse); }

template <class Code>
void decode_blocks(const Code* from, const float* scales, float* to, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += kCodeBlock) {
    const float scale = scales[begin / kCodeBlock];
    const V wide = hn::Set(FloatTag(), scale);
    each_vector(std::min(kCodeBlock, n - begin), [&](int64_t i) HWY_ATTR { store_as(F32{}, decode(from + begin + i, wide), to + begin + i); },
                [&](int64_t i) { to[begin + i] = decode_one(from[begin + i], scale); });
  }
}

HWY_INLINE uint32_t largest_magnitude(const float* x, int64_t n) {
  const auto magnitude = hn::Set(Int(), 0x7fffffff);
  auto largest = hn::Zero(Int());
  uint32_t rest = 0;
  each_vector(n, [&](int64_t i) HWY_ATTR { largest = hn::Max(largest, hn::And(hn::BitCast(Int(), load_as(F32{}, x + i)), magnitude)); },
              [&](int64_t i) { rest = std::max(rest, bits_of(x[i]) & 0x7fffffffu); });
  return std::max(rest, static_cast<uint32_t>(hn::GetLane(hn::MaxOfLanes(Int(), largest))));
}

template <class Code>
void encode_blocks(const float* from, Code* to, float* scales, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += kCodeBlock) {
    const int64_t count = std::min(kCodeBlock, n - begin);
    const float scale = code_scale(largest_magnitude(from + begin, count)), inverse = code_inverse(scale);
    scales[begin / kCodeBlock] = scale;
    if (inverse == 0.0f) {
      std::fill_n(to + begin, count, Code{0});
      continue;
    }
    const V wide = hn::Set(FloatTag(), inverse);
    each_vector(count, [&](int64_t i) HWY_ATTR { encode(load_as(F32{}, from + begin + i), wide, to + begin + i); },
                [&](int64_t i) { encode_one(from[begin + i], inverse, to + begin + i); });
  }
}

// ----------------------------------------------------------------------------------------------------- whole arrays

void Widen(const Stored& from, float* to, int64_t n) {
  switch (from.form) {
    case Form::F32: return widen_as(F32{}, static_cast<const float*>(from.data), to, n);
    case Form::F16: return widen_as(F16{}, static_cast<const uint16_t*>(from.data), to, n);
    case Form::BF16:
    case Form::Stochastic: return widen_as(BF16{}, static_cast<const uint16_t*>(from.data), to, n);
    case Form::Split: return widen_split(static_cast<const uint16_t*>(from.data), static_cast<const uint16_t*>(from.extra), to, n);
    case Form::Signed8: return decode_blocks(static_cast<const int8_t*>(from.data), static_cast<const float*>(from.extra), to, n);
    case Form::Unsigned8: return decode_blocks(static_cast<const uint8_t*>(from.data), static_cast<const float*>(from.extra), to, n);
  }
}

void Narrow(const float* from, const Stored& to, const Dice& dice, int64_t n) {
  switch (to.form) {
    case Form::F32: return narrow_as(F32{}, from, static_cast<float*>(to.data), n);
    case Form::F16: return narrow_as(F16{}, from, static_cast<uint16_t*>(to.data), n);
    case Form::BF16: return narrow_as(BF16{}, from, static_cast<uint16_t*>(to.data), n);
    case Form::Stochastic: return narrow_stochastically(from, static_cast<uint16_t*>(to.data), dice, n);
    case Form::Split: return narrow_split(from, static_cast<uint16_t*>(to.data), static_cast<uint16_t*>(to.extra), n);
    case Form::Signed8: return encode_blocks(from, static_cast<int8_t*>(to.data), static_cast<float*>(to.extra), n);
    case Form::Unsigned8: return encode_blocks(from, static_cast<uint8_t*>(to.data), static_cast<float*>(to.extra), n);
  }
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
