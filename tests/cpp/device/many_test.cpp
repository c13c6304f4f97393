// SPDX-License-Identifier: Apache-2.0
// Launches over many arrays, run on the host: tables that travel through kernel parameters, norms and scaling.
#include "kernels/many.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "arrays.h"
#include "base/error.h"
#include "kernels/reduce/many.h"
#include "kernels/reduce/reduce.h"

namespace ds::kernels::testing {
namespace {

TEST(DeviceUpload, BringsEveryByte) {
  constexpr int64_t kPage = 32640;  // bytes a launch
  for (int64_t bytes : {int64_t{0}, int64_t{16}, int64_t{4096}, int64_t{4112}, kPage - 16, kPage, kPage + 16, 3 * kPage + 48}) {
    for (int64_t offset : {0, 1, 3}) {  // of the host's bytes
      SCOPED_TRACE(std::to_string(bytes) + " offset " + std::to_string(offset));
      in_every_order([&] {
        DeviceArray host(DType::U8, bytes, offset), device(DType::U8, bytes);
        std::mt19937 generator(static_cast<unsigned>(bytes));
        for (int64_t i = 0; i < bytes; ++i) host.as<uint8_t>()[i] = static_cast<uint8_t>(generator());
        upload_table(host.data(), device.data(), bytes, nullptr);
        EXPECT_SAME(device, host);
        EXPECT_TRUE(host.guards_intact());
        return device.bits();
      });
    }
  }
}

TEST(DeviceUpload, RefusesWhatIsNotATable) {
  DeviceArray device(DType::U8, 64);
  const char host[64] = {};
  EXPECT_THROW(upload_table(host, device.as<char>() + 8, 16, nullptr), ValueError);
  EXPECT_THROW(upload_table(host, device.data(), 24, nullptr), ValueError);
}

// Arrays without elements, of one, around a thread's group and a chunk, and of several chunks; all dtypes and alignments.
struct Arrays {
  std::vector<DeviceArray> memory;
  std::vector<FloatArray> all;
  explicit Arrays(const std::vector<int64_t>& numels, bool is_aligned = false) {
    memory.reserve(numels.size());
    for (size_t k = 0; k < numels.size(); ++k) {
      memory.emplace_back(kFloats[k % 3], numels[k], is_aligned ? 0 : std::array<int64_t, 4>{0, 1, 0, 3}[k % 4]);
      for (int64_t i = 0; i < numels[k]; ++i) {  // squares whose sums are exact
        memory[k].set(i, static_cast<float>((i * 7 + static_cast<int64_t>(k)) % 61 - 30) / 16);
      }
      all.push_back({memory[k].data(), numels[k], memory[k].dtype()});
    }
  }
  bool guards_intact() const {
    return std::all_of(memory.begin(), memory.end(), [](const DeviceArray& a) { return a.guards_intact(); });
  }
  std::string bits() const {
    std::string all_bits;
    for (const DeviceArray& a : memory) all_bits += a.bits();
    return all_bits;
  }
};
const std::vector<int64_t> kNumels = {0, 1, 3, 4, 5, 1023, 1024, 1025, 0, 2500, 4096, 7, 3333};

// chunk_numel: 1024, what arrays of this size get, or a multiple, which only far larger ones do.
ManyPlan plan_of(const Arrays& arrays, int64_t chunk_numel) {
  ManyPlan plan = many_arrays_plan(arrays.all);
  EXPECT_EQ(plan.chunk_numel, 1024);
  plan.chunk_numel = chunk_numel;
  plan.chunks = 0;
  for (const FloatArray& a : arrays.all) plan.chunks += (a.n + chunk_numel - 1) / chunk_numel;
  return plan;
}

std::string norm_bits(const ManyPlan& plan, const Arrays& arrays) {
  DeviceArray table(DType::U8, plan.bytes), workspace(DType::F64, 2 * plan.chunks), stats(DType::F64, 2);
  EXPECT_EQ(many_workspace_bytes(plan), plan.chunks * 16);
  write_arrays_table(plan, arrays.all, table.data());
  stats.as<double>()[0] = stats.as<double>()[1] = 99.0;  // they are overwritten
  const std::string before = arrays.bits() + table.bits();
  squares_many(plan, table.data(), stats.as<double>(), workspace.data(), nullptr);
  EXPECT_TRUE(arrays.guards_intact() && table.guards_intact() && workspace.guards_intact() && stats.guards_intact());
  EXPECT_TRUE(arrays.bits() + table.bits() == before);
  return stats.bits();
}
std::array<double, 2> norms(const ManyPlan& plan, const Arrays& arrays) {
  std::array<double, 2> stats{};
  in_every_order([&] {
    const std::string bits = norm_bits(plan, arrays);
    std::memcpy(stats.data(), bits.data(), sizeof(stats));
    return bits;
  });
  return stats;
}

double exact_squares(Arrays& arrays) {
  double sum = 0.0;
  for (DeviceArray& a : arrays.memory) {
    for (int64_t i = 0; i < a.size(); ++i) sum += double{a.get(i)} * a.get(i);
  }
  return sum;
}

TEST(DeviceMany, SquaresAreExactSums) {
  for (int64_t chunk_numel : {1024, 3072}) {
    for (bool is_aligned : {true, false}) {
      Arrays arrays(kNumels, is_aligned);
      const std::array<double, 2> stats = norms(plan_of(arrays, chunk_numel), arrays);
      EXPECT_EQ(stats[0], exact_squares(arrays));
      EXPECT_EQ(stats[1], 0.0);
    }
  }
}

TEST(DeviceMany, SquaresOfNothingAreZero) {
  for (const std::vector<int64_t>& numels : {std::vector<int64_t>{}, std::vector<int64_t>{0, 0}}) {
    const Arrays arrays(numels);
    EXPECT_EQ(norms(plan_of(arrays, 1024), arrays), (std::array<double, 2>{0.0, 0.0}));
  }
}

// More chunks than the block that joins their parts has threads.
TEST(DeviceMany, SquaresOfManyChunks) {
  std::vector<int64_t> numels(260, 5);
  numels.push_back(3000);
  Arrays arrays(numels);
  EXPECT_EQ(norms(plan_of(arrays, 1024), arrays)[0], exact_squares(arrays));
}

// Each of n sums of doubles is off by at most 2^-53 of it; neither alignment nor orders change a bit.
TEST(DeviceMany, SquaresOfAnyValues) {
  Arrays aligned(kNumels, true), other(kNumels, false);
  for (size_t k = 0; k < kNumels.size(); ++k) {
    aligned.memory[k].fill(static_cast<unsigned>(k));
    other.memory[k].fill(static_cast<unsigned>(k));
  }
  const ManyPlan plan = plan_of(aligned, 1024);
  const std::array<double, 2> stats = norms(plan, aligned);
  const double total = static_cast<double>(std::accumulate(kNumels.begin(), kNumels.end(), int64_t{0}));
  EXPECT_NEAR(stats[0], exact_squares(aligned), 2 * total * 0x1p-53 * stats[0]);
  EXPECT_EQ(norms(plan, other), stats);
}

TEST(DeviceMany, CountsWhatIsNotFinite) {
  Arrays arrays(kNumels);
  const float inf = std::numeric_limits<float>::infinity();
  int64_t count = 0;
  for (size_t k = 0; k < kNumels.size(); ++k) {
    if (kNumels[k] == 0) continue;
    arrays.memory[k].set(kNumels[k] - 1, k % 3 == 0 ? inf : k % 3 == 1 ? -inf : std::numeric_limits<float>::quiet_NaN());
    arrays.memory[k].set(0, inf);
    count += kNumels[k] == 1 ? 1 : 2;
  }
  for (int64_t chunk_numel : {1024, 2048}) {
    const std::array<double, 2> stats = norms(plan_of(arrays, chunk_numel), arrays);
    EXPECT_FALSE(std::isfinite(stats[0]));
    EXPECT_EQ(stats[1], static_cast<double>(count));
  }
}

TEST(DeviceMany, ScalesAsCopyScaleDoes) {
  for (double factor : {0.3, 1.0 / 3.0, 0.0, -2.0, 1e30}) {
    for (int64_t chunk_numel : {1024, 3072}) {
      for (bool is_aligned : {true, false}) {
        in_every_order([&] {
          Arrays got(kNumels, is_aligned), want(kNumels, true);
          for (size_t k = 0; k < kNumels.size(); ++k) {
            got.memory[k].fill(static_cast<unsigned>(k), -1e4f, 1e4f);
            want.memory[k].copy(got.memory[k]);
          }
          const ManyPlan plan = plan_of(got, chunk_numel);
          DeviceArray table(DType::U8, plan.bytes), by(DType::F64, 1);
          write_arrays_table(plan, got.all, table.data());
          *by.as<double>() = factor;
          scale_many(plan, table.data(), by.as<double>(), nullptr);
          for (const FloatArray& a : want.all) copy_scale_ref(a.data, a.dtype, a.data, a.dtype, static_cast<float>(factor), a.n);
          EXPECT_TRUE(got.bits() == want.bits());
          EXPECT_TRUE(got.guards_intact() && table.guards_intact() && by.guards_intact());
          return got.bits();
        });
        if (HasFailure()) return;
      }
    }
  }
}

// A factor that is 1 as a float writes nothing: not even into memory that cannot be written.
TEST(DeviceMany, OneScalesNothing) {
  Arrays arrays({1025, 3});
  std::vector<FloatArray> nowhere = arrays.all;
  for (FloatArray& a : nowhere) a.data = nullptr;
  const ManyPlan plan = plan_of(arrays, 1024);
  DeviceArray table(DType::U8, plan.bytes), by(DType::F64, 1);
  write_arrays_table(plan, nowhere, table.data());
  *by.as<double>() = 1.0 + 1e-9;
  scale_many(plan, table.data(), by.as<double>(), nullptr);
}

TEST(DeviceMany, RefusesBadArguments) {
  Arrays arrays({5});
  const ManyPlan plan = plan_of(arrays, 1024);
  DeviceArray table(DType::U8, plan.bytes), workspace(DType::F64, 2);
  EXPECT_THROW(squares_many(plan, table.data(), nullptr, workspace.data(), nullptr), ValueError);
  EXPECT_THROW(scale_many(plan, table.data(), nullptr, nullptr), ValueError);
  arrays.all[0].dtype = DType::F64;
  EXPECT_THROW(write_arrays_table(plan, arrays.all, table.data()), ValueError);
  EXPECT_THROW(plan_many({3, -1}, 16), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
