// SPDX-License-Identifier: Apache-2.0
// The CUDA cross-entropy, run on the host, against the float64 reference, element by element.
#include "kernels/cross_entropy/cross_entropy.h"

#include <algorithm>

#include "arrays.h"
#include "base/error.h"

namespace ds::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 5;

// Around a group of four and what a block reads at once, 1024.
constexpr int64_t kColumns[] = {1, 3, 4, 5, 257, 1023, 1024, 1028, 2051};

std::vector<CrossEntropy> settings(int64_t columns) {
  return {{columns, -100, 0.0f, 0.0f}, {columns, 0, 0.1f, 0.0f}, {columns, -100, 0.0f, 1e-3f}, {columns, 1, 0.2f, 1e-2f}};
}

void spoil(DeviceArray& a) { std::memset(a.data(), 0xff, static_cast<size_t>(a.size()) * dtype_size(a.dtype())); }

struct Rows {
  Rows(DType dtype, int64_t columns, const CrossEntropy& c, int64_t apart)
      : x(dtype, kRows * columns, apart), loss(DType::F32, kRows, 1), stats(DType::F32, 2 * kRows, 3), labels(DType::I64, kRows),
        weights(DType::F32, kRows, 1) {
    x.fill(static_cast<unsigned>(columns), -4.0f, 4.0f);
    // The first, the last and a middle column, and one that some settings ignore.
    const int64_t of_rows[] = {0, columns - 1, columns / 2, c.ignored == -100 ? -100 : columns / 3, 1 % columns};
    std::memcpy(labels.data(), of_rows, sizeof(of_rows));
    const float factors[] = {0.5f, 1.0f, -2.0f, 1.5f, 0.0f};
    std::memcpy(weights.data(), factors, sizeof(factors));
  }
  const int64_t* label() { return labels.as<int64_t>(); }
  bool guards_intact() const {
    return x.guards_intact() && loss.guards_intact() && stats.guards_intact() && labels.guards_intact() && weights.guards_intact();
  }
  DeviceArray x, loss, stats, labels, weights;
};

void compare_forward(DType dtype, const CrossEntropy& c, int64_t apart) {
  Rows got(dtype, c.columns, c, apart), want(dtype, c.columns, c, 0);
  cross_entropy_ref(want.loss.floats(), want.stats.floats(), want.x.data(), dtype, want.label(), c, 0, kRows);
  in_every_order([&] {
    spoil(got.loss);
    spoil(got.stats);
    cross_entropy(got.loss.floats(), got.stats.floats(), got.x.data(), dtype, got.label(), c, kRows, nullptr);
    for (int64_t r = 0; r < kRows; ++r) {
      EXPECT_EQ(got.stats.get(2 * r), want.stats.get(2 * r)) << r;
      EXPECT_NEAR(got.stats.get(2 * r + 1), want.stats.get(2 * r + 1), 2e-6 * want.stats.get(2 * r + 1)) << r;
      EXPECT_NEAR(got.loss.get(r), want.loss.get(r), 4e-6) << r;  // sums of terms up to 12: a few roundings of 5e-7
    }
    EXPECT_TRUE(got.guards_intact());
    return got.loss.bits() + got.stats.bits();
  });
}

void compare_backward(DType dtype, const CrossEntropy& c, bool weighted, int64_t apart_x, int64_t apart_dx) {
  const int64_t n = kRows * c.columns;
  Rows rows(dtype, c.columns, c, apart_x);
  DeviceArray got(dtype, n, apart_dx), want(dtype, n), kept(dtype, n);
  const float* weights = weighted ? rows.weights.floats() : nullptr;
  cross_entropy_ref(rows.loss.floats(), rows.stats.floats(), rows.x.data(), dtype, rows.label(), c, 0, kRows);
  cross_entropy_backward_ref(want.data(), rows.x.data(), dtype, rows.label(), rows.stats.floats(), weights, 0.25f, c, 0, kRows);
  kept.copy(rows.x);
  const double eps = dtype == DType::F32 ? 1.2e-7 : dtype == DType::BF16 ? 7.9e-3 : 9.8e-4;
  in_every_order([&] {
    spoil(got);
    cross_entropy_backward(got.data(), rows.x.data(), dtype, rows.label(), rows.stats.floats(), weights, 0.25f, c, kRows, nullptr);
    for (int64_t i = 0; i < n; ++i) {  // two roundings of the result; a few float32 ones of a probability <= 1 times |w|
      const double bound = eps * std::fabs(want.get(i)) + (dtype == DType::F32 ? 4e-7 : 1e-5);
      if (std::fabs(static_cast<double>(got.get(i)) - want.get(i)) <= bound) continue;
      ADD_FAILURE() << i << ": " << got.get(i) << " for " << want.get(i);
      break;
    }
    cross_entropy_backward(rows.x.data(), rows.x.data(), dtype, rows.label(), rows.stats.floats(), weights, 0.25f, c, kRows, nullptr);
    EXPECT_SAME(rows.x, got);
    rows.x.copy(kept);
    EXPECT_TRUE(got.guards_intact() && rows.guards_intact());
    return got.bits();
  });
}

