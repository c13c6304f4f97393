// SPDX-License-Identifier: Apache-2.0
// Losses, statistics and gradients of rows of logits against the float64 reference, element by element.
#include "kernels/cross_entropy/cross_entropy.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

constexpr int64_t kRows = 5;

std::vector<CrossEntropy> settings(int64_t columns) {
  return {{columns, -100, 0.0f, 0.0f}, {columns, 0, 0.1f, 0.0f}, {columns, -100, 0.0f, 1e-3f}, {columns, 1, 0.2f, 1e-2f}};
}

// Labels at the first, the last and a middle column, and one that some settings ignore.
std::vector<int64_t> labels_for(int64_t columns) { return {0, columns - 1, columns / 2, -100, 1 % columns}; }

struct Rows {
  Array x, loss, stats;
  Rows(DType dtype, int64_t columns, int64_t offset) : x(dtype, kRows * columns, offset), loss(DType::F32, kRows, 1), stats(DType::F32, 2 * kRows, 3) {
    x.fill(static_cast<unsigned>(columns), -4.0f, 4.0f);
  }
};

// Every setting whose labels are good for this number of columns.
template <typename Body>
void for_every_setting(int64_t columns, const Body& body) {
  for (const CrossEntropy& c : settings(columns)) {
    std::vector<int64_t> labels = labels_for(columns);
    if (c.ignored != -100) labels[3] = columns / 3;
    body(c, labels);
  }
}

TEST(CrossEntropy, IsTheReferenceForward) {
  for_every_slice([](int64_t columns, int64_t offset) {
    if (columns == 0) return;
    for (DType dtype : kFloats) {
      for_every_setting(columns, [&](const CrossEntropy& c, const std::vector<int64_t>& labels) {
        Rows got(dtype, columns, offset), want(dtype, columns, 0);
        cross_entropy(got.loss.floats(), got.stats.floats(), got.x.data(), dtype, labels.data(), c, 0, 2);
        cross_entropy(got.loss.floats(), got.stats.floats(), got.x.data(), dtype, labels.data(), c, 2, kRows);
        cross_entropy_ref(want.loss.floats(), want.stats.floats(), want.x.data(), dtype, labels.data(), c, 0, kRows);
        for (int64_t r = 0; r < kRows; ++r) {
          EXPECT_EQ(got.stats.get(2 * r), want.stats.get(2 * r));
          EXPECT_NEAR(got.stats.get(2 * r + 1), want.stats.get(2 * r + 1), 2e-6 * want.stats.get(2 * r + 1));
          EXPECT_NEAR(got.loss.get(r), want.loss.get(r), 4e-6);  // sums of terms up to 12: a few roundings of 5e-7
        }
        EXPECT_TRUE(got.loss.guards_intact() && got.stats.guards_intact() && got.x.guards_intact());
      });
    }
  });
}

TEST(CrossEntropy, IsTheReferenceBackwardAlsoInPlace) {
  for_every_slice([](int64_t columns, int64_t offset) {
    if (columns == 0) return;
    for (DType dtype : kFloats) {
      for_every_setting(columns, [&](const CrossEntropy& c, const std::vector<int64_t>& labels) {
        Rows rows(dtype, columns, offset);
        Array got(dtype, kRows * columns, offset + 1), want(dtype, kRows * columns);
        const std::vector<float> weights = {0.5f, 1.0f, -2.0f, 1.5f, 0.0f};
        for (const float* w : {static_cast<const float*>(nullptr), weights.data()}) {
          rows.x.fill(static_cast<unsigned>(columns), -4.0f, 4.0f);
          cross_entropy_ref(rows.loss.floats(), rows.stats.floats(), rows.x.data(), dtype, labels.data(), c, 0, kRows);
          cross_entropy_backward_ref(want.data(), rows.x.data(), dtype, labels.data(), rows.stats.floats(), w, 0.25f, c, 0, kRows);
          cross_entropy_backward(got.data(), rows.x.data(), dtype, labels.data(), rows.stats.floats(), w, 0.25f, c, 0, 3);
          cross_entropy_backward(got.data(), rows.x.data(), dtype, labels.data(), rows.stats.floats(), w, 0.25f, c, 3, kRows);
          const double eps = dtype == DType::F32 ? 1.2e-7 : dtype == DType::BF16 ? 7.9e-3 : 9.8e-4;
          for (int64_t i = 0; i < kRows * columns; ++i) {  // two roundings of the result; a few float32 ones of a probability <= 1 times |w|
            ASSERT_NEAR(got.get(i), want.get(i), eps * std::fabs(want.get(i)) + (dtype == DType::F32 ? 4e-7 : 1e-5)) << i;
          }
          cross_entropy_backward(rows.x.data(), rows.x.data(), dtype, labels.data(), rows.stats.floats(), w, 0.25f, c, 0, kRows);
          EXPECT_SAME(rows.x, got);
        }
      });
    }
  });
}

