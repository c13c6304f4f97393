// SPDX-License-Identifier: Apache-2.0
// Tiles of at most kTile elements pass through the first-level cache: float32 values, codes, packed bytes. Blocks shorter than a tile share
// one; a longer block is gone over twice, once for its scale.
#include "kernels/exact_fp.h"
#include "kernels/simd_targets.h"

#include <algorithm>
#include <cstring>

#include "kernels/philox.h"
#include "kernels/quantize/check.h"
#include "kernels/reduce/reduce.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantize/quantize_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/quantize/codes_simd-inl.h"
#include "kernels/quantize/pack_simd-inl.h"

#ifndef DS_KERNELS_QUANTIZE_ONCE
#define DS_KERNELS_QUANTIZE_ONCE
namespace ds::kernels {

constexpr int64_t kTile = 2048;  // elements; a multiple of 8, so that a part of a block begins at a whole byte

// Where float32 values come from: x (+ residual), or the sum of quantised arrays, which also goes to `out`.
struct QuantSource {
  const void* x = nullptr;
  DType x_dt = DType::F32;
  const float* residual = nullptr;

  Blocks blocks{};
  const ConstQuantized* src = nullptr;
  int nsrc = 0;
  float factor = 1.0f;
  void* out = nullptr;
  DType out_dt = DType::F32;
};

// Where quantised blocks go: any of out.data (with its scales), residual, fake.
struct QuantTarget {
  Blocks blocks;
  Rounding rounding;
  Quantized out;
  float* residual = nullptr;
  void* fake = nullptr;
  DType fake_dt = DType::F32;
};

struct QuantRange {
  int64_t n, first, last;
};

inline void* element(void* p, DType dt, int64_t i) { return static_cast<uint8_t*>(p) + i * static_cast<int64_t>(dtype_size(dt)); }
inline const void* element(const void* p, DType dt, int64_t i) {
  return static_cast<const uint8_t*>(p) + i * static_cast<int64_t>(dtype_size(dt));
}

}  // namespace ds::kernels
#endif

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

// out = or += the values of elements [begin, begin + count) of one array: whole blocks, or a part of one block.
template <class C, bool kAdd>
HWY_NOINLINE void decode_tile(const Blocks& blocks, const ConstQuantized& src, int64_t begin, int64_t count, float* out) {
  using Code = typename C::Code;
  const int64_t g = blocks.group_size, bytes = quant_block_bytes(blocks.format, g);
  int64_t b = begin / g, inside = begin % g;
  const uint8_t* data = src.data + b * bytes + inside / 8 * C::kBits;
  const bool seamless = g % 8 == 0;  // no bits between blocks
  alignas(64) Code tile[C::kBits == 8 ? 1 : kTile];
  if constexpr (C::kBits != 8) {
    if (seamless) Packing<C::kBits>::unpack(data, count, tile);
  }
  for (int64_t i = 0, left = g - inside; i < count; ++b, left = g) {
    const int64_t length = std::min(left, count - i);
    const Code* codes = tile;
    if constexpr (C::kBits == 8) {
      codes = data + i;
    } else {
      if (seamless) codes = tile + i;
      else Packing<C::kBits>::unpack(data, length, tile);
    }
    decode_block<C, kAdd>(codes, length, src.scale[b], C::kSymmetric ? 0.0f : src.zero[b], out + i);
    i += length;
    if (C::kBits != 8) data += seamless ? 0 : bytes;
  }
}

// Elements [begin, begin + count), in `buffer` or where they are. `write`: the sum goes to its output too.
HWY_NOINLINE const float* fetch(const QuantSource& s, int64_t begin, int64_t count, float* buffer, bool write) {
  if (s.nsrc == 0) {
    const void* x = element(s.x, s.x_dt, begin);
    if (s.x_dt == DType::F32 && s.residual == nullptr) return static_cast<const float*>(x);
    copy_scale(buffer, DType::F32, x, s.x_dt, 1.0f, count);
    if (s.residual != nullptr) accumulate(buffer, s.residual + begin, DType::F32, 1.0f, count);
    return buffer;
  }
  const bool wanted = write && s.out != nullptr;
  float* sum = wanted && s.out_dt == DType::F32 ? static_cast<float*>(s.out) + begin : buffer;
  quant::dispatch_codes(s.blocks.format, s.blocks.symmetric, [&](auto codes) {
    using C = decltype(codes);
    decode_tile<C, false>(s.blocks, s.src[0], begin, count, sum);
    for (int k = 1; k < s.nsrc; ++k) decode_tile<C, true>(s.blocks, s.src[k], begin, count, sum);
  });
  if (s.factor != 1.0f) copy_scale(sum, DType::F32, sum, DType::F32, s.factor, count);
  if (wanted && s.out_dt != DType::F32) copy_scale(element(s.out, s.out_dt, begin), s.out_dt, sum, DType::F32, 1.0f, count);
  return sum;
}

