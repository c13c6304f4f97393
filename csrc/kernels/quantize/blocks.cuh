// SPDX-License-Identifier: Apache-2.0
// What the CUDA twins of quantize.h share. A team of 1 to 32 lanes of a warp, or all threads, has a block of the array; a thread takes units of
// 8 consecutive elements of it, whose codes are whole bytes. write_kernel reads a block twice, the second time from cache, unless each thread
// has one unit.
#pragma once

#include "kernels/launch.cuh"
#include "kernels/philox.h"
#include "kernels/quantize/check.h"
#include "kernels/quantize/codes.h"

namespace ds::kernels::quant {

using namespace cuda;

constexpr int kUnit = 8;
constexpr int kMaxGrid = 1 << 18;
constexpr int kMinBlocks = 3;  // a multiprocessor's, at least: left alone, the compiler spills to make room for more

// ---- units of codes ------------------------------------------------------------------------------------------------

// Up to 96 bits, least significant first.
struct Packed {
  uint32_t word[3];
};

template <int kBits>
__device__ __forceinline__ Packed pack(const uint32_t (&codes)[kUnit]) {
  Packed p{};
#pragma unroll
  for (int k = 0; k < kUnit; ++k) {
    constexpr int kWord = 32;
    const int at = k * kBits;
    p.word[at / kWord] |= codes[k] << (at % kWord);
    if (at % kWord + kBits > kWord) p.word[at / kWord + 1] |= codes[k] >> (kWord - at % kWord);
  }
  return p;
}
template <int kBits>
__device__ __forceinline__ uint32_t code_of(const Packed& p, int k) {
  const int at = k * kBits;
  uint32_t code = p.word[at / 32] >> (at % 32);
  if (at % 32 + kBits > 32) code |= p.word[at / 32 + 1] << (32 - at % 32);
  return code & ((1u << kBits) - 1u);
}

// `whole`: 8 codes at an address that is a multiple of as many bytes as words of 2, 4 or 8 bytes need (see is_whole).
template <int kBits>
__device__ __forceinline__ void store_packed(const Packed& p, uint8_t* data, int count, bool whole) {
  if (whole) {
    if constexpr (kBits == 8) *reinterpret_cast<uint2*>(data) = make_uint2(p.word[0], p.word[1]);
    if constexpr (kBits == 4) *reinterpret_cast<uint32_t*>(data) = p.word[0];
    if constexpr (kBits == 6) {
      auto* halves = reinterpret_cast<uint16_t*>(data);
      halves[0] = static_cast<uint16_t>(p.word[0]);
      halves[1] = static_cast<uint16_t>(p.word[0] >> 16);
      halves[2] = static_cast<uint16_t>(p.word[1]);
    }
    if constexpr (kBits == 12) {
      auto* words = reinterpret_cast<uint32_t*>(data);
#pragma unroll
      for (int k = 0; k < 3; ++k) words[k] = p.word[k];
    }
    return;
  }
  const int bytes = (count * kBits + 7) / 8;
#pragma unroll
  for (int k = 0; k < kBits; ++k) {
    if (k < bytes) data[k] = static_cast<uint8_t>(p.word[k / 4] >> (k % 4 * 8));
  }
}
template <int kBits>
__device__ __forceinline__ Packed load_packed(const uint8_t* data, int count, bool whole) {
  Packed p{};
  if (whole) {
    if constexpr (kBits == 8) {
      const uint2 words = *reinterpret_cast<const uint2*>(data);
      p.word[0] = words.x;
      p.word[1] = words.y;
    }
    if constexpr (kBits == 4) p.word[0] = *reinterpret_cast<const uint32_t*>(data);
    if constexpr (kBits == 6) {
      const auto* halves = reinterpret_cast<const uint16_t*>(data);
      p.word[0] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
      p.word[1] = halves[2];
    }
    if constexpr (kBits == 12) {
      const auto* words = reinterpret_cast<const uint32_t*>(data);
#pragma unroll
      for (int k = 0; k < 3; ++k) p.word[k] = words[k];
    }
    return p;
  }
  const int bytes = (count * kBits + 7) / 8;
#pragma unroll
  for (int k = 0; k < kBits; ++k) {
    if (k < bytes) p.word[k / 4] |= static_cast<uint32_t>(data[k]) << (k % 4 * 8);
  }
  return p;
}

// ---- units of values -----------------------------------------------------------------------------------------------

// Elements [i, i + count) of the array, of block b, from its element j on. `whole`: 8 elements at multiples of 8.
struct Unit {
  int64_t b, j, i;
  int count;
  bool whole;
  __device__ __forceinline__ Group half(int h, bool is_aligned) const {
    const int left = count - h * kPerThread;
    return {i + h * kPerThread, left < 0 ? 0 : left < kPerThread ? left : kPerThread, whole && is_aligned};
  }
};

template <class T>
__device__ __forceinline__ void load_unit(const typename T::Raw* p, const Unit& u, bool is_aligned, float (&v)[kUnit]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x[kPerThread];
    load(T{}, p, u.half(h, is_aligned), x);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) v[h * kPerThread + k] = x[k];
  }
}
template <class T>
__device__ __forceinline__ void store_unit(const float (&v)[kUnit], typename T::Raw* p, const Unit& u, bool is_aligned) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) x[k] = v[h * kPerThread + k];
    store(T{}, x, p, u.half(h, is_aligned));
  }
}

