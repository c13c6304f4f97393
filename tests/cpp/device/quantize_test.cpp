// SPDX-License-Identifier: Apache-2.0
// The CUDA quantisers, run on the host, have the bytes, scales and values of the scalar reference bit for bit.
#include "kernels/quantize/quantize.h"

#include "../kernels/quantize_kinds.h"
#include "arrays.h"
#include "base/error.h"

namespace ds::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Around a unit of 8; teams of 1, 2, 4, 16 and 32 lanes; a lane's second unit (257); the whole block (1025) and its second unit (2049).
constexpr int64_t kGroups[] = {1, 3, 8, 9, 16, 17, 100, 128, 256, 257, 1024, 1025, 2048, 2049, 2056};

// A team has this many lanes of 256, hence so many blocks of the array go to a block of threads.
int64_t blocks_at_once(int64_t group) {
  int64_t lanes = 1;
  while (lanes < 32 && lanes * 8 < group) lanes *= 2;
  return group > 1024 ? 1 : 256 / lanes;
}

// A quantised array whose three parts end where their memory ends. They hold what nobody has written yet.
struct Stored {
  Stored(const Blocks& b, int64_t count, int64_t offset = 0)
      : blocks(b), n(count), data(DType::U8, quant_bytes(b, count), offset), scale(DType::F32, quant_blocks(count, b.group_size), offset),
        zero(DType::F32, scale.size(), offset) {
    std::memset(data.data(), 0xff, static_cast<size_t>(data.size()));
    scale.fill(1), zero.fill(2);
  }
  Quantized out() { return {data.as<uint8_t>(), scale.floats(), blocks.symmetric ? nullptr : zero.floats()}; }
  ConstQuantized in() { return {data.as<uint8_t>(), scale.floats(), blocks.symmetric ? nullptr : zero.floats()}; }
  int64_t last() const { return scale.size(); }
  bool same_bits(Stored& other) { return data.same_bits(other.data) && scale.same_bits(other.scale) && zero.same_bits(other.zero); }
  bool guards_intact() const { return data.guards_intact() && scale.guards_intact() && zero.guards_intact(); }
  std::string bits() const { return data.bits() + scale.bits() + zero.bits(); }
  Blocks blocks;
  int64_t n;
  DeviceArray data, scale, zero;
};

// Wide in magnitude, some zeros of either sign, some blocks that are not finite.
void fill_awkward(DeviceArray& x, unsigned seed) {
  x.fill(seed);
  std::mt19937 generator(seed + 1);
  for (int64_t i = 0; i < x.size(); ++i) {
    if (generator() % 8 == 0) x.set(i, generator() % 2 ? 0.0f : -0.0f);
    if (generator() % 8 == 0) x.set(i, x.get(i) * std::ldexp(1.0f, -static_cast<int>(generator() % 14)));
    if (generator() % 3001 == 0) x.set(i, generator() % 2 ? -kInf : kNan);
  }
}

struct Offsets {
  int64_t x, residual, codes;
};

// quantize with and without residual and fake_quantize of one array. Returns the bits of all that was written.
std::string expect_reference(const Blocks& blocks, const Rounding& rounding, DType dtype, int64_t n, const Offsets& offset) {
  DeviceArray x(dtype, n, offset.x), fake(dtype, n, offset.residual), fake_want(dtype, n);
  fill_awkward(x, static_cast<unsigned>(n));
  Stored got(blocks, n, offset.codes), want(blocks, n);
  quantize(blocks, rounding, x.data(), dtype, nullptr, n, got.out(), nullptr);
  quantize_ref(blocks, rounding, x.data(), dtype, nullptr, n, 0, want.last(), want.out());
  EXPECT_SAME(got, want);
  fake_quantize(blocks, rounding, x.data(), dtype, n, fake.data(), nullptr);
  fake_quantize_ref(blocks, rounding, x.data(), dtype, n, 0, want.last(), fake_want.data());
  EXPECT_SAME(fake, fake_want);
  std::string bits = got.bits() + fake.bits();

  DeviceArray residual(DType::F32, n, offset.residual), residual_want(DType::F32, n);
  residual.fill(9, -0.1f, 0.1f);
  residual_want.copy(residual);
  quantize(blocks, rounding, x.data(), dtype, residual.floats(), n, got.out(), nullptr);
  quantize_ref(blocks, rounding, x.data(), dtype, residual_want.floats(), n, 0, want.last(), want.out());
  EXPECT_SAME(got, want);
  EXPECT_SAME(residual, residual_want);
  EXPECT_TRUE(x.guards_intact());
  return bits + got.bits() + residual.bits();
}

