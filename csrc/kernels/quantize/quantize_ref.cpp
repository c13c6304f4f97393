// SPDX-License-Identifier: Apache-2.0
#include "kernels/exact_fp.h"

#include <algorithm>
#include <functional>

#include "kernels/philox.h"
#include "kernels/quantize/check.h"
#include "kernels/quantize/codes.h"

namespace ds::kernels {
namespace {

using namespace quant;

// The code whose first bit is bit `at` of a stream of bits, least significant first.
uint32_t read_code(const uint8_t* data, int64_t at, int bits) {
  uint32_t code = 0;
  for (int k = 0; k < bits; ++k) code |= static_cast<uint32_t>(data[(at + k) / 8] >> ((at + k) % 8) & 1) << k;
  return code;
}
void write_code(uint8_t* data, int64_t at, int bits, uint32_t code) {
  for (int k = 0; k < bits; ++k) data[(at + k) / 8] = static_cast<uint8_t>(data[(at + k) / 8] | (code >> k & 1) << ((at + k) % 8));
}

// Quantises block b of the values `value(i)` and hands every (index, value, value as read back, whether the block is finite) to `seen`.
template <class C, class Value, class Seen>
void quantize_block(int64_t group_size, QuantFormat format, const Rounding& r, const Value& value, int64_t n, int64_t b,
                    const Quantized& out, const Seen& seen) {
  const int64_t begin = b * group_size, end = std::min(n, begin + std::min(n, group_size));
  int32_t magnitude = 0, low = ordered(bits_of(value(begin))), high = low;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t bits = bits_of(value(i));
    magnitude = std::max(magnitude, bits & kMagnitude);
    low = std::min(low, ordered(bits));
    high = std::max(high, ordered(bits));
  }
  const Scale s = C::kSymmetric ? scale_of(magnitude, C::kLargest) : scale_between(low, high, C::kLargest);
  const int64_t bytes = quant_block_bytes(format, group_size);
  uint8_t* data = nullptr;
  if (out.data != nullptr) {
    data = out.data + b * bytes;
    std::fill(data, data + quant_block_bytes(format, end - begin), uint8_t{0});
    out.scale[b] = s.scale;
    if (out.zero != nullptr) out.zero[b] = s.zero;
  }
  for (int64_t i = begin; i < end; ++i) {
    const float x = value(i);
    uint32_t code = 0;
    if (s.finite) {
      code = r.stochastic ? encode<C, true>(x, s, philox_element(r.seed, r.offset, static_cast<uint64_t>(i))) : encode<C, false>(x, s, 0);
    }
    if (data != nullptr) write_code(data, (i - begin) * C::kBits, C::kBits, code);
    seen(i, x, decode<C>(code, s.scale, s.zero), s.finite);
  }
}

}  // namespace

void quantize_ref(const Blocks& blocks, const Rounding& rounding, const void* x, DType x_dt, float* residual, int64_t n, int64_t first,
                  int64_t last, const Quantized& out) {
  check_range(blocks, n, first, last);
  dispatch_codes(blocks.format, blocks.symmetric, [&](auto codes) {
    dispatch_float(x_dt, "x", [&](auto tag) {
      auto* source = static_cast<const typename decltype(tag)::Raw*>(x);
      const auto value = [&](int64_t i) { return residual != nullptr ? tag.load(source[i]) + residual[i] : tag.load(source[i]); };
      const auto keep = [&](int64_t i, float v, float back, bool finite) {
        if (residual != nullptr) residual[i] = finite ? v - back : 0.0f;
      };
      for (int64_t b = first; b < last; ++b) {
        quantize_block<decltype(codes)>(blocks.group_size, blocks.format, rounding, value, n, b, out, keep);
      }
    });
  });
}

void fake_quantize_ref(const Blocks& blocks, const Rounding& rounding, const void* x, DType dtype, int64_t n, int64_t first, int64_t last,
                       void* out) {
  check_range(blocks, n, first, last);
  dispatch_codes(blocks.format, blocks.symmetric, [&](auto codes) {
    dispatch_float(dtype, "x", [&](auto tag) {
      using Raw = typename decltype(tag)::Raw;
      const auto value = [&](int64_t i) { return tag.load(static_cast<const Raw*>(x)[i]); };
      const auto keep = [&](int64_t i, float, float back, bool) { static_cast<Raw*>(out)[i] = tag.store(back); };
      for (int64_t b = first; b < last; ++b) {
        quantize_block<decltype(codes)>(blocks.group_size, blocks.format, rounding, value, n, b, {nullptr, nullptr, nullptr}, keep);
      }
    });
  });
}

void dequantize_reduce_ref(const Blocks& blocks, const ConstQuantized* src, int nsrc, float factor, int64_t n, int64_t first, int64_t last,
                           void* out, DType out_dt, const Requantize* again) {
  check_range(blocks, n, first, last);
  const int64_t g = blocks.group_size, bytes = quant_block_bytes(blocks.format, g);
  std::function<float(int64_t)> value;
  dispatch_codes(blocks.format, blocks.symmetric, [&](auto codes) {
    using C = decltype(codes);
    value = [=](int64_t i) {
      float sum = 0.0f;
      for (int k = 0; k < nsrc; ++k) {
        const uint32_t code = read_code(src[k].data + i / g * bytes, i % g * C::kBits, C::kBits);
        const float x = decode<C>(code, src[k].scale[i / g], C::kSymmetric ? 0.0f : src[k].zero[i / g]);
        sum = k == 0 ? x : sum + x;
      }
      return factor == 1.0f ? sum : factor * sum;
    };
  });
  const int64_t begin = first == last ? 0 : first * g, end = first == last ? 0 : (last == quant_blocks(n, g) ? n : last * g);
  if (out != nullptr) {
    dispatch_float(out_dt, "out", [&](auto tag) {
      auto* d = static_cast<typename decltype(tag)::Raw*>(out);
      for (int64_t i = begin; i < end; ++i) d[i] = tag.store(value(i));
    });
  }
  if (again == nullptr) return;
  dispatch_codes(again->format, again->symmetric, [&](auto codes) {
    for (int64_t b = first; b < last; ++b) {
      quantize_block<decltype(codes)>(g, again->format, again->rounding, value, n, b, again->out, [](int64_t, float, float, bool) {});
    }
  });
}

}  // namespace ds::kernels