// The same for a dtype that only the run knows: F32, BF16 or F16.
__device__ __forceinline__ void load_unit(const void* p, DType dt, const Unit& u, bool is_aligned, float (&v)[kUnit]) {
  if (dt == DType::F32) load_unit<F32>(static_cast<const float*>(p), u, is_aligned, v);
  else if (dt == DType::BF16) load_unit<BF16>(static_cast<const uint16_t*>(p), u, is_aligned, v);
  else load_unit<F16>(static_cast<const uint16_t*>(p), u, is_aligned, v);
}
__device__ __forceinline__ void store_unit(const float (&v)[kUnit], void* p, DType dt, const Unit& u, bool is_aligned) {
  if (dt == DType::F32) store_unit<F32>(v, static_cast<float*>(p), u, is_aligned);
  else if (dt == DType::BF16) store_unit<BF16>(v, static_cast<uint16_t*>(p), u, is_aligned);
  else store_unit<F16>(v, static_cast<uint16_t*>(p), u, is_aligned);
}

// The random words of a unit. Groups of four elements begin at multiples of four, a unit need not.
__device__ __forceinline__ void draw(const Rounding& r, int64_t i, uint32_t (&words)[kUnit]) {
  const uint64_t group = static_cast<uint64_t>(i) / 4;
  const int skip = static_cast<int>(i % 4);
  UInt32x4 from = philox_group(r.seed, r.offset, group);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const UInt32x4 next = h == 0 || skip != 0 ? philox_group(r.seed, r.offset, group + h + 1) : from;
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // words skip + k of the eight in (from, next), without an index that is not constant
      uint32_t w = from.word[k];
#pragma unroll
      for (int s = 1; s < 4; ++s) {
        if (skip == s) w = k + s < 4 ? from.word[(k + s) % 4] : next.word[(k + s) % 4];
      }
      words[h * 4 + k] = w;
    }
    from = next;
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t n, blocks, group_size;
  int team;  // threads for a block: 1, 2, 4, ... 32 or kThreads
};

struct Target {
  Quantized out;  // data may be null
  int64_t block_bytes;
  Rounding rounding;
  float* residual;
  void* fake;
  DType fake_dt;
  bool is_aligned, codes_aligned;
};

// Smallest low and largest high of the team, in all its threads. Call from every thread.
__device__ __forceinline__ void join_team(int team, int32_t& low, int32_t& high) {
  for (int apart = min(team, 32) / 2; apart > 0; apart /= 2) {
    low = min(low, __shfl_xor_sync(0xffffffffu, low, apart));
    high = max(high, __shfl_xor_sync(0xffffffffu, high, apart));
  }
  if (team <= 32) return;
  __shared__ int32_t lows[kThreads / 32], highs[kThreads / 32];
  __syncthreads();  // the arrays may still be read by the previous call
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = low;
    highs[threadIdx.x / 32] = high;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    low = min(low, lows[w]);
    high = max(high, highs[w]);
  }
}

// A team's way through the array. Every thread of a CUDA block makes the same number of turns; a team without a block has `length` 0.
struct Turn {
  int64_t b, begin, length;
  int rank;  // of the thread in its team

  __device__ __forceinline__ Turn(const Shape& s, int64_t base) {
    b = base + static_cast<int>(threadIdx.x) / s.team;
    rank = static_cast<int>(threadIdx.x) % s.team;
    begin = b < s.blocks ? b * s.group_size : 0;
    const int64_t left = s.n - begin;
    length = b >= s.blocks ? 0 : left < s.group_size ? left : s.group_size;
  }
  __device__ __forceinline__ Unit unit(const Shape& s, int64_t j) const {
    const int64_t left = length - j;
    const int count = left < kUnit ? static_cast<int>(left) : kUnit;
    return {b, j, begin + j, count, count == kUnit && s.group_size % kUnit == 0};
  }
};

