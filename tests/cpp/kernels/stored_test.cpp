// SPDX-License-Identifier: Apache-2.0
// Updates of slices in every form: the bits of the scalar reference on every instruction set; split masters with the bits of float32 ones; rounding
// that depends on nothing but seed, draw and element; 8-bit codes within their stated error.
#include "kernels/optim/stored.h"

#include <functional>

#include "base/error.h"
#include "kernels/optim/forms.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

std::vector<Rule> rules() {
  return {AdamConstants({1e-2, 0.9, 0.999, 1e-8, 0.1, true, true, 3}), AdamConstants({1e-2, 0.9, 0.999, 1e-8, 0.1, false, true, 3}),
          LionConstants({1e-2, 0.9, 0.99, 0.1}), AdagradConstants({1e-2, 1e-10, 0.1}), SgdConstants({1e-2, 0.9, 0.1, 0.1, true, false}),
          SgdConstants({1e-2, 0, 0, 0, false, true})};
}

// An array in some form with its scales or low bits, guarded on both sides.
class Held {
 public:
  Held(Form form, int64_t n, int64_t offset = 0)
      : form_(form), n_(n), data_((n + 2 * kPad + offset) * form_size(form), kGuard), offset_((kPad + offset) * form_size(form)),
        extra_(extra_bytes() + 2 * kPad, kGuard) {
    std::fill_n(data(), n * form_size(form), uint8_t{0});
    std::fill_n(extra(), extra_bytes(), uint8_t{0});
  }
  Stored stored() { return {form_, data(), extra()}; }
  void fill(unsigned seed, float low, float high) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<float> value(low, high);
    std::vector<float> x(n_);
    for (float& v : x) v = value(generator);
    narrow_ref(x.data(), stored(), {}, n_);
  }
  std::vector<float> values() {
    std::vector<float> x(n_);
    widen_ref(stored(), x.data(), n_);
    return x;
  }
  bool same(Held& other) {
    return std::equal(data(), data() + n_ * form_size(form_), other.data()) && std::equal(extra(), extra() + extra_bytes(), other.extra());
  }
  bool guards_intact() {
    const auto clean = [](const std::vector<uint8_t>& v, size_t begin, size_t end) {
      for (size_t i = 0; i < v.size(); ++i) {
        if ((i < begin || i >= end) && v[i] != kGuard) return false;
      }
      return true;
    };
    return clean(data_, offset_, offset_ + n_ * form_size(form_)) && clean(extra_, kPad, kPad + extra_bytes());
  }

 private:
  static constexpr uint8_t kGuard = 0xa5;
  static constexpr int64_t kPad = 64;
  size_t extra_bytes() const { return form_ == Form::Split ? 2 * n_ : form_size(form_) == 1 ? 4 * code_blocks(n_) : 0; }
  uint8_t* data() { return data_.data() + offset_; }
  uint8_t* extra() { return extra_.data() + kPad; }
  Form form_;
  int64_t n_;
  std::vector<uint8_t> data_;
  int64_t offset_;
  std::vector<uint8_t> extra_;
};

struct Case {
  Held p, s0, s1;
  Array g, low;
  Case(int64_t n, int64_t offset, Form p_form, Form s0_form, Form s1_form, DType g_dt)
      : p(p_form, n, offset), s0(s0_form, n, offset), s1(s1_form, n), g(g_dt, n, offset), low(DType::BF16, n, offset) {
    p.fill(2, -2, 2);
    s0.fill(3, -0.1f, 0.1f);
    s1.fill(4, 0.0f, 0.1f);
    g.fill(1);
  }
  Slice slice(bool with_low) {
    return {p.stored(), g.data(), g.dtype(), {s0.stored(), s1.stored()}, with_low ? low.data() : nullptr, DType::BF16, {7, 3, 1000001}};
  }
};

