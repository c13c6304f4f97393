// SPDX-License-Identifier: Apache-2.0
// The CUDA updates of slices in any form, many rows in a launch, run on the host: the bits of the scalar reference and of the SIMD kernels,
// step after step, in every order of threads.
#include "kernels/optim/stored.h"

#include "base/error.h"
#include "kernels/optim/forms.h"
#include "stored_arrays.h"

namespace ds::kernels::testing {
namespace {

std::vector<Rule> rules(int64_t step) {
  return {AdamConstants({1e-2, 0.9, 0.999, 1e-8, 0.1, true, true, step}),
          AdamConstants({1e-2, 0.3, 0.99, 1e-8, 0.1, false, false, step}),
          LionConstants({1e-2, 0.9, 0.99, 0.1}),
          AdagradConstants({1e-2, 1e-10, 0.1}),
          SgdConstants({1e-2, 0.9, 0.1, 0.1, true, step == 1}),
          SgdConstants({1e-2, 0, 0, 0, false, true})};
}
constexpr size_t kRules = 6;

// Rows without elements, of one, around a thread's group, a block of 8-bit codes and a chunk, and of several chunks, at all alignments.
const std::vector<int64_t> kNumels = {1, 0, 257, 1024, 3, 1025, 2500};

struct Kind {
  Form p, s0, s1;
};

// One row, and where its arrays begin.
struct Row {
  StoredArray p, s0, s1;
  DeviceArray g, low;
  Dice dice;
  int64_t n;
  Row(const Kind& kind, bool s0_is_sum, DType g_dt, DType low_dt, int64_t n_, int64_t offset, unsigned seed)
      : p(kind.p, n_, offset), s0(kind.s0, n_, offset), s1(kind.s1, n_, offset), g(g_dt, n_, offset), low(low_dt, n_, offset),
        dice{seed, 0, seed % 3 == 0 ? 1000001u : 8u * seed + 4 * (seed % 3 == 2)}, n(n_) {  // groups of eight, of four, and neither
    p.fill(seed, -2, 2);
    s0.fill(seed + 1, s0_is_sum ? 0.0f : -0.1f, 0.1f);
    s1.fill(seed + 2, 0.0f, 0.1f);
  }
  void next(int64_t step) {
    g.fill(dice.seed + static_cast<unsigned>(100 * step));
    if (n > 2) g.set(1, 0.0f), g.set(2, -0.0f);
    dice.draw = static_cast<uint64_t>(step) << 33;
  }
  Slice slice(bool with_low) {
    return {p.stored(), g.data(), g.dtype(), {s0.stored(), s1.stored()}, with_low ? low.data() : nullptr, low.dtype(), dice};
  }
  bool same(Row& other) { return p.same_bits(other.p) && s0.same_bits(other.s0) && s1.same_bits(other.s1) && low.same_bits(other.low); }
  bool guards_intact() const {
    return p.guards_intact() && s0.guards_intact() && s1.guards_intact() && low.guards_intact() && g.guards_intact();
  }
  std::string bits() const { return p.bits() + s0.bits() + s1.bits() + low.bits(); }
};

std::vector<Row> rows(const Kind& kind, const Rule& rule, DType low_dt, const std::vector<int64_t>& numels, bool is_aligned) {
  std::vector<Row> all;
  all.reserve(numels.size());
  for (size_t r = 0; r < numels.size(); ++r) {
    const int64_t offset = is_aligned ? 0 : std::array<int64_t, 3>{1, 0, 3}[r % 3];
    all.emplace_back(kind, std::holds_alternative<AdagradConstants>(rule), DType::F32, low_dt, numels[r], offset, static_cast<unsigned>(r));
  }
  return all;
}

// chunk_numel: 1024, what rows of this size get, or a multiple, which only far larger ones do.
ManyPlan plan_of(const std::vector<int64_t>& numels, int64_t chunk_numel) {
  ManyPlan plan = many_step_plan(numels);
  EXPECT_EQ(plan.chunk_numel, 1024);
  plan.chunk_numel = chunk_numel;
  plan.chunks = 0;
  for (int64_t n : numels) plan.chunks += (n + chunk_numel - 1) / chunk_numel;
  return plan;
}

void step_rows(const Rule& rule, std::vector<Row>& all, bool with_low, int64_t chunk_numel) {
  std::vector<Slice> slices;
  std::vector<int64_t> numels;
  for (Row& row : all) {
    slices.push_back(row.slice(with_low));
    numels.push_back(row.n);
  }
  const ManyPlan plan = plan_of(numels, chunk_numel);
  DeviceArray table(DType::U8, plan.bytes);
  write_step_table(plan, slices, numels, table.data());
  const std::string before = table.bits();
  step_many(rule, 0.3f, slices[0], plan, table.data(), nullptr);
  EXPECT_TRUE(table.guards_intact() && table.bits() == before);
}

// Three steps with gradients of three dtypes.
std::string expect_equal_steps(const Kind& kind, size_t rule, bool with_low, DType low_dt, const std::vector<int64_t>& numels,
                               int64_t chunk_numel, bool is_aligned) {
  const auto make = [&](bool aligned) { return rows(kind, rules(1)[rule], low_dt, numels, aligned); };
  std::vector<Row> got = make(is_aligned), simd = make(is_aligned), want = make(true);
  std::string bits;
  for (int64_t step = 1; step <= 3; ++step) {
    const Rule now = rules(step)[rule];
    for (size_t r = 0; r < got.size(); ++r) {
      for (Row* row : {&got[r], &simd[r], &want[r]}) {
        row->g = DeviceArray(kFloats[(static_cast<size_t>(step) + rule) % 3], row->n, row == &want[r] ? 0 : row->p.offset());
        row->next(step);
      }
      ds::kernels::step(now, 0.3f, simd[r].slice(with_low), simd[r].n);
      step_ref(now, 0.3f, want[r].slice(with_low), want[r].n);
    }
    step_rows(now, got, with_low, chunk_numel);
    for (size_t r = 0; r < got.size(); ++r) {
      EXPECT_TRUE(got[r].same(want[r])) << "row " << r << " of " << numels[r] << " elements, step " << step;
      EXPECT_TRUE(simd[r].same(want[r])) << "SIMD, row " << r << ", step " << step;
      EXPECT_TRUE(got[r].guards_intact()) << "row " << r;
      bits += got[r].bits();
    }
    if (::testing::Test::HasFailure()) break;
  }
  return bits;
}

std::string name(const Kind& kind, size_t rule, bool is_aligned) {
  return std::string(form_name(kind.p)) + " " + form_name(kind.s0) + " rule " + std::to_string(rule) + (is_aligned ? " aligned" : "");
}

TEST(DeviceStored, RowsHaveTheBitsOfTheReference) {
  const std::pair<Form, Form> states[] = {{Form::F32, Form::F32}, {Form::BF16, Form::BF16}, {Form::F16, Form::F32}};
  for (size_t rule = 0; rule < kRules; ++rule) {
    for (Form p : {Form::F32, Form::BF16, Form::F16, Form::Split, Form::Stochastic}) {
      for (const auto& [s0, s1] : states) {
        for (bool is_aligned : {true, false}) {
          if (s0 != Form::F32 && is_aligned != ((rule + static_cast<size_t>(p)) % 2 == 0)) continue;
          SCOPED_TRACE(name({p, s0, s1}, rule, is_aligned));
          expect_equal_steps({p, s0, s1}, rule, p == Form::F32, DType::BF16, kNumels, 1024, is_aligned);
          if (HasFailure()) return;
        }
      }
    }
  }
}

// Threads exchange magnitudes here.
TEST(DeviceStored, EightBitRowsHaveTheBitsOfTheReference) {
  for (size_t rule = 0; rule < kRules; ++rule) {
    const bool is_sum = std::holds_alternative<AdagradConstants>(rules(1)[rule]);
    const Form code = is_sum ? Form::Unsigned8 : Form::Signed8;
    for (Form p : {Form::F32, Form::Split, Form::Stochastic}) {
      for (const Kind& kind : {Kind{p, code, Form::Unsigned8}, Kind{p, Form::BF16, Form::Unsigned8}, Kind{p, code, Form::F32}}) {
        for (int64_t chunk_numel : {1024, 3072}) {  // one turn of a block, and several
          if (p != Form::F32 && chunk_numel == 1024) continue;
          const bool is_aligned = (rule + static_cast<size_t>(kind.s0)) % 2 == 0;
          SCOPED_TRACE(name(kind, rule, is_aligned));
          in_every_order([&] {
            return expect_equal_steps(kind, rule, p == Form::F32, DType::F16, {257, 0, 2500, 1}, chunk_numel, is_aligned);
          });
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(DeviceStored, CopiesInEveryDtype) {
  for (DType low_dt : kFloats) {
    for (bool is_aligned : {true, false}) {
      expect_equal_steps({Form::F32, Form::F32, Form::F32}, 0, true, low_dt, kNumels, 2048, is_aligned);
      expect_equal_steps({Form::F32, Form::Signed8, Form::Unsigned8}, 0, true, low_dt, kNumels, 2048, is_aligned);
    }
  }
}

TEST(DeviceStored, NothingToDoIsNoLaunch) {
  expect_equal_steps({Form::F32, Form::F32, Form::F32}, 0, false, DType::F32, {0, 0}, 1024, true);
  const ManyPlan plan = many_step_plan({});
  EXPECT_EQ(plan.chunks, 0);
  step_many(rules(1)[0], 1.0f, {}, plan, nullptr, nullptr);
}

// Any one array that begins elsewhere takes the whole groups of four away.
TEST(DeviceStored, OneMisalignedArrayIsNoticed) {
  const int64_t n = 1030;
  for (const Kind& kind : {Kind{Form::Split, Form::Signed8, Form::Unsigned8}, Kind{Form::F32, Form::F32, Form::BF16}}) {
    for (size_t which = 0; which < 6; ++which) {
      const auto make = [&](bool shifted) {
        const auto at = [&](size_t k) { return int64_t{shifted && k == which}; };
        Row row(kind, false, DType::BF16, DType::BF16, n, 0, 5);
        row.p = StoredArray(kind.p, n, at(0), at(1));
        row.s0 = StoredArray(kind.s0, n, at(2), 0);
        row.s1 = StoredArray(kind.s1, n, at(3), 0);
        row.g = DeviceArray(DType::BF16, n, at(4));
        row.low = DeviceArray(DType::BF16, n, at(5));
        row.p.fill(2, -2, 2);
        row.next(1);
        std::vector<Row> all;
        all.push_back(std::move(row));
        return all;
      };
      std::vector<Row> got = make(true), want = make(false);
      step_rows(rules(1)[0], got, kind.p == Form::F32, 1024);
      step_ref(rules(1)[0], 0.3f, want[0].slice(kind.p == Form::F32), n);
      EXPECT_TRUE(got[0].same(want[0]) && got[0].guards_intact()) << which;
    }
  }
}

// States that a rule does not have may lie nowhere.
TEST(DeviceStored, UnusedStatesAreNotTouched) {
  for (const Kind& kind : {Kind{Form::F32, Form::F32, Form::F32}, Kind{Form::Stochastic, Form::Signed8, Form::Unsigned8}}) {
    for (size_t rule : {size_t{2}, size_t{5}}) {
      std::vector<Row> got = rows(kind, rules(1)[rule], DType::F32, {1025}, true);
      std::vector<Row> want = rows(kind, rules(1)[rule], DType::F32, {1025}, true);
      got[0].next(1);
      want[0].next(1);
      Slice slice = got[0].slice(false);
      for (int k = states_of(rules(1)[rule]); k < 2; ++k) slice.states[k].data = slice.states[k].extra = nullptr;
      const ManyPlan plan = plan_of({1025}, 1024);
      DeviceArray table(DType::U8, plan.bytes);
      write_step_table(plan, {slice}, {1025}, table.data());
      step_many(rules(1)[rule], 0.3f, slice, plan, table.data(), nullptr);
      step_ref(rules(1)[rule], 0.3f, want[0].slice(false), 1025);
      EXPECT_TRUE(got[0].same(want[0]) && got[0].guards_intact());
    }
  }
}

// The copy may be the gradient itself.
TEST(DeviceStored, TheCopyMayReplaceTheGradient) {
  for (DType dtype : kFloats) {
    for (bool is_aligned : {true, false}) {
      const Kind kind{Form::F32, Form::F32, Form::F32};
      std::vector<Row> got = rows(kind, rules(1)[0], dtype, {2050, 5}, is_aligned), want = rows(kind, rules(1)[0], dtype, {2050, 5}, true);
      std::vector<Slice> slices;
      for (size_t r = 0; r < 2; ++r) {
        for (Row* row : {&got[r], &want[r]}) {
          row->g = DeviceArray(dtype, row->n, row->p.offset());
          row->next(1);
        }
        slices.push_back(got[r].slice(true));
        slices.back().low = got[r].g.data();
        step_ref(rules(1)[0], 0.3f, want[r].slice(true), want[r].n);
      }
      const ManyPlan plan = plan_of({2050, 5}, 1024);
      DeviceArray table(DType::U8, plan.bytes);
      write_step_table(plan, slices, {2050, 5}, table.data());
      step_many(rules(1)[0], 0.3f, slices[0], plan, table.data(), nullptr);
      for (size_t r = 0; r < 2; ++r) {
        EXPECT_SAME(got[r].g, want[r].low);
        EXPECT_SAME(got[r].p, want[r].p);
      }
    }
  }
}

// The master, its states and the weight, bit for bit, at each of 30 steps.
TEST(DeviceStored, SplitMasterIsAFloat32Master) {
  for (size_t rule = 0; rule < kRules; ++rule) {
    std::vector<Row> split = rows({Form::Split, Form::F32, Form::F32}, rules(1)[rule], DType::F32, {1003}, false),
                     wide = rows({Form::F32, Form::F32, Form::F32}, rules(1)[rule], DType::F32, {1003}, false);
    for (int64_t step = 1; step <= 30; ++step) {
      split[0].next(step);
      wide[0].next(step);
      step_rows(rules(step)[rule], split, false, 1024);
      step_rows(rules(step)[rule], wide, false, 1024);
      ASSERT_EQ(split[0].p.values(), wide[0].p.values()) << "rule " << rule << " step " << step;
      ASSERT_TRUE(split[0].s0.same_bits(wide[0].s0) && split[0].s1.same_bits(wide[0].s1));
    }
  }
}

TEST(DeviceStored, RefusesBadArguments) {
  float x[4] = {};
  const Rule adam = rules(1)[0];
  const ManyPlan plan = many_step_plan({4});
  const Stored plain{Form::F32, x, nullptr};
  const auto refuses = [&](Stored p, Stored state, DType g_dt = DType::F32, void* low = nullptr, DType low_dt = DType::BF16) {
    EXPECT_THROW(step_many(adam, 1, Slice{p, x, g_dt, {plain, state}, low, low_dt, {}}, plan, x, nullptr), ValueError);
  };
  refuses({Form::Signed8, x, x}, plain);
  refuses(plain, {Form::Split, x, x});
  refuses(plain, {Form::Stochastic, x, nullptr});
  refuses({Form::BF16, x, nullptr}, plain, DType::F32, x);
  refuses(plain, plain, DType::F64);
  refuses(plain, plain, DType::F32, x, DType::I16);
  EXPECT_THROW(write_step_table(plan, {}, {}, x), ValueError);
  for (const Form form : {Form::Signed8, Form::Unsigned8, Form::Split}) {
    EXPECT_THROW(widen({form, x, nullptr}, x, 4, nullptr), ValueError);
    EXPECT_THROW(narrow(x, {form, x, nullptr}, {}, 4, nullptr), ValueError);
  }
}

}  // namespace
}  // namespace ds::kernels::testing
