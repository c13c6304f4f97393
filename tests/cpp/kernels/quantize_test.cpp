// SPDX-License-Identifier: Apache-2.0
// The SIMD quantisers have the bits of the scalar reference; the reference has the bytes and values that quantize.h states.
#include "kernels/quantize/quantize.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/philox.h"
#include "quantize_kinds.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr int64_t kGroups[] = {1, 3, 8, 20, 64, 100, 2048, 3001};

// A quantised array with guards around its bytes.
struct Stored {
  Stored(const Blocks& blocks_, int64_t n_, uint8_t fill = 0)
      : blocks(blocks_), n(n_), count(quant_bytes(blocks_, n_)), bytes(count + 64, fill), scale(quant_blocks(n_, blocks_.group_size) + 1, -1.0f),
        zero(scale) {}
  Quantized out() { return {bytes.data() + 1, scale.data(), blocks.symmetric ? nullptr : zero.data()}; }
  ConstQuantized in() const { return {bytes.data() + 1, scale.data(), blocks.symmetric ? nullptr : zero.data()}; }
  uint8_t* data() { return bytes.data() + 1; }
  bool same(const Stored& other) const {
    return bytes == other.bytes && std::memcmp(scale.data(), other.scale.data(), scale.size() * sizeof(float)) == 0 &&
           std::memcmp(zero.data(), other.zero.data(), zero.size() * sizeof(float)) == 0;
  }
  Blocks blocks;
  int64_t n, count;
  std::vector<uint8_t> bytes;
  std::vector<float> scale, zero;
};

int64_t last_of(const Blocks& b, int64_t n) { return quant_blocks(n, b.group_size); }

std::vector<float> read_back(const Stored& s) {
  std::vector<float> values(s.n);
  const ConstQuantized source = s.in();
  dequantize_reduce_ref(s.blocks, &source, 1, 1.0f, s.n, 0, last_of(s.blocks, s.n), values.data(), DType::F32, nullptr);
  return values;
}

// Wide in magnitude, some zeros, some blocks that are not finite.
void fill_awkward(Array& x, int64_t n, unsigned seed) {
  x.fill(seed);
  std::mt19937 generator(seed + 1);
  for (int64_t i = 0; i < n; ++i) {
    if (generator() % 8 == 0) x.set(i, 0.0f);
    if (generator() % 8 == 0) x.set(i, x.get(i) * std::ldexp(1.0f, -static_cast<int>(generator() % 14)));
    if (generator() % 701 == 0) x.set(i, generator() % 2 ? -kInf : kNan);
  }
}

