// SPDX-License-Identifier: Apache-2.0
// Whole arrays between float32 and any form by CUDA kernels, run on the host: the bits of the scalar reference and of the SIMD kernels.
#include "base/error.h"
#include "stored_arrays.h"

namespace ds::kernels::testing {
namespace {

constexpr Form kForms[] = {Form::F32, Form::F16, Form::BF16, Form::Split, Form::Stochastic, Form::Signed8, Form::Unsigned8};
// Around a thread's group, a block of codes, and a block of threads.
constexpr int64_t kSizes[] = {0, 1, 3, 4, 5, 255, 256, 257, 1023, 1024, 1025, 2309};

bool is_code(Form form) { return form_size(form) == 1; }

// Values of many magnitudes; those of unsigned codes are not negative. No NaN: its bits are a processor's own.
DeviceArray values_for(Form form, int64_t n, int64_t offset, unsigned seed) {
  DeviceArray x(DType::F32, n, offset);
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> exponent(-30, 15), sign(-1, 1);
  for (int64_t i = 0; i < n; ++i) {
    const float size = std::exp2(exponent(generator));
    x.set(i, sign(generator) < 0 && form != Form::Unsigned8 ? -size : size);
  }
  if (is_code(form)) return x;
  const uint32_t special[] = {0x80000000u, 0x7f800000u, 0xff800000u, 0x7f7fffffu, 0x00000001u,
                              0x3f808000u, 0x3f818000u, 0x477fefffu, 0x477ff000u};
  for (int64_t i = 0; i < 9 && 5 * i + 1 < n; ++i) x.set(5 * i + 1, of_bits(special[i]));
  return x;
}

template <class Body>
void for_every_array(const Body& body) {
  for (Form form : kForms) {
    for (int64_t n : kSizes) {
      for (int64_t offset : {0, 1, 3}) {
        SCOPED_TRACE(std::string(form_name(form)) + " n " + std::to_string(n) + " offset " + std::to_string(offset));
        if (is_code(form)) in_every_order([&] { return body(form, n, offset); });
        else body(form, n, offset);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST(DeviceForms, NarrowHasTheBitsOfTheReference) {
  for_every_array([](Form form, int64_t n, int64_t offset) {
    std::string bits;
    for (uint64_t first : {uint64_t{0}, uint64_t{4}, uint64_t{1000001}, (uint64_t{7} << 40) + 3}) {  // in eights, fours, neither
      if (first > 0 && form != Form::Stochastic) continue;
      DeviceArray x = values_for(form, n, offset, 1);
      const std::string before = x.bits();
      StoredArray got(form, n, offset), simd(form, n, offset), want(form, n);
      const Dice dice{uint64_t{42} << 35, uint64_t{3} << 33, first};
      narrow(x.floats(), got.stored(), dice, n, nullptr);
      if (n > 0) narrow(x.floats(), simd.stored(), dice, n);
      narrow_ref(x.floats(), want.stored(), dice, n);
      EXPECT_SAME(got, want);
      EXPECT_SAME(simd, want);
      EXPECT_TRUE(x.guards_intact() && x.bits() == before);
      bits += got.bits();
    }
    return bits;
  });
}

TEST(DeviceForms, WidenHasTheBitsOfTheReference) {
  for_every_array([](Form form, int64_t n, int64_t offset) {
    DeviceArray x = values_for(form, n, 0, 2), got(DType::F32, n, offset), simd(DType::F32, n, offset), want(DType::F32, n);
    StoredArray stored(form, n, offset);
    narrow_ref(x.floats(), stored.stored(), {1, 2, 3}, n);
    const std::string before = stored.bits();
    widen(stored.stored(), got.floats(), n, nullptr);
    if (n > 0) widen(stored.stored(), simd.floats(), n);
    widen_ref(stored.stored(), want.floats(), n);
    EXPECT_SAME(got, want);
    EXPECT_SAME(simd, want);
    EXPECT_TRUE(stored.guards_intact() && stored.bits() == before);
    return got.bits();
  });
}

// Any one array that begins elsewhere takes the whole groups of four away.
TEST(DeviceForms, OneMisalignedArrayIsNoticed) {
  const int64_t n = 1030;
  for (Form form : kForms) {
    for (int which = 0; which < 3; ++which) {
      SCOPED_TRACE(std::string(form_name(form)) + " " + std::to_string(which));
      DeviceArray x = values_for(form, n, which == 0, 1), back(DType::F32, n, which == 0), want_back(DType::F32, n);
      StoredArray got(form, n, which == 1, which == 2), want(form, n);
      narrow(x.floats(), got.stored(), {}, n, nullptr);
      narrow_ref(x.floats(), want.stored(), {}, n);
      widen(got.stored(), back.floats(), n, nullptr);
      widen_ref(want.stored(), want_back.floats(), n);
      EXPECT_SAME(got, want);
      EXPECT_SAME(back, want_back);
    }
  }
}

// Every weight and some low bits, as somebody may have written the weight since.
TEST(DeviceForms, AnyLowBitsJoinTheirWeight) {
  for (uint16_t low : {uint16_t{0}, uint16_t{1}, uint16_t{0x7fff}, uint16_t{0x8000}, uint16_t{0xffff}}) {
    std::vector<uint16_t> weights, lows;
    for (uint32_t w = 0; w <= 0xffffu; w += 5) {
      if (bits_are_nan(w << 16)) continue;
      weights.push_back(static_cast<uint16_t>(w));
    }
    for (uint32_t w : {0x0000u, 0x8000u, 0x7f80u, 0xff80u, 0x7f7fu, 0xff7fu}) weights.push_back(static_cast<uint16_t>(w));
    lows.assign(weights.size(), low);
    const auto n = static_cast<int64_t>(weights.size());
    DeviceArray values(DType::F32, n);
    StoredArray back(Form::Split, n);
    widen({Form::Split, weights.data(), lows.data()}, values.floats(), n, nullptr);
    narrow(values.floats(), back.stored(), {}, n, nullptr);
    for (size_t i = 0; i < weights.size(); ++i) {
      ASSERT_EQ(bits_of(values.get(static_cast<int64_t>(i))), bits_of(join_split(weights[i], low))) << weights[i];
      ASSERT_EQ(static_cast<uint16_t*>(back.stored().data)[i], weights[i]) << low;
    }
  }
}

TEST(DeviceForms, NanStaysNan) {
  for (Form form : {Form::F32, Form::F16, Form::BF16, Form::Split, Form::Stochastic}) {
    for (uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xffffffffu}) {
      DeviceArray x(DType::F32, 5), back(DType::F32, 5);
      StoredArray stored(form, 5);
      for (int64_t i = 0; i < 5; ++i) x.set(i, i == 2 ? of_bits(bits) : 1.0f);
      narrow(x.floats(), stored.stored(), {}, 5, nullptr);
      widen(stored.stored(), back.floats(), 5, nullptr);
      for (int64_t i = 0; i < 5; ++i) EXPECT_EQ(std::isnan(back.get(i)), i == 2) << form_name(form) << " " << bits;
    }
  }
}

// A block of codes is nothing's neighbour: what is not finite or too small there is not seen in the next one.
TEST(DeviceForms, CodesOfZerosTinyAndNotFiniteBlocks) {
  const int64_t n = 4 * kCodeBlock + 1;
  for (float special : {0.0f, 1e-40f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    for (Form form : {Form::Signed8, Form::Unsigned8}) {
      for (int64_t block : {0, 1, 2, 3}) {
        in_every_order([&] {
          DeviceArray x(DType::F32, n), back(DType::F32, n);
          for (int64_t i = 0; i < n; ++i) x.set(i, i / kCodeBlock == block ? 0.0f : 1.0f + static_cast<float>(i / kCodeBlock));
          x.set(block * kCodeBlock + 50 * (block + 1), special);
          StoredArray codes(form, n);
          narrow(x.floats(), codes.stored(), {}, n, nullptr);
          widen(codes.stored(), back.floats(), n, nullptr);
          for (int64_t i = 0; i < n; ++i) {
            if (i / kCodeBlock != block) EXPECT_EQ(back.get(i), x.get(i));
            else EXPECT_TRUE(std::isfinite(special) ? back.get(i) == 0.0f : std::isnan(back.get(i))) << i;
          }
          return codes.bits();
        });
      }
    }
  }
}

TEST(DeviceForms, RoundingDependsOnSeedDrawAndElementAlone) {
  const int64_t n = 3001;
  DeviceArray x(DType::F32, n);
  for (int64_t i = 0; i < n; ++i) x.set(i, 1.001f);
  StoredArray whole(Form::Stochastic, n), pieces(Form::Stochastic, n);
  narrow(x.floats(), whole.stored(), {42, 5, 123}, n, nullptr);
  for (int64_t begin = 0, piece = 1; begin < n; begin += piece, piece = std::min(2 * piece + 1, n - begin)) {
    narrow(x.floats() + begin, pieces.stored().at(begin), {42, 5, 123 + static_cast<uint64_t>(begin)}, std::min(piece, n - begin), nullptr);
  }
  EXPECT_SAME(whole, pieces);
  for (const Dice& d : {Dice{43, 5, 123}, Dice{42, 6, 123}, Dice{42, 5, 124}}) {
    StoredArray other(Form::Stochastic, n);
    narrow(x.floats(), other.stored(), d, n, nullptr);
    EXPECT_FALSE(whole.same_bits(other));
  }
}

TEST(DeviceForms, RefusesBadArguments) {
  float x[4] = {};
  EXPECT_THROW(widen({Form::F32, nullptr, nullptr}, x, 4, nullptr), ValueError);
  EXPECT_THROW(widen({Form::F32, x, nullptr}, nullptr, 4, nullptr), ValueError);
  EXPECT_THROW(narrow(nullptr, {Form::F32, x, nullptr}, {}, 4, nullptr), ValueError);
  EXPECT_THROW(narrow(x, {Form::F32, nullptr, nullptr}, {}, 4, nullptr), ValueError);
  EXPECT_THROW(narrow(x, {Form::F32, x, nullptr}, {}, -1, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