TEST(Stored, HasTheBitsOfTheReference) {
  const std::pair<Form, Form> states[] = {{Form::F32, Form::F32}, {Form::BF16, Form::BF16}, {Form::F16, Form::F32}, {Form::Signed8, Form::Unsigned8}};
  for_every_slice([&](int64_t n, int64_t offset) {
    for (const Rule& rule : rules()) {
      for (Form form : {Form::F32, Form::BF16, Form::F16, Form::Split, Form::Stochastic}) {
        for (const auto& [first, second] : states) {
          const bool is_sum = std::holds_alternative<AdagradConstants>(rule);
          const Form s0 = is_sum ? second : first;
          Case ours(n, offset, form, s0, second, DType::BF16), want(n, 0, form, s0, second, DType::BF16);
          if (is_sum) ours.s0.fill(5, 0.0f, 0.1f), want.s0.fill(5, 0.0f, 0.1f);
          step(rule, 0.5f, ours.slice(form == Form::F32), n);
          step_ref(rule, 0.5f, want.slice(form == Form::F32), n);
          SCOPED_TRACE(std::string(form_name(form)) + " " + form_name(s0) + " rule " + std::to_string(rule.index()));
          EXPECT_TRUE(ours.p.same(want.p) && ours.p.guards_intact());
          EXPECT_TRUE(ours.s0.same(want.s0) && ours.s0.guards_intact());
          EXPECT_TRUE(ours.s1.same(want.s1) && ours.s1.guards_intact());
          EXPECT_SAME(ours.low, want.low);
        }
      }
    }
  });
}

Rule at_step(const Rule& rule, int64_t step) {
  if (std::holds_alternative<AdamConstants>(rule)) return AdamConstants({1e-2, 0.9, 0.999, 1e-8, 0.1, true, true, step});
  return rule;
}