std::string words(const Kind& kind, int64_t group, int64_t n, DType dtype) {
  return std::string(kind.name) + " group " + std::to_string(group) + " n " + std::to_string(n) + " " + dtype_name(dtype);
}

TEST(DeviceQuantize, HasTheBitsOfTheReferenceInEveryOrder) {
  for (const Kind& kind : kKinds) {
    for (int64_t group : kGroups) {
      const int64_t n = (blocks_at_once(group) + 1) * group - group / 3;  // two blocks of threads; the last block of the array is not full
      for (bool stochastic : {false, true}) {
        SCOPED_TRACE(words(kind, group, n, DType::F32) + (stochastic ? " stochastic" : ""));
        in_every_order([&] {
          return expect_reference({kind.format, kind.symmetric, group}, {stochastic, 77, 8}, DType::F32, n, {0, 0, 0});
        });
        if (HasFailure()) return;
      }
    }
  }
}

TEST(DeviceQuantize, HasTheBitsOfTheReferenceForEverySizeAndAddress) {
  const Offsets all[] = {{0, 0, 0}, {3, 3, 3}, {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {0, 0, 8}};
  for (const Kind& kind : kKinds) {
    for (int64_t group : {1, 3, 8, 17, 64, 257, 1025}) {
      for (int64_t n : {int64_t{1}, group - 1, group, group + 1, 2 * group + group / 2 + 1}) {
        if (n <= 0) continue;
        for (DType dtype : kFloats) {
          for (const Offsets& offset : all) {
            if (dtype != DType::F32 && (&offset - all > 1 || n == group - 1)) continue;  // the same addresses, other words
            SCOPED_TRACE(words(kind, group, n, dtype) + " offsets " + std::to_string(offset.x) + std::to_string(offset.residual) +
                         std::to_string(offset.codes));
            expect_reference({kind.format, kind.symmetric, group}, {(n + group) % 2 == 0, uint64_t{1} << 40, 1 << 20}, dtype, n, offset);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(DeviceQuantize, NumbersReadAsNumbers) {
  for (const Kind& kind : kKinds) {
    const Blocks blocks{kind.format, kind.symmetric, 3};
    const int64_t count = 60, n = 3 * count;
    DeviceArray x(DType::F32, n), out(DType::F32, n);
    float high = std::numeric_limits<float>::max();
    for (int64_t b = 0; b < count; ++b, high = std::nextafter(high, 0.0f)) {
      x.floats()[3 * b] = b % 2 == 0 ? 0.0f : 0x1.8p126f;
      x.floats()[3 * b + 1] = x.floats()[3 * b + 2] = high;
    }
    Stored got(blocks, n), want(blocks, n);
    quantize(blocks, {}, x.data(), DType::F32, nullptr, n, got.out(), nullptr);
    quantize_ref(blocks, {}, x.data(), DType::F32, nullptr, n, 0, want.last(), want.out());
    EXPECT_SAME(got, want) << kind.name;
    const ConstQuantized source = got.in();
    dequantize_reduce(blocks, &source, 1, 1.0f, n, out.data(), DType::F32, nullptr, nullptr);
    for (int64_t i = 0; i < n; ++i) EXPECT_TRUE(std::isfinite(out.floats()[i])) << kind.name << " " << i;
  }
}

// Sources with every byte there is, also such as quantising never writes.
struct Sources {
  Sources(const Blocks& blocks, int64_t n, int count, int64_t offset) {
    stored.reserve(static_cast<size_t>(count));
    std::mt19937 generator(static_cast<unsigned>(count));
    for (int k = 0; k < count; ++k) {
      stored.emplace_back(blocks, n, offset);
      Stored& s = stored.back();
      for (int64_t i = 0; i < s.data.size(); ++i) s.data.as<uint8_t>()[i] = static_cast<uint8_t>(generator());
      s.scale.fill(generator(), 0.01f, 1.0f), s.zero.fill(generator());
      at.push_back(s.in());
    }
  }
  std::vector<Stored> stored;
  std::vector<ConstQuantized> at;
};

std::string expect_reduced(const Blocks& blocks, const Sources& from, float factor, int64_t n, DeviceArray* got, const Kind* again_kind,
                           const Rounding& rounding, int64_t offset) {
  const int count = static_cast<int>(from.at.size());
  const DType dtype = got != nullptr ? got->dtype() : DType::F32;
  DeviceArray want(dtype, n);
  const Blocks next = again_kind != nullptr ? Blocks{again_kind->format, again_kind->symmetric, blocks.group_size} : blocks;
  Stored again(next, n, offset), again_want(next, n);
  Requantize to{next.format, next.symmetric, rounding, again.out()}, to_want{next.format, next.symmetric, rounding, again_want.out()};
  dequantize_reduce(blocks, from.at.data(), count, factor, n, got != nullptr ? got->data() : nullptr, dtype,
                    again_kind != nullptr ? &to : nullptr, nullptr);
  dequantize_reduce_ref(blocks, from.at.data(), count, factor, n, 0, again_want.last(), want.data(), dtype,
                        again_kind != nullptr ? &to_want : nullptr);
  EXPECT_SAME(again, again_want);
  if (got == nullptr) return again.bits();
  EXPECT_TRUE(got->guards_intact());
  for (int64_t i = 0; i < n; ++i) {  // which of two NaNs a sum hands on is the compiler's choice
    if (std::isnan(want.get(i))) EXPECT_TRUE(std::isnan(got->get(i))) << i;
    else EXPECT_EQ(float_bits(got->get(i)), float_bits(want.get(i))) << i << ": " << got->get(i) << ", not " << want.get(i);
    if (::testing::Test::HasFailure()) break;
  }
  return again.bits() + got->bits();
}

TEST(DeviceQuantize, BlocksOfThreadsGoOnWithTheNextBlocks) {
  for (int64_t group : {1, 5, 64, 257, 1025, 2500}) {
    for (const Kind& kind : {kKinds[0], kKinds[1], kKinds[6]}) {
      const int64_t n = (5 * blocks_at_once(group) + 1) * group + group / 2;
      SCOPED_TRACE(words(kind, group, n, DType::BF16));
      host_cuda::limit_grid(2);
      in_every_order([&] {
        const Blocks blocks{kind.format, kind.symmetric, group};
        std::string bits = expect_reference(blocks, {true, 3, 4}, DType::BF16, n, {0, 0, 0});
        const Sources from(blocks, n, 1, 0);
        DeviceArray got(DType::F16, n);
        return bits + expect_reduced(blocks, from, 1.0f, n, &got, nullptr, {}, 0);
      });
      host_cuda::limit_grid(0);
      if (HasFailure()) return;
    }
  }
}

TEST(DeviceDequantizeReduce, EveryFormatGoesToEveryOther) {
  for (const Kind& kind : kKinds) {
    for (const Kind& next : kKinds) {
      for (int64_t group : {5, 64, 1032}) {
        const int64_t n = 2 * group + group / 2;
        SCOPED_TRACE(words(kind, group, n, DType::F32) + " to " + next.name);
        const Blocks blocks{kind.format, kind.symmetric, group};
        for (int count : {1, 2}) {
          const Sources from(blocks, n, count, 0);
          DeviceArray out(DType::F32, n);
          expect_reduced(blocks, from, 0.5f, n, &out, &next, {group == 64, 5, 4}, 0);
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST(DeviceDequantizeReduce, HasTheBitsOfTheReferenceForEverySizeAndAddress) {
  for (const Kind& kind : kKinds) {
    const Kind& next = kKinds[static_cast<size_t>(&kind - kKinds + 1) % std::size(kKinds)];
    for (int64_t group : {1, 8, 9, 100, 264, 1025}) {
      const Blocks blocks{kind.format, kind.symmetric, group};
      for (int64_t n : {int64_t{1}, group, 2 * group + group / 2 + 1}) {
        for (int64_t offset : {0, 1, 8}) {
          for (int count : {1, 3}) {
            const Sources from(blocks, n, count, offset);
            for (DType dtype : kFloats) {
              SCOPED_TRACE(words(kind, group, n, dtype) + " offset " + std::to_string(offset) + " sources " + std::to_string(count));
              DeviceArray out(dtype, n, offset), both(dtype, n, offset == 1 ? 0 : 3);
              expect_reduced(blocks, from, count == 1 ? 1.0f : 1.0f / 3.0f, n, &out, nullptr, {}, 0);
              if (dtype == DType::F16) expect_reduced(blocks, from, 1.0f, n, &both, &next, {true, 5, 4}, 1);
              if (dtype == DType::F32) expect_reduced(blocks, from, 1.0f, n, nullptr, &next, {false, 5, 4}, 0);
              if (HasFailure()) return;
            }
          }
        }
      }
    }
  }
}

TEST(DeviceDequantizeReduce, RequantisesTheSameInEveryOrder) {
  for (int64_t group : {20, 300, 1100, 3001}) {
    const int64_t n = (blocks_at_once(group) + 1) * group + 5;
    const Blocks blocks{QuantFormat::INT8, false, group};
    SCOPED_TRACE(words(kKinds[1], group, n, DType::BF16));
    const Sources from(blocks, n, 2, 0);
    in_every_order([&] {
      DeviceArray out(DType::BF16, n);
      return expect_reduced(blocks, from, 0.5f, n, &out, &kKinds[3], {true, 5, 4}, 0);
    });
  }
}

TEST(DeviceDequantizeReduce, AsManySourcesAsFit) {
  const Blocks blocks{QuantFormat::INT4, true, 24};
  const Sources from(blocks, 100, kCudaMaxQuantized, 0), more(blocks, 100, kCudaMaxQuantized + 1, 0);
  DeviceArray out(DType::F32, 100);
  expect_reduced(blocks, from, 1.0f / kCudaMaxQuantized, 100, &out, &kKinds[4], {}, 0);
  EXPECT_THROW(expect_reduced(blocks, more, 1.0f, 100, &out, nullptr, {}, 0), ValueError);
}

TEST(DeviceQuantize, NothingIsWrittenOfNothing) {
  const Blocks blocks{QuantFormat::INT8, true, 4};
  const ConstQuantized none{nullptr, nullptr, nullptr};
  const Requantize again{QuantFormat::INT4, true, {}, {nullptr, nullptr, nullptr}};
  quantize(blocks, {}, nullptr, DType::F32, nullptr, 0, {nullptr, nullptr, nullptr}, nullptr);
  fake_quantize(blocks, {}, nullptr, DType::F32, 0, nullptr, nullptr);
  dequantize_reduce(blocks, &none, 1, 1.0f, 0, nullptr, DType::F32, &again, nullptr);
}

TEST(DeviceQuantize, RefusesBadArguments) {
  const Blocks good{QuantFormat::INT8, true, 4};
  Stored s(good, 8);
  float x[8] = {};
  const auto with = [&](const Blocks& b, const void* from, DType dtype, const Quantized& out) {
    quantize(b, {}, from, dtype, nullptr, 8, out, nullptr);
  };
  EXPECT_THROW(with({QuantFormat::INT8, true, 0}, x, DType::F32, s.out()), ValueError);
  EXPECT_THROW(with({QuantFormat::FP8_E4M3, false, 4}, x, DType::F32, s.out()), ValueError);
  EXPECT_THROW(with({QuantFormat::INT8, false, 4}, x, DType::F32, s.out()), ValueError);
  EXPECT_THROW(with({static_cast<QuantFormat>(9), true, 4}, x, DType::F32, s.out()), ValueError);
  EXPECT_THROW(with(good, nullptr, DType::F32, s.out()), ValueError);
  EXPECT_THROW(with(good, x, DType::I32, s.out()), ValueError);
  EXPECT_THROW(with(good, x, DType::F32, {nullptr, s.scale.floats(), nullptr}), ValueError);
  EXPECT_THROW(fake_quantize(good, {}, x, DType::F32, 8, nullptr, nullptr), ValueError);
  EXPECT_THROW(fake_quantize(good, {}, x, DType::F64, 8, x, nullptr), ValueError);
  const ConstQuantized in = s.in();
  EXPECT_THROW(dequantize_reduce(good, &in, 0, 1.0f, 8, x, DType::F32, nullptr, nullptr), ValueError);
  EXPECT_THROW(dequantize_reduce(good, &in, 1, 1.0f, 8, x, DType::I8, nullptr, nullptr), ValueError);
  const Requantize asymmetric{QuantFormat::INT4, false, {}, s.out()};
  EXPECT_THROW(dequantize_reduce(good, &in, 1, 1.0f, 8, x, DType::F32, &asymmetric, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