// residual = v - back, or zero.
HWY_NOINLINE void keep_residual(const float* v, const float* back, bool finite, int64_t n, float* residual) {
  int64_t i = 0;
  for (; finite && i + kLanes <= n; i += kLanes) {
    store_as(F32{}, hn::Sub(load_as(F32{}, v + i), load_as(F32{}, back + i)), residual + i);
  }
  for (; i < n; ++i) residual[i] = finite ? v[i] - back[i] : 0.0f;
}

template <class C, bool kStochastic>
class BlockWriter {
  using Code = typename C::Code;

 public:
  BlockWriter(const QuantSource& source, const QuantTarget& target, const QuantRange& range)
      : source_(source), target_(target), range_(range), bytes_(quant_block_bytes(target.blocks.format, target.blocks.group_size)) {}

  void run() {
    const int64_t g = target_.blocks.group_size;
    const int64_t together = std::max<int64_t>(1, kTile / g);
    for (int64_t b = range_.first; b < range_.last; b += together) {
      if (g > kTile) long_block(b);
      else short_blocks(b, std::min(together, range_.last - b));
    }
  }

 private:
  void short_blocks(int64_t b, int64_t blocks) {
    const int64_t g = target_.blocks.group_size, begin = b * g, count = std::min(blocks * g, range_.n - begin);
    const float* v = fetch(source_, begin, count, values_, true);
    const uint32_t* words = draw(begin, count);
    const bool seamless = g % 8 == 0;
    for (int64_t i = 0; i < count; i += g, ++b) {
      const int64_t length = std::min(g, count - i);
      Extent<C::kSymmetric> extent;
      extent.see(v + i, length);
      const quant::Scale s = extent.scale(C::kLargest);
      keep_scale(b, s);
      uint8_t* data = seamless && C::kBits != 8 ? nullptr : data_of(b);
      write(v + i, begin + i, length, s, words + (kStochastic ? i : 0), codes_ + i, data);
    }
    if (C::kBits != 8 && seamless && target_.out.data != nullptr) pack(codes_, count, data_of(begin / g));
  }

  // More than a tile.
  void long_block(int64_t b) {
    const int64_t g = target_.blocks.group_size, begin = b * g, end = begin + std::min(g, range_.n - begin);
    Extent<C::kSymmetric> extent;
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t count = std::min(kTile, end - i);
      extent.see(fetch(source_, i, count, values_, true), count);
    }
    const quant::Scale s = extent.scale(C::kLargest);
    keep_scale(b, s);
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t count = std::min(kTile, end - i);
      const float* v = fetch(source_, i, count, values_, false);
      uint8_t* data = target_.out.data == nullptr ? nullptr : data_of(b) + (i - begin) / 8 * C::kBits;
      write(v, i, count, s, draw(i, count), codes_, data);
    }
  }

  // Elements [at, at + n), all of one block, with values v: codes to `codes` or, if they are whole bytes, to `data`, packed to
  // `data` (nullable), residual and fake.
  void write(const float* v, int64_t at, int64_t n, const quant::Scale& s, const uint32_t* words, Code* codes, uint8_t* data) {
    if constexpr (C::kBits == 8) codes = data != nullptr ? data : codes;
    if (s.finite) encode_block<C, kStochastic>(v, n, s, words, codes);
    else std::memset(codes, 0, static_cast<size_t>(n) * sizeof(Code));
    if (C::kBits != 8 && data != nullptr) pack(codes, n, data);
    if (target_.residual == nullptr && target_.fake == nullptr) return;
    const bool in_place = target_.fake != nullptr && target_.fake_dt == DType::F32;
    float* back = in_place ? static_cast<float*>(target_.fake) + at : back_;
    decode_block<C, false>(codes, n, s.scale, s.zero, back);
    if (target_.residual != nullptr) keep_residual(v, back, s.finite, n, target_.residual + at);
    if (target_.fake != nullptr && !in_place) {
      copy_scale(element(target_.fake, target_.fake_dt, at), target_.fake_dt, back, DType::F32, 1.0f, n);
    }
  }

  static void pack(const Code* codes, int64_t n, uint8_t* data) {
    if constexpr (C::kBits != 8) Packing<C::kBits>::pack(codes, n, data);
  }

  // Random words of elements [begin, begin + count).
  const uint32_t* draw(int64_t begin, int64_t count) {
    if (!kStochastic) return words_;
    const int64_t skip = begin % 4;
    philox_fill(target_.rounding.seed, target_.rounding.offset, static_cast<uint64_t>(begin - skip), count + skip, words_);
    return words_ + skip;
  }

  uint8_t* data_of(int64_t b) { return target_.out.data == nullptr ? nullptr : target_.out.data + b * bytes_; }
  void keep_scale(int64_t b, const quant::Scale& s) {
    if (target_.out.scale != nullptr) target_.out.scale[b] = s.scale;
    if (!C::kSymmetric && target_.out.zero != nullptr) target_.out.zero[b] = s.zero;
  }

  const QuantSource source_;
  const QuantTarget target_;
  const QuantRange range_;
  const int64_t bytes_;  // of a block
  alignas(64) float values_[kTile];
  alignas(64) float back_[kTile];
  alignas(64) uint32_t words_[kStochastic ? kTile + 4 : 1];
  alignas(64) Code codes_[kTile];
};

