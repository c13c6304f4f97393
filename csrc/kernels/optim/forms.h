// SPDX-License-Identifier: Apache-2.0
// The forms in which an optimizer's float32 values lie in memory, one element at a time: shared by the reference, the vectors' tails and CUDA.
//
// Note [split master]. A float32 master value is its weight, a bfloat16, and 16 low bits, an int16: bits = (weight << 16) + low. The weight
// is the master rounded to nearest, ties away from zero: with ties to even, two masters would have the same 32 bits. So weight and master
// together take 4 bytes and nothing is lost; a NaN stays one, with another payload. Somebody may have written the weight since: any low bits
// give a value that rounds to it. Where they would make a NaN of one that is none (0 and negative low bits), the weight alone counts.
//
// Note [stochastic rounding]. A bfloat16 is the upper half of the float32 bits + r, with r uniform in [0, 2^16): the expected value is the
// float32 value (Gupta et al. 2015). r of element i is half i mod 2 of word i / 2 that philox.h gives to (seed, offset = 4 draw). A value beyond
// the largest bfloat16 may become infinite, as it may when rounded to nearest.
//
// Note [8-bit states]. Blockwise, after Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization): 256 elements, counted from where
// the slice begins, share a float32 scale, the largest magnitude among them, which is kept exactly. Their dynamic table is replaced by power laws,
// which need no search, with t the share of the scale: signed values (first moments) are t = sign(q) (q / 127)^2, unsigned ones (second moments)
// t = ((q + 1) / 256)^4. So sqrt(v) and m have the same law, and a second moment of a block with any gradient is never zero: the update m / sqrt(v)
// of an element whose moments are small beside its neighbours' stays bounded. Error: |m| within sqrt(|t|) / 127 + 1 / 64516 of the scale, v^(1/4)
// within 1 / 512 of the scale's (of 1 / 256 below the smallest code). A block below the smallest normal float becomes zeros, one with an inf or NaN
// all NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/optim/element.h"

namespace ds::kernels {

constexpr int64_t kCodeBlock = 256;            // elements that share a scale
constexpr float kSmallestScale = 0x1p-126f;    // the inverse of a smaller one may overflow
constexpr uint32_t kInfinityBits = 0x7f800000u, kNanBits = 0x7fc00000u;
constexpr float kSignedUnit = 1.0f / 16129.0f;  // 127^2
static_assert(16129.0f * kSignedUnit == 1.0f, "the largest code must decode to the scale itself");

inline int64_t code_blocks(int64_t n) { return n / kCodeBlock + (n % kCodeBlock != 0); }

DS_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof(u));
  return u;
}
DS_HD float of_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof(x));
  return x;
}
DS_HD bool bits_are_nan(uint32_t u) { return (u & 0x7fffffffu) > kInfinityBits; }

DS_HD float join_split(uint16_t weight, uint16_t low) {
  const uint32_t u = (uint32_t{weight} << 16) + static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(low)));
  return of_bits(bits_are_nan(u) ? uint32_t{weight} << 16 : u);
}
DS_HD uint16_t split_weight(float x) {
  const uint32_t u = bits_of(x);
  return static_cast<uint16_t>(bits_are_nan(u) ? (u >> 16) | 0x40u : (u + 0x8000u) >> 16);
}
DS_HD uint16_t split_low(float x) {
  const uint32_t u = bits_of(x);
  return static_cast<uint16_t>(bits_are_nan(u) ? 0u : u & 0xffffu);
}

// dice: 16 random bits.
DS_HD uint16_t round_stochastically(float x, uint32_t dice) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu;
  const uint32_t special = (u >> 16) | (magnitude > kInfinityBits ? 0x40u : 0u);
  return static_cast<uint16_t>(magnitude >= kInfinityBits ? special : (u + dice) >> 16);
}

DS_HD float to_nearest(float x) {
#ifdef __CUDA_ARCH__
  return rintf(x);
#else
  return std::nearbyint(x);
#endif
}

// The scale of a block whose largest bits without sign are `magnitude`.
DS_HD float code_scale(uint32_t magnitude) {
  if (magnitude >= kInfinityBits) return of_bits(kNanBits);
  const float scale = of_bits(magnitude);
  return scale < kSmallestScale ? 0.0f : scale;
}
// What values are multiplied with before they are coded; 0 if all codes are 0.
DS_HD float code_inverse(float scale) { return scale > 0.0f ? div(1.0f, scale) : 0.0f; }

DS_HD float decode_signed(int8_t code, float scale) {
  const int q = code;
  return mul(mul(static_cast<float>(q * (q < 0 ? -q : q)), kSignedUnit), scale);
}
DS_HD int8_t encode_signed(float x, float inverse) {
  if (inverse == 0.0f) return 0;
  const float q = to_nearest(mul(root(mul(x < 0.0f ? -x : x, inverse)), 127.0f));
  return static_cast<int8_t>(x < 0.0f ? -q : q);
}
DS_HD float decode_unsigned(uint8_t code, float scale) {
  const float t = mul(static_cast<float>(code + 1), 0x1p-8f), square = mul(t, t);
  return mul(mul(square, square), scale);
}
DS_HD uint8_t encode_unsigned(float x, float inverse) {
  if (inverse == 0.0f) return 0;
  const float q = to_nearest(mul(root(root(mul(x, inverse))), 256.0f)) - 1.0f;
  return static_cast<uint8_t>(q < 0.0f ? 0.0f : q > 255.0f ? 255.0f : q);
}

}  // namespace ds::kernels
