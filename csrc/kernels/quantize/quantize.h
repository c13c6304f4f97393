// SPDX-License-Identifier: Apache-2.0
// Blockwise quantisation: a block is `group_size` consecutive elements of a flat array (the last one may be shorter) with a scale of its own.
//
// Note [layout]. A quantised array of n elements is three arrays:
//   data   uint8, the codes of block 0, then those of block 1, ... Every block begins at a byte of its own: block b at byte
//          b * quant_block_bytes(format, group_size). Nothing is interleaved over blocks, so a slice that begins and ends at block borders
//          is a contiguous range of bytes and can be sent as it is.
//   scale  float32, one a block.
//   zero   float32, one a block: the value of code 0. Integer formats that are not symmetric only; otherwise null.
// Within a block the codes are one stream of bits, least significant first: the code of element j takes bits [j * B, (j + 1) * B), bit k
// of the stream being bit k % 8 of byte k / 8. Hence
//   INT8, FP8    byte j is the code of element j
//   INT4, FP4    the low nibble of byte 0 is element 0, the high nibble element 1
//   FP6          4 codes c0..c3 in 3 bytes: c0 | c1 << 6 | c2 << 12 | c3 << 18, least significant byte first
//   FP12         2 codes in 3 bytes: c0 | c1 << 12, least significant byte first
// What is left of a block's last byte is zero. Readers ignore it.
//
// Note [codes]. A symmetric integer code is two's complement, from -127 to 127 or -7 to 7: value = scale * code. (The lowest code, -128 or -8, is
// never written; it is read as what it says.) An asymmetric one is unsigned, 0 to 255 or 0 to 15: value = zero + scale * code.
// Floating-point codes are sign, exponent, mantissa from the top, subnormals included, value = scale * code:
//   FP8_E4M3   the bits of torch.float8_e4m3fn: largest 448, 0x7f and 0xff are NaN
//   FP8_E5M2   the bits of torch.float8_e5m2: largest 57344, infinities, NaN
//   FP6_E3M2   bias 3, largest 28, every code a number
//   FP4_E2M1   bias 1, largest 6, every code a number
//   FP12_E4M7  bias 7, largest 510, every code a number
// Quantising writes neither infinities nor NaN codes.
//
// Note [scales]. With L the largest code (or floating-point value), the scale is max |x| / L, or (max x - min x) / L with zero = min x,
// in float32 and at least 2^-126, so a block of zeros has the scale 2^-126 and codes 0; two float32 steps lower where L * scale (+ zero) would round
// to an infinity, so a block of numbers reads as numbers. The code is x * (1 / scale), or
// (x - zero) * (1 / scale), rounded; the error is at most half the distance between codes there (stochastic: all of it) and a few float32
// roundings. A block that holds an infinity or NaN, or whose max x - min x overflows, has the scale NaN (zero NaN) and codes 0: all of it reads as
// NaN, so nothing that is not finite disappears on the way.
//
// Conventions. Outputs are overwritten and overlap nothing else. No pointer needs more than its element's alignment. Nothing
// here starts threads: callers split the range of blocks [first, last); pointers are those of the whole arrays whatever the range. Arithmetic is
// float32 with one rounding an operation (no contraction), the same bits on every instruction set and on CUDA.
#pragma once

#include <cstdint>

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

enum class QuantFormat : uint8_t { INT8, INT4, FP8_E4M3, FP8_E5M2, FP6_E3M2, FP4_E2M1, FP12_E4M7 };

constexpr int quant_bits(QuantFormat f) {
  switch (f) {
    case QuantFormat::INT8:
    case QuantFormat::FP8_E4M3:
    case QuantFormat::FP8_E5M2: return 8;
    case QuantFormat::INT4:
    case QuantFormat::FP4_E2M1: return 4;
    case QuantFormat::FP6_E3M2: return 6;
    case QuantFormat::FP12_E4M7: return 12;
  }
  throw ValueError(__FILE__, __LINE__, "not a QuantFormat: " + std::to_string(static_cast<int>(f)));
}

struct Blocks {
  QuantFormat format;
  bool symmetric;  // floating-point formats: true
  int64_t group_size;
};

constexpr int64_t quant_blocks(int64_t n, int64_t group_size) { return n / group_size + (n % group_size != 0); }
// Bytes of a block of `count` elements. (In two parts, lest the product overflow.)
constexpr int64_t quant_block_bytes(QuantFormat f, int64_t count) { return count / 8 * quant_bits(f) + (count % 8 * quant_bits(f) + 7) / 8; }
constexpr int64_t quant_bytes(const Blocks& b, int64_t n) {
  return n / b.group_size * quant_block_bytes(b.format, b.group_size) + quant_block_bytes(b.format, n % b.group_size);
}

// Nearest, ties to even; or stochastic: up with the probability of the fraction (to 2^-24), by philox.h, Note [random bits of an element],
// i the index in the whole array.
struct Rounding {
  bool stochastic = false;
  uint64_t seed = 0, offset = 0;
};

struct Quantized {
  uint8_t* data;
  float* scale;
  float* zero;  // null if symmetric
};
struct ConstQuantized {
  const uint8_t* data;
  const float* scale;
  const float* zero;
};

// out = quantised x. With `residual` (nullable, float32[n]) it is x + residual that is quantised, and residual becomes what was lost,
// (x + residual) - dequantised; 0 in a block that is not finite, so that one overflow does not stay for ever.
void quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType x_dt, float* residual, int64_t n, int64_t first,
              int64_t last, const Quantized& out);

// out = x after a way through the codes and back, rounded to its dtype.
void fake_quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType dtype, int64_t n, int64_t first, int64_t last,
                   void* out);

// The sum of `nsrc` >= 1 quantised arrays, factor * (((src[0] + src[1]) + src[2]) + ...), in float32 and in that order, to `out` (nullable, of
// out_dt) and quantised once more to `again` (nullable; same group_size) in the same pass. One source and factor 1: plain dequantising.
struct Requantize {
  QuantFormat format;
  bool symmetric;
  Rounding rounding;
  Quantized out;
};
void dequantize_reduce(const Blocks& blocks, const ConstQuantized* src, int nsrc, float factor, int64_t n, int64_t first, int64_t last,
                       void* out, DType out_dt, const Requantize* again);

// Plain scalar loops with the same results bit for bit: the oracle of the tests.
void quantize_ref(const Blocks& blocks, const Rounding& rounding, const void* x, DType x_dt, float* residual, int64_t n, int64_t first,
                  int64_t last, const Quantized& out);
void fake_quantize_ref(const Blocks& blocks, const Rounding& rounding, const void* x, DType dtype, int64_t n, int64_t first, int64_t last,
                       void* out);
void dequantize_reduce_ref(const Blocks& blocks, const ConstQuantized* src, int nsrc, float factor, int64_t n, int64_t first, int64_t last,
                           void* out, DType out_dt, const Requantize* again);

// CUDA twins (built with DS_CUDA): all blocks; device pointers, launched on `stream`, nothing waits. `src` itself is a host array of at
// most kCudaMaxQuantized.
constexpr int kCudaMaxQuantized = 64;
void quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType x_dt, float* residual, int64_t n, const Quantized& out,
              cudaStream_t stream);
void fake_quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType dtype, int64_t n, void* out, cudaStream_t stream);
void dequantize_reduce(const Blocks& blocks, const ConstQuantized* src, int nsrc, float factor, int64_t n, void* out, DType out_dt,
                       const Requantize* again, cudaStream_t stream);

}  // namespace ds::kernels