TEST(DeviceCrossEntropy, IsTheReferenceForward) {
  for (DType dtype : kFloats) {
    for (int64_t columns : kColumns) {
      for (const CrossEntropy& c : settings(columns)) {
        if (c.ignored == 1 && columns == 1) continue;  // nothing to ignore
        for (int64_t apart : {0, 1}) {
          if (apart != 0 && columns % 4 != 0) continue;  // read one by one anyhow
          SCOPED_TRACE(std::string(dtype_name(dtype)) + " columns " + std::to_string(columns) + " ignored " + std::to_string(c.ignored));
          compare_forward(dtype, c, apart);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(DeviceCrossEntropy, IsTheReferenceBackwardAlsoInPlace) {
  for (DType dtype : kFloats) {
    for (int64_t columns : kColumns) {
      for (const CrossEntropy& c : settings(columns)) {
        SCOPED_TRACE(std::string(dtype_name(dtype)) + " columns " + std::to_string(columns) + " ignored " + std::to_string(c.ignored));
        compare_backward(dtype, c, false, 0, 0);
        compare_backward(dtype, c, true, 0, 0);
        if (columns > 8 && c.ignored != -100) continue;
        compare_backward(dtype, c, false, 1, 0);
        compare_backward(dtype, c, true, 0, 1);
        compare_backward(dtype, c, true, 3, 3);
        if (HasFailure()) return;
      }
    }
  }
}

TEST(DeviceCrossEntropy, LongRowsCarryTheirSumAlong) {
  constexpr int64_t kLong = 20012;
  for (float slope : {1e-2f, -1e-2f}) {  // a thread's maximum moves from group to group, or stays behind
    DeviceArray x(DType::F32, kLong), got(DType::F32, 3), label(DType::I64, 1);
    x.fill(1);
    for (int64_t i = 0; i < kLong; ++i) x.set(i, x.get(i) + slope * static_cast<float>(i));
    *label.as<int64_t>() = 17;
    const CrossEntropy c{kLong, -100, 0.0f, 0.0f};
    float want, want_stats[2];
    cross_entropy_ref(&want, want_stats, x.data(), DType::F32, label.as<int64_t>(), c, 0, 1);
    in_every_order([&] {
      cross_entropy(got.floats() + 2, got.floats(), x.data(), DType::F32, label.as<int64_t>(), c, 1, nullptr);
      EXPECT_EQ(got.get(0), want_stats[0]);
      EXPECT_NEAR(got.get(1), want_stats[1], 3e-6 * want_stats[1]);
      EXPECT_NEAR(got.get(2), want, 3e-6 + 1e-7 * want);
      return got.bits();
    });
  }
}

TEST(DeviceCrossEntropy, HiddenLogitsAndNans) {
  constexpr int64_t kLong = 9000;  // the first groups of every thread are hidden entirely
  DeviceArray x(DType::F32, kLong), dx(DType::F32, kLong), out(DType::F32, 3), label(DType::I64, 1);
  for (int64_t i = 0; i < kLong; ++i) x.set(i, i < 5000 ? -kInf : 1.0f);
  *label.as<int64_t>() = 6000;
  const CrossEntropy c{kLong, -100, 0.0f, 0.0f};
  float *stats = out.floats(), *loss = out.floats() + 2;
  cross_entropy(loss, stats, x.data(), DType::F32, label.as<int64_t>(), c, 1, nullptr);
  EXPECT_NEAR(*loss, std::log(4000.0), 1e-6);
  cross_entropy_backward(dx.data(), x.data(), DType::F32, label.as<int64_t>(), stats, nullptr, 1.0f, c, 1, nullptr);
  EXPECT_EQ(dx.get(0), 0.0f);
  EXPECT_NEAR(dx.get(5000), 1.0 / 4000, 1e-9);
  EXPECT_NEAR(dx.get(6000), 1.0 / 4000 - 1, 1e-7);
  for (float odd : {kInf, std::numeric_limits<float>::quiet_NaN()}) {
    for (int64_t at : {3, 8999}) {
      const float kept = x.get(at);
      x.set(at, odd);
      cross_entropy(loss, stats, x.data(), DType::F32, label.as<int64_t>(), c, 1, nullptr);
      EXPECT_TRUE(std::isnan(*loss));
      x.set(at, kept);
    }
  }
}

// The row before is whole, the row after too, and nothing is read by the label: the pages around x may not be touched.
TEST(DeviceCrossEntropy, LabelsOutOfRangeMakeTheirRowNanAndAreReported) {
  constexpr int64_t kNumber = 1000;  // what the report calls row 0
  for (DType dtype : kFloats) {
    for (int64_t columns : {1, 5, 1028}) {
      for (int64_t bad : {int64_t{-1}, columns, columns + 1, int64_t{1} << 32, int64_t{1} << 40, INT64_MAX, INT64_MIN}) {
        for (const CrossEntropy& c : settings(columns)) {
          if (bad == c.ignored) continue;
          SCOPED_TRACE(std::string(dtype_name(dtype)) + " columns " + std::to_string(columns) + " label " + std::to_string(bad));
          Rows rows(dtype, columns, c, 0), good(dtype, columns, c, 0);
          rows.labels.as<int64_t>()[4] = good.labels.as<int64_t>()[4] = 0;
          rows.labels.as<int64_t>()[2] = bad;
          DeviceArray word(DType::I64, 1), dx(dtype, kRows * columns), want(dtype, kRows * columns);
          auto* report = word.as<uint64_t>();
          *report = 0;
          cross_entropy(good.loss.floats(), good.stats.floats(), good.x.data(), dtype, good.label(), c, kRows, nullptr, {report, kNumber});
          EXPECT_EQ(*report, 0u);
          cross_entropy(rows.loss.floats(), rows.stats.floats(), rows.x.data(), dtype, rows.label(), c, kRows, nullptr, {report, kNumber});
          EXPECT_EQ(bad_label_of(*report).row, kNumber + 2);
          EXPECT_EQ(bad_label_of(*report).label, std::clamp<int64_t>(bad, INT32_MIN, INT32_MAX));
          cross_entropy(rows.loss.floats(), rows.stats.floats(), rows.x.data(), dtype, rows.label(), c, kRows, nullptr);  // nobody to tell
          for (const float* weights : {static_cast<const float*>(nullptr), rows.weights.as<const float>()}) {
            cross_entropy_backward(want.data(), good.x.data(), dtype, good.label(), good.stats.floats(), weights, 0.25f, c, kRows, nullptr);
            for (const float* stats : {rows.stats.floats(), good.stats.floats()}) {  // also where the forward pass saw another label
              spoil(dx);
              cross_entropy_backward(dx.data(), rows.x.data(), dtype, rows.label(), stats, weights, 0.25f, c, kRows, nullptr);
              for (int64_t i = 0; i < kRows * columns; ++i) {
                if (i / columns == 2) EXPECT_TRUE(std::isnan(dx.get(i))) << i;
                else EXPECT_EQ(dx.get(i), want.get(i)) << i;
              }
            }
          }
          for (int64_t r = 0; r < kRows; ++r) {
            EXPECT_EQ(std::isnan(rows.loss.get(r)), r == 2);
            if (r != 2) EXPECT_EQ(rows.loss.get(r), good.loss.get(r));
          }
          EXPECT_TRUE(rows.guards_intact() && word.guards_intact() && dx.guards_intact());
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(DeviceCrossEntropy, RefusesBadArguments) {
  DeviceArray a(DType::F32, 4), b(DType::F32, 4), c(DType::F32, 2), labels(DType::I64, 1);
  float *x = a.floats(), *out = b.floats(), *stats = c.floats();
  const int64_t* label = labels.as<int64_t>();
  const CrossEntropy four{4, -100, 0.0f, 0.0f}, none{0, -100, 0.0f, 0.0f};
  EXPECT_THROW(cross_entropy(nullptr, stats, x, DType::F32, label, four, 1, nullptr), ValueError);
  EXPECT_THROW(cross_entropy(out, stats, x, DType::I32, label, four, 1, nullptr), ValueError);
  EXPECT_THROW(cross_entropy(out, stats, x, DType::F32, label, four, -1, nullptr), ValueError);
  EXPECT_THROW(cross_entropy(out, stats, x, DType::F32, label, none, 1, nullptr), ValueError);
  EXPECT_THROW(cross_entropy_backward(out, x, DType::F32, nullptr, stats, nullptr, 1.0f, four, 1, nullptr), ValueError);
  EXPECT_THROW(cross_entropy_backward(out, x, DType::F32, label, stats, nullptr, 1.0f, none, 1, nullptr), ValueError);
  cross_entropy(nullptr, nullptr, nullptr, DType::F32, nullptr, four, 0, nullptr);
  cross_entropy_backward(nullptr, nullptr, DType::F32, nullptr, nullptr, nullptr, 1.0f, four, 0, nullptr);
}

}  // namespace
}  // namespace ds::kernels::testing
