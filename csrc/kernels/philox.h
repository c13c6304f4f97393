// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10, the counter-based random generator of dropout and stochastic rounding: Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011. A pure function of (seed, counter): no state, any element's bits from any thread, any device.
//
// Note [random bits of an element]. A random operation over an array gets a `seed` and an `offset` (from torch's generator of the device, an
// offset counting 32-bit words as cuRAND's does, a multiple of 4). Element i of the flat array owns word i mod 4 of
//     philox(seed, {low = offset / 4, high = i / 4})
// which is what cuRAND's thread i / 4 would draw, so one call uses up an offset of 4. It is the same on the CPU, on a GPU and in the
// reference, whatever the number of threads. An operation that needs more words for each element uses offset + 4, + 8, ... and says so to the
// generator.
#pragma once

#include <cstdint>

#include "base/error.h"

#ifdef __CUDACC__
#define DS_PHILOX_FN __host__ __device__ __forceinline__
#else
#define DS_PHILOX_FN inline
#endif

namespace ds::kernels {

struct UInt32x4 {
  uint32_t word[4];
};

struct PhiloxCounter {
  uint64_t low, high;  // words 0 and 1, 2 and 3 of the published algorithm
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;  // what the key grows by in a round
constexpr int kPhiloxRounds = 10;

DS_PHILOX_FN UInt32x4 philox(uint64_t seed, PhiloxCounter counter) {
  uint32_t c0 = static_cast<uint32_t>(counter.low), c1 = static_cast<uint32_t>(counter.low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter.high), c3 = static_cast<uint32_t>(counter.high >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0;
    const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The words of elements 4 * group .. 4 * group + 3 (see the Note).
DS_PHILOX_FN UInt32x4 philox_group(uint64_t seed, uint64_t offset, uint64_t group) { return philox(seed, {offset / 4, group}); }

// The word of one element.
DS_PHILOX_FN uint32_t philox_element(uint64_t seed, uint64_t offset, uint64_t element) {
  return philox_group(seed, offset, element / 4).word[element % 4];
}

// out[0..n) = the words of elements first .. first + n - 1, by SIMD; `first` is a multiple of 4, n any. Meant to be called for blocks that
// stay in the first-level cache (1024 words). philox_simd-inl.h has the same as vectors.
void philox_fill(uint64_t seed, uint64_t offset, uint64_t first, int64_t n, uint32_t* out);
void philox_fill_ref(uint64_t seed, uint64_t offset, uint64_t first, int64_t n, uint32_t* out);

// Note [keeping with a probability]. The top 24 bits of a word are a uniform integer below 2^24; an event of probability p happens when it is
// below round(p * 2^24). So p = 0 is never and p = 1 always, exactly.
inline int32_t philox_threshold(double p) {
  DS_CHECK_VALUE(p >= 0.0 && p <= 1.0, "p: a probability lies in [0, 1], got " << p);
  return static_cast<int32_t>(p * 16777216.0 + 0.5);
}
DS_PHILOX_FN bool philox_below(uint32_t word, int32_t threshold) { return static_cast<int32_t>(word >> 8) < threshold; }

}  // namespace ds::kernels

#undef DS_PHILOX_FN