template <typename Body>
void for_every_target(const Body& body) {
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    SCOPED_TRACE(hwy::TargetName(target));
    body();
    if (::testing::Test::HasFailure()) break;
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(Quantize, HasTheBitsOfTheReference) {
  for_every_slice([](int64_t n, int64_t offset) {
    for (const Kind& kind : kKinds) {
      for (int64_t g : kGroups) {
        for (DType dtype : kFloats) {
          for (bool stochastic : {false, true}) {
            if (dtype != DType::F32 && (stochastic || g % 20 == 0)) continue;  // the same code behind the cast
            SCOPED_TRACE(std::string(kind.name) + " group " + std::to_string(g) + (stochastic ? " stochastic " : " ") + dtype_name(dtype));
            const Blocks blocks{kind.format, kind.symmetric, g};
            const Rounding rounding{stochastic, 77, 8};
            Array x(dtype, n, offset);
            fill_awkward(x, n, 3);
            Stored got(blocks, n, 0xa5), want(blocks, n, 0xa5);
            quantize(blocks, rounding, x.data(), dtype, nullptr, n, 0, last_of(blocks, n), got.out());
            quantize_ref(blocks, rounding, x.data(), dtype, nullptr, n, 0, last_of(blocks, n), want.out());
            EXPECT_TRUE(got.same(want));

            Array fake(dtype, n, offset), fake_want(dtype, n);
            fake_quantize(blocks, rounding, x.data(), dtype, n, 0, last_of(blocks, n), fake.data());
            fake_quantize_ref(blocks, rounding, x.data(), dtype, n, 0, last_of(blocks, n), fake_want.data());
            EXPECT_SAME(fake, fake_want);

            Array residual(DType::F32, n, offset), residual_want(DType::F32, n);
            residual.fill(9, -0.1f, 0.1f);
            residual_want.copy(residual);
            quantize(blocks, rounding, x.data(), dtype, residual.floats(), n, 0, last_of(blocks, n), got.out());
            quantize_ref(blocks, rounding, x.data(), dtype, residual_want.floats(), n, 0, last_of(blocks, n), want.out());
            EXPECT_TRUE(got.same(want));
            EXPECT_SAME(residual, residual_want);
            if (HasFailure()) return;
          }
        }
      }
    }
  });
}

TEST(DequantizeReduce, HasTheBitsOfTheReference) {
  for_every_slice([](int64_t n, int64_t offset) {
    for (const Kind& kind : kKinds) {
      for (int64_t g : kGroups) {
        SCOPED_TRACE(std::string(kind.name) + " group " + std::to_string(g));
        const Blocks blocks{kind.format, kind.symmetric, g};
        std::vector<Stored> sources;
        std::vector<ConstQuantized> pointers;
        for (int k = 0; k < 3; ++k) {
          Array x(DType::F32, n);
          fill_awkward(x, n, 10 + k);
          sources.emplace_back(blocks, n);
          quantize_ref(blocks, {}, x.data(), DType::F32, nullptr, n, 0, last_of(blocks, n), sources.back().out());
        }
        for (Stored& s : sources) pointers.push_back(s.in());
        const Kind& next = kKinds[(&kind - kKinds + 1) % std::size(kKinds)];  // requantised to another format
        const Blocks next_blocks{next.format, next.symmetric, g};
        for (DType dtype : kFloats) {
          const int nsrc = dtype == DType::F32 ? 3 : dtype == DType::BF16 ? 2 : 1;
          const float factor = nsrc == 3 ? 1.0f / 3.0f : 1.0f;
          Array got(dtype, n, offset), want(dtype, n);
          dequantize_reduce(blocks, pointers.data(), nsrc, factor, n, 0, last_of(blocks, n), got.data(), dtype, nullptr);
          dequantize_reduce_ref(blocks, pointers.data(), nsrc, factor, n, 0, last_of(blocks, n), want.data(), dtype, nullptr);
          EXPECT_SAME(got, want);

          Stored again(next_blocks, n, 0xa5), again_want(next_blocks, n, 0xa5);
          const Requantize requantize{next.format, next.symmetric, {nsrc == 2, 5, 4}, again.out()};
          Requantize requantize_want = requantize;
          requantize_want.out = again_want.out();
          Array both(dtype, n, offset);
          dequantize_reduce(blocks, pointers.data(), nsrc, factor, n, 0, last_of(blocks, n), nsrc == 1 ? nullptr : both.data(), dtype, &requantize);
          dequantize_reduce_ref(blocks, pointers.data(), nsrc, factor, n, 0, last_of(blocks, n), nullptr, dtype, &requantize_want);
          EXPECT_TRUE(again.same(again_want));
          if (nsrc != 1) {
            EXPECT_SAME(both, want);
          }
          if (HasFailure()) return;
        }
      }
    }
  });
}

TEST(Quantize, AnySplitOfTheBlocksWritesTheSame) {
  for (const Kind& kind : kKinds) {
    for (int64_t g : {5, 64, 3001}) {
      const int64_t n = 12 * g + 2;
      const Blocks blocks{kind.format, kind.symmetric, g};
      const Rounding rounding{true, 1, 0};
      Array x(DType::F32, n);
      x.fill(4);
      Stored whole(blocks, n), parts(blocks, n);
      quantize(blocks, rounding, x.data(), DType::F32, nullptr, n, 0, 13, whole.out());
      for (auto [first, last] : {std::pair<int64_t, int64_t>{7, 13}, {0, 1}, {1, 7}, {3, 3}}) {
        quantize(blocks, rounding, x.data(), DType::F32, nullptr, n, first, last, parts.out());
      }
      EXPECT_TRUE(whole.same(parts)) << kind.name;
      std::vector<float> a(n), b(n, -1.0f);
      const ConstQuantized source = whole.in();
      dequantize_reduce(blocks, &source, 1, 1.0f, n, 0, 13, a.data(), DType::F32, nullptr);
      for (auto [first, last] : {std::pair<int64_t, int64_t>{7, 13}, {0, 1}, {1, 7}, {3, 3}}) {
        dequantize_reduce(blocks, &source, 1, 1.0f, n, first, last, b.data(), DType::F32, nullptr);
      }
      EXPECT_EQ(a, b) << kind.name;
    }
  }
}

// ---- what the header states ----------------------------------------------------------------------------------------

// Quantises with the reference, block by block of `group`; returns the bytes.
std::vector<uint8_t> bytes_of(const Kind& kind, int64_t group, std::vector<float> x, std::vector<float>* scale = nullptr,
                              std::vector<float>* zero = nullptr) {
  const int64_t n = static_cast<int64_t>(x.size());
  const Blocks blocks{kind.format, kind.symmetric, group};
  Stored s(blocks, n);
  quantize_ref(blocks, {}, x.data(), DType::F32, nullptr, n, 0, last_of(blocks, n), s.out());
  if (scale != nullptr) *scale = {s.scale.begin(), s.scale.end() - 1};
  if (zero != nullptr) *zero = {s.zero.begin(), s.zero.end() - 1};
  return {s.data(), s.data() + s.count};
}
using Bytes = std::vector<uint8_t>;

TEST(Layout, Int8) {
  std::vector<float> scale, zero;
  EXPECT_EQ(bytes_of(kKinds[0], 4, {127, -127, 1, -2, 254, 0}, &scale), (Bytes{127, 0x81, 1, 0xfe, 127, 0}));
  EXPECT_EQ(scale, (std::vector<float>{1, 2}));
  EXPECT_EQ(bytes_of(kKinds[1], 4, {-10, 245, 0, 117.5}, &scale, &zero), (Bytes{0, 255, 10, 128}));  // 127.5 goes to the even one
  EXPECT_EQ(scale, (std::vector<float>{1}));
  EXPECT_EQ(zero, (std::vector<float>{-10}));
}

TEST(Layout, Int4BlocksOfOddLengthBeginAtBytes) {
  // nibbles 7 -7(9) 3 | 7 -1(f) 0 | 7
  EXPECT_EQ(bytes_of(kKinds[2], 3, {7, -7, 3, 14, -2, 0, 7}), (Bytes{0x97, 0x03, 0xf7, 0x00, 0x07}));
  EXPECT_EQ(bytes_of(kKinds[3], 5, {100, 115, 101, 102, 103}), (Bytes{0xf0, 0x21, 0x03}));
}

TEST(Layout, Fp8) {
  // 448 = 0 1111 110, 1 = 0 0111 000, -2^-9 = 1 0000 001, 2^-6 = 0 0001 000
  EXPECT_EQ(bytes_of(kKinds[4], 4, {448, 1, -0x1p-9f, 0x1p-6f}), (Bytes{0x7e, 0x38, 0x81, 0x08}));
  // 57344 = 0 11110 11, -1.5 = 1 01111 10, 2^-16 = 0 00000 01
  EXPECT_EQ(bytes_of(kKinds[5], 3, {57344, -1.5, 0x1p-16f}), (Bytes{0x7b, 0xbe, 0x01}));
}

TEST(Layout, Fp6) {
  // 28 = 0 111 11 = 31, -1 = 1 011 00 = 44, 1/16 = 0 000 01 = 1, 0.5 = 0 010 00 = 8: 31 | 44 << 6 | 1 << 12 | 8 << 18 = 0x201b1f
  EXPECT_EQ(bytes_of(kKinds[6], 8, {28, -1, 0.0625, 0.5, 28}), (Bytes{0x1f, 0x1b, 0x20, 0x1f}));
  EXPECT_EQ(bytes_of(kKinds[6], 2, {28, -1, 28}), (Bytes{0x1f, 0x0b, 0x1f}));
}

TEST(Layout, Fp4AndFp12) {
  // 6 = 0 11 1, -0.5 = 1 00 1, 1 = 0 01 0
  EXPECT_EQ(bytes_of(kKinds[7], 4, {6, -0.5, 1}), (Bytes{0x97, 0x02}));
  // 510 = 0 1111 1111111 = 0x7ff, -1 = 1 0111 0000000 = 0xb80, 2^-13 = 0x001
  EXPECT_EQ(bytes_of(kKinds[8], 4, {510, -1, 0x1p-13f}), (Bytes{0xff, 0x07, 0xb8, 0x01, 0x00}));
}

TEST(Layout, Sizes) {
  EXPECT_EQ(quant_bytes({QuantFormat::INT4, true, 3}, 7), 5);
  EXPECT_EQ(quant_bytes({QuantFormat::FP6_E3M2, true, 64}, 130), 98);
  EXPECT_EQ(quant_bytes({QuantFormat::FP12_E4M7, true, 4}, 3), 5);
  EXPECT_EQ(quant_bytes({QuantFormat::INT8, true, 4}, 0), 0);
  EXPECT_EQ(quant_block_bytes(QuantFormat::FP12_E4M7, INT64_MAX / 2), INT64_MAX / 16 * 12 + 11);  // 2^62 - 1 elements: no overflow
  EXPECT_EQ(quant_blocks(5, INT64_MAX), 1);
}

// The value of a code, by the definition of the format, in double.
double value_of(const Kind& kind, uint32_t code) {
  const int bits = quant_bits(kind.format);
  if (kind.mantissa == 0) {
    const int sign = 1 << (bits - 1);
    return kind.symmetric ? static_cast<int>((code ^ sign)) - sign : static_cast<double>(code);
  }
  const uint32_t magnitude = code & ((1u << (bits - 1)) - 1);
  const uint32_t exponent = magnitude >> kind.mantissa, fraction = magnitude & ((1u << kind.mantissa) - 1);
  const double sign = code >> (bits - 1) ? -1.0 : 1.0;
  if (kind.format == QuantFormat::FP8_E4M3 && magnitude == 0x7f) return kNan;
  if (kind.format == QuantFormat::FP8_E5M2 && exponent == 31) return fraction == 0 ? sign * kInf : kNan;
  const double one = exponent == 0 ? 0.0 : 1.0;
  const int e = exponent == 0 ? kind.smallest_exponent : kind.smallest_exponent + static_cast<int>(exponent) - 1;
  return sign * std::ldexp(one + std::ldexp(fraction, -kind.mantissa), e);
}

TEST(Codes, EveryOneIsReadAndWrittenAsDefined) {
  for (const Kind& kind : kKinds) {
    const int bits = quant_bits(kind.format), count = 1 << bits;
    const Blocks blocks{kind.format, kind.symmetric, count};
    Stored all(blocks, count);
    for (int c = 0; c < count; ++c) {
      for (int k = 0; k < bits; ++k) all.data()[(c * bits + k) / 8] |= (c >> k & 1) << ((c * bits + k) % 8);
    }
    all.scale[0] = 0.5f;
    all.zero[0] = kind.symmetric ? -1.0f : 3.0f;
    for_every_target([&] {
      std::vector<float> values(count);
      const ConstQuantized source = all.in();
      dequantize_reduce(blocks, &source, 1, 1.0f, count, 0, 1, values.data(), DType::F32, nullptr);
      for (int c = 0; c < count; ++c) {
        const double want = 0.5 * value_of(kind, c) + (kind.symmetric ? 0.0 : 3.0);
        if (std::isnan(want)) {
          EXPECT_TRUE(std::isnan(values[c])) << kind.name << " " << c;
        } else {
          EXPECT_EQ(values[c], want) << kind.name << " " << c;
        }
        if (want == 0) {
          EXPECT_EQ(std::signbit(values[c]), kind.mantissa != 0 && c != 0) << kind.name;
        }
      }
      // The finite ones go back to the same bytes, but for the lowest integers, which are not written.
      for (int c = 0; c < count; ++c) {
        const bool unused = kind.mantissa == 0 && kind.symmetric && c == count / 2;
        if (!std::isfinite(values[c]) || unused) {
          values[c] = 0.0f;
          for (int k = 0; k < bits; ++k) all.data()[(c * bits + k) / 8] &= ~(1 << ((c * bits + k) % 8));
        }
      }
      Stored back(blocks, count);
      quantize(blocks, {}, values.data(), DType::F32, nullptr, count, 0, 1, back.out());
      EXPECT_EQ(back.bytes, all.bytes) << kind.name;
      EXPECT_EQ(back.scale[0], 0.5f) << kind.name;
      for (int c = 0; c < count; ++c) {  // for the next target: all codes again
        for (int k = 0; k < bits; ++k) all.data()[(c * bits + k) / 8] |= (c >> k & 1) << ((c * bits + k) % 8);
      }
    });
  }
}

// The distance between neighbouring codes at x (in units of the scale).
double step_at(const Kind& kind, double x) {
  if (kind.mantissa == 0) return 1.0;
  const int e = x == 0.0 ? -1000 : std::ilogb(x);
  return std::ldexp(1.0, std::max(e, kind.smallest_exponent) - kind.mantissa);
}

TEST(Quantize, ErrsByHalfAStepAtMost) {
  for (const Kind& kind : kKinds) {
    for (double magnitude : {1e-30, 1.0, 1e30}) {
      const int64_t g = 64, n = 4096;
      const Blocks blocks{kind.format, kind.symmetric, g};
      Array x(DType::F32, n);
      x.fill(21, static_cast<float>(-magnitude), static_cast<float>(magnitude));
      for (bool stochastic : {false, true}) {
        Stored s(blocks, n);
        quantize(blocks, {stochastic, 3, 0}, x.data(), DType::F32, nullptr, n, 0, last_of(blocks, n), s.out());
        const std::vector<float> back = read_back(s);
        for (int64_t i = 0; i < n; ++i) {
          const double scale = s.scale[i / g], zero = kind.symmetric ? 0.0 : s.zero[i / g];
          const double scaled = (x.get(i) - zero) / scale;
          // Rounding x * (1 / scale) moves it by a few parts in 2^24, over a border of codes at worst; reading rounds the product and the sum.
          const double allowed = scale * (step_at(kind, scaled) * (stochastic ? 1.0 : 0.5) + 8 * 0x1p-24 * kind.largest) +
                                 2 * 0x1p-24 * (std::abs(back[i]) + std::abs(zero));
          EXPECT_LE(std::abs(static_cast<double>(back[i]) - x.get(i)), allowed) << kind.name << " " << i;
        }
      }
    }
  }
}

TEST(Quantize, NothingNotFiniteDisappears) {
  for (const Kind& kind : kKinds) {
    for (float bad : {kInf, -kInf, kNan, -kNan}) {
      for (int64_t g : {20, 3000}) {
        for_every_target([&] {
          const int64_t n = 3 * g;
          const Blocks blocks{kind.format, kind.symmetric, g};
          Array x(DType::F32, n), residual(DType::F32, n);
          x.fill(2);
          x.set(g + g / 2, bad);
          Stored s(blocks, n, 0xff);
          quantize(blocks, {true, 1, 0}, x.data(), DType::F32, residual.floats(), n, 0, 3, s.out());
          EXPECT_TRUE(std::isnan(s.scale[1]));
          const std::vector<float> back = read_back(s);
          for (int64_t i = 0; i < n; ++i) {
            EXPECT_EQ(std::isnan(back[i]), i / g == 1) << kind.name;
            EXPECT_TRUE(std::isfinite(residual.get(i)));
            if (i / g == 1) {
              EXPECT_EQ(residual.get(i), 0.0f);
            }
          }
          const int64_t bytes = quant_block_bytes(kind.format, g);
          EXPECT_EQ(std::count(s.data() + bytes, s.data() + 2 * bytes, 0), bytes) << kind.name;
        });
      }
    }
  }
}

constexpr float kTop = std::numeric_limits<float>::max();

TEST(Quantize, ZerosTinyAndHugeBlocks) {
  for (const Kind& kind : kKinds) {
    std::vector<float> scale, zero;
    const Bytes zeros = bytes_of(kind, 4, {0, 0, 0, 0}, &scale, &zero);
    EXPECT_EQ(zeros, Bytes(zeros.size(), 0)) << kind.name;
    EXPECT_EQ(scale, std::vector<float>{0x1p-126f});
    for (float tiny : {0x1p-149f, 0x1p-126f, 0x1p-120f}) {  // the scale does not vanish, so the error stays below half of it
      const Blocks blocks{kind.format, kind.symmetric, 4};
      Stored s(blocks, 4);
      const float x[4] = {tiny, -tiny, tiny / 2, 0};
      quantize(blocks, {}, x, DType::F32, nullptr, 4, 0, 1, s.out());
      const std::vector<float> back = read_back(s);
      for (int i = 0; i < 4; ++i) {
        EXPECT_LE(std::abs(back[i] - x[i]), s.scale[0] * step_at(kind, x[0] / s.scale[0]) / 2 + tiny * 0x1p-22f) << kind.name << tiny;
      }
    }
    bytes_of(kind, 4, {kTop, 0, kTop, kTop}, &scale, &zero);
    EXPECT_TRUE(std::isfinite(scale[0])) << kind.name;
    bytes_of(kind, 4, {kTop, -kTop, 0, 0}, &scale, &zero);
    EXPECT_EQ(std::isfinite(scale[0]), kind.symmetric) << kind.name;  // the range of an asymmetric block overflows
  }
}

TEST(Quantize, NumbersReadAsNumbers) {
  for (const Kind& kind : kKinds) {
    for (const float low : {0.0f, -1.0f, -0x1p100f, 0x1p126f, 0x1.8p126f, 0x1p127f, 0x1.fp127f, -kTop}) {
      if (!kind.symmetric && low == -kTop) continue;  // top - low overflows
      for (const bool stochastic : {false, true}) {
        const int64_t blocks_count = 300, g = 3;
        const Blocks blocks{kind.format, kind.symmetric, g};
        std::vector<float> x(blocks_count * g);
        for (int64_t b = 0; b < blocks_count; ++b) {
          float high = kTop;
          for (int64_t k = 0; k < b; ++k) high = std::nextafter(high, 0.0f);
          x[3 * b] = low, x[3 * b + 1] = high, x[3 * b + 2] = high - high / 64;
        }
        const int64_t n = static_cast<int64_t>(x.size());
        Stored s(blocks, n), want(blocks, n);
        quantize(blocks, {stochastic, 1, 0}, x.data(), DType::F32, nullptr, n, 0, blocks_count, s.out());
        quantize_ref(blocks, {stochastic, 1, 0}, x.data(), DType::F32, nullptr, n, 0, blocks_count, want.out());
        EXPECT_EQ(s.bytes, want.bytes) << kind.name;
        EXPECT_EQ(s.scale, want.scale) << kind.name;
        const std::vector<float> back = read_back(s);
        for (int64_t i = 0; i < n; ++i) {
          const double scale = s.scale[i / g], zero = kind.symmetric ? 0.0 : s.zero[i / g];
          const double step = scale * (step_at(kind, (x[i] - zero) / scale) * (stochastic ? 1.0 : 0.5) + 8 * 0x1p-24 * kind.largest);
          EXPECT_LE(std::abs(static_cast<double>(back[i]) - x[i]), step + 0x1p104 + 0x1p103) << kind.name << " " << low << " " << i;  // two roundings
        }
      }
    }
  }
}

// The mean of N draws of a variable within an interval of length `step` lies within 5 deviations of at most step / 2 / sqrt(N) of its mean: a
// right generator fails one such check in a million, and the seed is fixed.
TEST(Quantize, StochasticRoundingIsUnbiased) {
  for (const Kind& kind : kKinds) {
    const int64_t draws = 40000;
    for (double scaled : {0.3, 1.0625 * kind.largest / 2, -kind.largest / 3}) {
      if (!kind.symmetric) scaled = std::abs(scaled);
      // Blocks of three: the largest, zero, and x.
      std::vector<float> x(3 * draws);
      for (int64_t i = 0; i < draws; ++i) {
        x[3 * i] = static_cast<float>(kind.largest);
        x[3 * i + 2] = static_cast<float>(scaled);
      }
      const Blocks blocks{kind.format, kind.symmetric, 3};
      Stored s(blocks, 3 * draws);
      quantize(blocks, {true, 123, 4}, x.data(), DType::F32, nullptr, 3 * draws, 0, draws, s.out());
      const std::vector<float> back = read_back(s);
      double sum = 0;
      for (int64_t i = 0; i < draws; ++i) sum += back[3 * i + 2];
      const double allowed = 5 * step_at(kind, scaled) / 2 / std::sqrt(static_cast<double>(draws)) + std::abs(scaled) * 0x1p-20;
      EXPECT_NEAR(sum / draws, x[2], allowed) << kind.name << " " << scaled;
      EXPECT_EQ(back[0], x[0]) << kind.name;
      EXPECT_EQ(back[1], 0.0f) << kind.name;
    }
  }
}

TEST(DequantizeReduce, AddsInOrder) {
  const Blocks blocks{QuantFormat::INT8, true, 1};
  const float values[3] = {1e8f, 1.0f, -1e8f};
  std::vector<Stored> s(3, Stored(blocks, 1));
  std::vector<ConstQuantized> in;
  for (int k = 0; k < 3; ++k) quantize(blocks, {}, &values[k], DType::F32, nullptr, 1, 0, 1, s[k].out());
  for (Stored& one : s) in.push_back(one.in());
  float sum = -1;
  dequantize_reduce(blocks, in.data(), 3, 0.5f, 1, 0, 1, &sum, DType::F32, nullptr);
  EXPECT_EQ(sum, 0.0f);  // 1e8 + 1 is 1e8
  std::swap(in[1], in[2]);
  dequantize_reduce(blocks, in.data(), 3, 0.5f, 1, 0, 1, &sum, DType::F32, nullptr);
  EXPECT_NEAR(sum, 0.5f, 0x1p-22f);
}

// What was lost is added next time: after k steps the sums differ by one residual.
TEST(Quantize, FeedbackLosesNothingOverTime) {
  const int64_t n = 256;
  const Blocks blocks{QuantFormat::INT4, true, 64};
  Array x(DType::F32, n), residual(DType::F32, n);
  std::vector<double> sent(n, 0.0), wanted(n, 0.0);
  for (unsigned step = 0; step < 50; ++step) {
    x.fill(step);
    Stored s(blocks, n);
    quantize(blocks, {}, x.data(), DType::F32, residual.floats(), n, 0, 4, s.out());
    const std::vector<float> back = read_back(s);
    for (int64_t i = 0; i < n; ++i) {
      sent[i] += back[i];
      wanted[i] += x.get(i);
      EXPECT_NEAR(wanted[i] - sent[i], residual.get(i), 50 * 4 * 0x1p-23);  // two roundings a step of numbers below 4
    }
  }
}

TEST(Quantize, RefusesByName) {
  const Blocks good{QuantFormat::INT8, true, 4};
  float x[8] = {};
  Stored s(good, 8);
  const auto message = [&](const Blocks& b, const void* source, DType dtype, int64_t last, const Quantized& out) -> std::string {
    try {
      quantize(b, {}, source, dtype, nullptr, 8, 0, last, out);
    } catch (const ValueError& e) {
      return e.message;
    }
    return "";
  };
  EXPECT_NE(message({QuantFormat::INT8, true, 0}, x, DType::F32, 1, s.out()).find("group_size"), std::string::npos);
  EXPECT_NE(message({QuantFormat::FP8_E4M3, false, 4}, x, DType::F32, 2, s.out()).find("symmetric"), std::string::npos);
  EXPECT_NE(message(good, nullptr, DType::F32, 2, s.out()).find("x is null"), std::string::npos);
  EXPECT_NE(message(good, x, DType::I32, 2, s.out()).find("x: dtype"), std::string::npos);
  EXPECT_NE(message(good, x, DType::F32, 3, s.out()).find("blocks [0, 3)"), std::string::npos);
  EXPECT_NE(message(good, x, DType::F32, 2, {nullptr, s.scale.data(), nullptr}).find("out.data"), std::string::npos);
  EXPECT_NE(message({QuantFormat::INT8, false, 4}, x, DType::F32, 2, s.out()).find("out.zero"), std::string::npos);
  const ConstQuantized source = s.in();
  EXPECT_THROW(dequantize_reduce(good, &source, 0, 1.0f, 8, 0, 2, x, DType::F32, nullptr), ValueError);
  EXPECT_THROW(dequantize_reduce(good, &source, 1, 1.0f, 8, 0, 2, x, DType::F64, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