// The master, its states and the weight, bit for bit, at each of 100 steps.
TEST(Stored, SplitMasterIsAFloat32Master) {
  const int64_t n = 1003;
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    for (const Rule& rule : rules()) {
      Case split(n, 1, Form::Split, Form::F32, Form::F32, DType::F32), wide(n, 0, Form::F32, Form::F32, Form::F32, DType::F32);
      split.s0.fill(5, 0.0f, 0.1f);  // also a sum of squares
      wide.s0.fill(5, 0.0f, 0.1f);
      for (int64_t t = 1; t <= 100; ++t) {
        split.g.fill(100 + t);
        wide.g.fill(100 + t);
        step(at_step(rule, t), 0.5f, split.slice(false), n);
        step(at_step(rule, t), 0.5f, wide.slice(false), n);
        const std::vector<float> masters = wide.p.values();
        ASSERT_EQ(split.p.values(), masters) << hwy::TargetName(target) << " rule " << rule.index() << " step " << t;
        ASSERT_TRUE(split.s0.same(wide.s0) && split.s1.same(wide.s1));
        const auto* weights = static_cast<const uint16_t*>(split.p.stored().data);
        for (int64_t i = 0; i < n; ++i) {  // a nearest bfloat16: no further than half a unit in the last place
          const float weight = bf16_to_float(weights[i]), unit = std::ldexp(1.0f, std::ilogb(masters[i]) - 7);
          ASSERT_LE(std::abs(weight - masters[i]), unit / 2);
        }
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(Stored, AnyLowBitsRoundToTheirWeight) {
  std::vector<uint16_t> weights, lows;
  for (uint32_t w = 0; w <= 0xffffu; ++w) {
    if (bits_are_nan(w << 16)) continue;   // stays one
    for (uint16_t low : {uint16_t{0}, uint16_t{1}, uint16_t{0x7fff}, uint16_t{0x8000}, uint16_t{0xffff}}) {
      const float x = join_split(static_cast<uint16_t>(w), low);
      ASSERT_FALSE(std::isnan(x)) << w << " " << low;
      ASSERT_EQ(split_weight(x), w) << low;
      weights.push_back(static_cast<uint16_t>(w));
      lows.push_back(low);
    }
  }
  std::vector<float> values(weights.size());
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    widen({Form::Split, weights.data(), lows.data()}, values.data(), static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(bits_of(values[i]), bits_of(join_split(weights[i], lows[i]))) << hwy::TargetName(target);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(Stored, SplitKeepsEveryValue) {
  for (uint64_t u = 0; u < (uint64_t{1} << 32); u += 977) {
    const float x = of_bits(static_cast<uint32_t>(u)), back = join_split(split_weight(x), split_low(x));
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(back) && std::isnan(bf16_to_float(split_weight(x))));
    } else {
      ASSERT_EQ(bits_of(back), u);
    }
  }
  for (uint32_t u : {0x7f800000u, 0xff800000u, 0x7f7fffffu, 0x3f808000u, 0x3f818000u, 0x80000000u, 0x00000001u}) {
    EXPECT_EQ(bits_of(join_split(split_weight(of_bits(u)), split_low(of_bits(u)))), u);
  }
  EXPECT_TRUE(std::isnan(bf16_to_float(split_weight(of_bits(0xffffffffu)))));
}

TEST(Stored, RoundingDependsOnSeedDrawAndElementAlone) {
  const int64_t n = 3001;
  std::vector<float> x(n, 1.001f);
  std::vector<uint16_t> whole(n), pieces(n), other(n);
  const Dice dice{42, 5, 123};
  narrow(x.data(), {Form::Stochastic, whole.data(), nullptr}, dice, n);
  for (int64_t begin = 0, piece = 1; begin < n; begin += piece, piece = std::min(2 * piece + 1, n - begin)) {
    narrow(x.data() + begin, Stored{Form::Stochastic, pieces.data(), nullptr}.at(begin), {42, 5, 123 + uint64_t(begin)}, std::min(piece, n - begin));
  }
  EXPECT_EQ(whole, pieces);
  for (const Dice& d : {Dice{43, 5, 123}, Dice{42, 6, 123}, Dice{42, 5, 124}}) {
    narrow(x.data(), {Form::Stochastic, other.data(), nullptr}, d, n);
    EXPECT_NE(whole, other);
  }
  // 1.001 lies 0.128 of the way from 1 to the next bfloat16, 1.0078125: a binomial count within 5 deviations.
  const double share = (bits_of(1.001f) & 0xffffu) / 65536.0;
  const auto up = std::count(whole.begin(), whole.end(), uint16_t{0x3f81});
  EXPECT_EQ(up + std::count(whole.begin(), whole.end(), uint16_t{0x3f80}), n);
  EXPECT_LE(std::abs(up - share * n), 5 * std::sqrt(share * (1 - share) * n));
}

TEST(Stored, RoundingKeepsWhatIsExactOrNotFinite) {
  for (uint32_t u : {0x3f800000u, 0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0xc2280000u}) {
    for (uint32_t dice : {0u, 1u, 0xffffu}) EXPECT_EQ(uint32_t{round_stochastically(of_bits(u), dice)} << 16, u);
  }
  EXPECT_TRUE(std::isnan(bf16_to_float(round_stochastically(of_bits(0x7f800001u), 0xffff))));
}

// The errors that forms.h promises, for values over many magnitudes.
TEST(Stored, CodesStayWithinTheirError) {
  const int64_t n = 4 * kCodeBlock + 77;
  std::mt19937 generator(9);
  std::uniform_real_distribution<float> exponent(-20, 3), sign(-1, 1);
  std::vector<float> m(n), v(n);
  for (int64_t i = 0; i < n; ++i) {
    v[i] = std::exp2(exponent(generator));
    m[i] = sign(generator) < 0 ? -v[i] : v[i];
  }
  Held signed8(Form::Signed8, n), unsigned8(Form::Unsigned8, n);
  narrow(m.data(), signed8.stored(), {}, n);
  narrow(v.data(), unsigned8.stored(), {}, n);
  const std::vector<float> m_back = signed8.values(), v_back = unsigned8.values();
  for (int64_t block = 0; block < code_blocks(n); ++block) {
    const int64_t begin = block * kCodeBlock, end = std::min(n, begin + kCodeBlock);
    const float scale = *std::max_element(v.begin() + begin, v.begin() + end);
    for (int64_t i = begin; i < end; ++i) {
      if (v[i] == scale) {
        EXPECT_EQ(m_back[i], m[i]);
        EXPECT_EQ(v_back[i], scale);
      }
      const double t = double{v[i]} / scale, slack = 1 + 1e-6;
      EXPECT_LE(std::abs(double{m_back[i]} - m[i]) / scale, (std::sqrt(t) / 127 + 1.0 / 64516) * slack);
      EXPECT_LE(std::abs(std::pow(double{v_back[i]} / scale, 0.25) - std::pow(t, 0.25)), (t < std::pow(1.0 / 256, 4) ? 1.0 / 256 : 1.0 / 512) * slack);
      EXPECT_GT(v_back[i], 0.0f);
    }
  }
}

TEST(Stored, CodesOfZerosTinyAndNotFiniteBlocks) {
  for (float x : {0.0f, 1e-40f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> values(kCodeBlock + 1, 1.0f);
    std::fill_n(values.begin(), kCodeBlock, 0.0f);
    values[17] = x;
    for (Form form : {Form::Signed8, Form::Unsigned8}) {
      Held codes(form, values.size());
      narrow(values.data(), codes.stored(), {}, values.size());
      const std::vector<float> back = codes.values();
      for (int64_t i = 0; i < kCodeBlock; ++i) EXPECT_TRUE(std::isfinite(x) ? back[i] == 0.0f : std::isnan(back[i]));
      EXPECT_EQ(back[kCodeBlock], 1.0f);
    }
  }
}

TEST(Stored, RefusesBadArguments) {
  float x[4] = {};
  const Rule adam = rules()[0];
  const auto slice = [&](Stored p, Stored state, void* low = nullptr) { return Slice{p, x, DType::F32, {state, state}, low, DType::BF16, {}}; };
  const Stored plain{Form::F32, x, nullptr};
  EXPECT_THROW(step(adam, 1, slice({Form::Split, x, nullptr}, plain), 4), ValueError);
  EXPECT_THROW(step(adam, 1, slice({Form::Signed8, x, x}, plain), 4), ValueError);
  EXPECT_THROW(step(adam, 1, slice(plain, {Form::Unsigned8, x, nullptr}), 4), ValueError);
  EXPECT_THROW(step(adam, 1, slice(plain, {Form::Split, x, x}), 4), ValueError);
  EXPECT_THROW(step(adam, 1, slice({Form::BF16, x, nullptr}, plain, x), 4), ValueError);
  EXPECT_THROW(step(adam, 1, slice(plain, {Form::F32, nullptr, nullptr}), 4), ValueError);
  EXPECT_THROW(step(adam, 1, {plain, x, DType::F64, {plain, plain}, nullptr, DType::F32, {}}, 4), ValueError);
  EXPECT_THROW(step(adam, 1, {plain, x, DType::F32, {plain, plain}, x, DType::I16, {}}, 4), ValueError);
  step(adam, 1, slice({Form::F32, nullptr, nullptr}, {Form::F32, nullptr, nullptr}), 0);
}

TEST(Stored, WidenAndNarrowRefuseWhatIsMissing) {
  float x[4] = {};
  const auto refuses = [&](const Stored& bad, const char* said) {
    const std::function<void()> calls[] = {[&] { widen(bad, x, 4); }, [&] { widen_ref(bad, x, 4); }, [&] { narrow(x, bad, {}, 4); },
                                           [&] { narrow_ref(x, bad, {}, 4); }};
    for (const auto& call : calls) {
      try {
        call();
        ADD_FAILURE() << "took an array " << said;
      } catch (const ValueError& e) {
        EXPECT_NE(e.message.find(said), std::string::npos) << e.message;
      }
    }
  };
  refuses({Form::F32, nullptr, nullptr}, "is null");
  refuses({Form::Signed8, x, nullptr}, "without scales");
  refuses({Form::Unsigned8, x, nullptr}, "without scales");
  refuses({Form::Split, x, nullptr}, "without low bits");
  EXPECT_THROW(widen({Form::F32, x, nullptr}, nullptr, 4), ValueError);
  EXPECT_THROW(narrow(nullptr, {Form::F32, x, nullptr}, {}, 4), ValueError);
  widen({Form::Signed8, nullptr, nullptr}, nullptr, 0);
  narrow(nullptr, {Form::Split, nullptr, nullptr}, {}, 0);
}

}  // namespace
}  // namespace ds::kernels::testing