template <class C>
__device__ __forceinline__ void see(const float (&v)[kUnit], int count, int32_t& low, int32_t& high) {
#pragma unroll
  for (int k = 0; k < kUnit; ++k) {
    if (k >= count) continue;
    const int32_t bits = bits_of(v[k]);
    if (C::kSymmetric) {
      high = max(high, bits & kMagnitude);
    } else {
      low = min(low, ordered(bits));
      high = max(high, ordered(bits));
    }
  }
}

// Codes of a unit, and what is made of them.
template <class C, bool kStochastic>
__device__ __forceinline__ void write_unit(const float (&v)[kUnit], const Unit& u, const Scale& s, const Target& t) {
  uint32_t words[kUnit] = {}, codes[kUnit];
  if (kStochastic) draw(t.rounding, u.i, words);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) codes[k] = s.finite && k < u.count ? encode<C, kStochastic>(v[k], s, words[k]) : 0;
  if (t.out.data != nullptr) {
    uint8_t* data = t.out.data + u.b * t.block_bytes + u.j / kUnit * C::kBits;
    store_packed<C::kBits>(pack<C::kBits>(codes), data, u.count, u.whole && t.codes_aligned);
  }
  if (t.residual == nullptr && t.fake == nullptr) return;
  float back[kUnit];
#pragma unroll
  for (int k = 0; k < kUnit; ++k) back[k] = decode<C>(codes[k], s.scale, s.zero);
  if (t.fake != nullptr) store_unit(back, t.fake, t.fake_dt, u, t.is_aligned);
  if (t.residual == nullptr) return;
#pragma unroll
  for (int k = 0; k < kUnit; ++k) back[k] = s.finite ? add(v[k], -back[k]) : 0.0f;
  store_unit<F32>(back, t.residual, u, t.is_aligned);
}

template <class C, bool kStochastic, class Source>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    write_kernel(const __grid_constant__ Source source, const Shape shape, const Target target) {
  const int per_block = kThreads / shape.team;
  const int64_t step = int64_t{shape.team} * kUnit;
  for (int64_t base = int64_t{blockIdx.x} * per_block; base < shape.blocks; base += int64_t{gridDim.x} * per_block) {
    const Turn turn(shape, base);
    int32_t low = INT32_MAX, high = INT32_MIN;
    Scale s{};
    float v[kUnit];
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {  // the block's extent, then its codes
#pragma unroll 1
      for (int64_t j = int64_t{turn.rank} * kUnit; j < turn.length; j += step) {
        const Unit u = turn.unit(shape, j);
        if (pass == 0 || turn.length > step) source.read(u, pass == 0, v);
        if (pass == 0) see<C>(v, u.count, low, high);
        else write_unit<C, kStochastic>(v, u, s, target);
      }
      if (pass == 1) break;
      join_team(shape.team, low, high);
      s = C::kSymmetric ? scale_of(high, C::kLargest) : scale_between(low, high, C::kLargest);
      if (turn.rank == 0 && turn.length > 0 && target.out.scale != nullptr) {
        target.out.scale[turn.b] = s.scale;
        if (!C::kSymmetric) target.out.zero[turn.b] = s.zero;
      }
    }
  }
}

// ---- launching -----------------------------------------------------------------------------------------------------

inline Shape shape_of(const Blocks& b, int64_t n) {
  int team = 1;
  while (team < 32 && int64_t{team} * kUnit < b.group_size) team *= 2;
  if (b.group_size > int64_t{4} * 32 * kUnit) team = kThreads;
  return {n, quant_blocks(n, b.group_size), b.group_size, team};
}

inline int64_t grid_for(const Shape& s) {
  const int64_t per_block = kThreads / s.team;
  return std::min<int64_t>(kMaxGrid, s.blocks / per_block + (s.blocks % per_block != 0));
}

template <class Source>
void write(const char* name, QuantFormat format, bool symmetric, const Source& source, const Shape& shape, const Target& target,
           cudaStream_t stream) {
  dispatch_codes(format, symmetric, [&](auto codes) {
    using C = decltype(codes);
    auto* kernel = target.rounding.stochastic ? write_kernel<C, true, Source> : write_kernel<C, false, Source>;
    launch(name, kernel, grid_for(shape), stream, source, shape, target);
  });
}

}  // namespace ds::kernels::quant