void WriteBlocks(const QuantSource& source, const QuantTarget& target, const QuantRange& range) {
  quant::dispatch_codes(target.blocks.format, target.blocks.symmetric, [&](auto codes) {
    using C = decltype(codes);
    if (target.rounding.stochastic) BlockWriter<C, true>(source, target, range).run();
    else BlockWriter<C, false>(source, target, range).run();
  });
}

// The source's own output alone.
void ReadBlocks(const QuantSource& source, const QuantRange& range) {
  alignas(64) float buffer[kTile];
  const int64_t g = source.blocks.group_size;
  const int64_t end = range.last == quant_blocks(range.n, g) ? range.n : range.last * g;
  const int64_t whole = g > kTile ? kTile : kTile / g * g;
  for (int64_t b = range.first; b < range.last;) {
    const int64_t begin = b * g, stop = g > kTile ? begin + std::min(g, end - begin) : std::min(end, begin + whole);
    for (int64_t i = begin; i < stop; i += whole) fetch(source, i, std::min(whole, stop - i), buffer, true);
    b += g > kTile ? 1 : whole / g;
  }
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(WriteBlocks);
HWY_EXPORT(ReadBlocks);

void quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType x_dt, float* residual, int64_t n, int64_t first,
              int64_t last, const Quantized& out) {
  quant::check_range(blocks, n, first, last);
  check_arrays(n, {{x, "x"}});
  quant::check_output(blocks.symmetric, out, n);
  dispatch_float(x_dt, "x", [](auto) {});
  if (first == last) return;
  QuantSource source;
  source.x = x;
  source.x_dt = x_dt;
  source.residual = residual;
  QuantTarget target{blocks, rounding, out};
  target.residual = residual;
  HWY_DYNAMIC_DISPATCH(WriteBlocks)(source, target, {n, first, last});
}

void fake_quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType dtype, int64_t n, int64_t first, int64_t last,
                   void* out) {
  quant::check_range(blocks, n, first, last);
  check_arrays(n, {{x, "x"}, {out, "out"}});
  dispatch_float(dtype, "x", [](auto) {});
  if (first == last) return;
  QuantSource source;
  source.x = x;
  source.x_dt = dtype;
  QuantTarget target{blocks, rounding, {nullptr, nullptr, nullptr}};
  target.fake = out;
  target.fake_dt = dtype;
  HWY_DYNAMIC_DISPATCH(WriteBlocks)(source, target, {n, first, last});
}

void dequantize_reduce(const Blocks& blocks, const ConstQuantized* src, int nsrc, float factor, int64_t n, int64_t first, int64_t last,
                       void* out, DType out_dt, const Requantize* again) {
  quant::check_range(blocks, n, first, last);
  quant::check_sources(blocks, src, nsrc, n);
  if (out != nullptr) dispatch_float(out_dt, "out", [](auto) {});
  if (again != nullptr) quant::check_output(again->symmetric, again->out, n);
  if (first == last) return;
  QuantSource source;
  source.blocks = blocks;
  source.src = src;
  source.nsrc = nsrc;
  source.factor = factor;
  source.out = out;
  source.out_dt = out_dt;
  if (again == nullptr) {
    HWY_DYNAMIC_DISPATCH(ReadBlocks)(source, {n, first, last});
    return;
  }
  const QuantTarget target{{again->format, again->symmetric, blocks.group_size}, again->rounding, again->out};
  HWY_DYNAMIC_DISPATCH(WriteBlocks)(source, target, {n, first, last});
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