TEST(CrossEntropy, LongRowsCarryTheirSumAlong) {
  constexpr int64_t kColumns = 20011;
  for (float slope : {1e-2f, -1e-2f}) {  // the maximum moves from piece to piece, or stays behind
    Array x(DType::F32, kColumns);
    x.fill(1);
    for (int64_t i = 0; i < kColumns; ++i) x.set(i, x.get(i) + slope * static_cast<float>(i));
    const int64_t label = 17;
    const CrossEntropy c{kColumns, -100, 0.0f, 0.0f};
    float got, got_stats[2], want, want_stats[2];
    cross_entropy(&got, got_stats, x.data(), DType::F32, &label, c, 0, 1);
    cross_entropy_ref(&want, want_stats, x.data(), DType::F32, &label, c, 0, 1);
    EXPECT_EQ(got_stats[0], want_stats[0]);
    EXPECT_NEAR(got_stats[1], want_stats[1], 3e-6 * want_stats[1]);
    EXPECT_NEAR(got, want, 3e-6 + 1e-7 * want);
  }
}

TEST(CrossEntropy, HiddenLogitsAndNans) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr int64_t kColumns = 9000;  // the first piece is hidden entirely
  Array x(DType::F32, kColumns), dx(DType::F32, kColumns);
  for (int64_t i = 0; i < kColumns; ++i) x.set(i, i < 5000 ? -kInf : 1.0f);
  const int64_t label = 6000;
  const CrossEntropy c{kColumns, -100, 0.0f, 0.0f};
  float loss, stats[2];
  cross_entropy(&loss, stats, x.data(), DType::F32, &label, c, 0, 1);
  EXPECT_NEAR(loss, std::log(4000.0), 1e-6);
  cross_entropy_backward(dx.data(), x.data(), DType::F32, &label, stats, nullptr, 1.0f, c, 0, 1);
  EXPECT_EQ(dx.get(0), 0.0f);
  EXPECT_NEAR(dx.get(5000), 1.0 / 4000, 1e-9);
  EXPECT_NEAR(dx.get(6000), 1.0 / 4000 - 1, 1e-7);
  for (float odd : {kInf, std::numeric_limits<float>::quiet_NaN()}) {
    x.set(3, odd);
    cross_entropy(&loss, stats, x.data(), DType::F32, &label, c, 0, 1);
    EXPECT_TRUE(std::isnan(loss));
  }
}

TEST(CrossEntropy, FindsTheFirstBadLabel) {
  const std::vector<int64_t> labels = {3, -100, 0, 9, 10, -1};
  const CrossEntropy c{10, -100, 0.0f, 0.0f};
  int64_t counted = -1;
  EXPECT_EQ(find_bad_label(labels.data(), 4, c, &counted), -1);
  EXPECT_EQ(counted, 3);
  EXPECT_EQ(find_bad_label(labels.data(), 6, c, &counted), 4);
  EXPECT_EQ(find_bad_label(labels.data() + 5, 1, c, &counted), 0);
}

TEST(CrossEntropy, RefusesBadArguments) {
  float x[4] = {}, out[4], stats[2];
  const int64_t label = 0;
  const CrossEntropy c{4, -100, 0.0f, 0.0f};
  EXPECT_THROW(cross_entropy(nullptr, stats, x, DType::F32, &label, c, 0, 1), ValueError);
  EXPECT_THROW(cross_entropy(out, stats, x, DType::I32, &label, c, 0, 1), ValueError);
  EXPECT_THROW(cross_entropy(out, stats, x, DType::F32, &label, {0, -100, 0.0f, 0.0f}, 0, 1), ValueError);
  EXPECT_THROW(cross_entropy_backward(out, x, DType::F32, nullptr, stats, nullptr, 1.0f, c, 0, 1), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
