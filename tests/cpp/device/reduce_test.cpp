// SPDX-License-Identifier: Apache-2.0
// The CUDA reductions, run on the host, have the elements of the scalar reference bit for bit.
#include "kernels/reduce/reduce.h"

#include "arrays.h"

namespace ds::kernels::testing {
namespace {

// Around groups of four, a block of 1024 elements, and as many blocks as leave partial sums.
constexpr int64_t kSizes[] = {1, 3, 4, 5, 1023, 1024, 1025, 5000, 1024 * 1030 + 2};

struct Workspace {
  DeviceArray memory{DType::F32, kCudaReduceWorkspaceBytes / 4}, stats{DType::F32, 4};
};

TEST(DeviceReduce, SumsHaveTheBitsOfTheReference) {
  for (int64_t n : kSizes) {
    for (int64_t offset : {0, 1}) {
      for (DType dtype : kFloats) {
        for (int nsrc : {1, 3}) {
          for (bool accumulate : {false, true}) {
            if (n > 5000 && (dtype != DType::BF16 || nsrc == 1 || accumulate || offset != 0)) continue;
            SCOPED_TRACE(std::to_string(n) + " " + dtype_name(dtype) + " offset " + std::to_string(offset));
            in_every_order([&] {
              std::vector<DeviceArray> sources;
              std::vector<const void*> pointers;
              sources.reserve(static_cast<size_t>(nsrc));
              for (int k = 0; k < nsrc; ++k) {
                sources.emplace_back(dtype, n, offset);
                sources.back().fill(static_cast<unsigned>(k));
                pointers.push_back(sources.back().data());
              }
              DeviceArray got(DType::F32, n, offset), want(DType::F32, n);
              got.fill(99);
              want.copy(got);
              Workspace space;
              double want_stats[2];
              reduce_sum(got.floats(), pointers.data(), nsrc, dtype, 0.3f, accumulate, n, space.stats.as<double>(), space.memory.data(), nullptr);
              reduce_sum_ref(want.floats(), pointers.data(), nsrc, dtype, 0.3f, accumulate, n, want_stats);
              EXPECT_SAME(got, want);
              EXPECT_NEAR(space.stats.as<double>()[0], want_stats[0], 1e-12 * want_stats[0]);
              EXPECT_EQ(space.stats.as<double>()[1], 0.0);
              EXPECT_TRUE(space.memory.guards_intact() && space.stats.guards_intact());
              return got.bits() + space.stats.bits();
            });
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(DeviceReduce, CopiesAndAccumulatesAsTheReference) {
  for (int64_t n : {1, 5, 1030}) {
    for (int64_t offset : {0, 3}) {
      for (DType from : kFloats) {
        for (DType to : kFloats) {
          for (float scale : {1.0f, 0.7f}) {
            DeviceArray source(from, n, offset), got(to, n, offset), want(to, n);
            source.fill(3, -1000.0f, 1000.0f);
            copy_scale(got.data(), to, source.data(), from, scale, n, nullptr);
            copy_scale_ref(want.data(), to, source.data(), from, scale, n);
            EXPECT_SAME(got, want);
          }
        }
        DeviceArray source(from, n, offset), got(DType::F32, n, offset), want(DType::F32, n);
        source.fill(3);
        got.fill(4);
        want.copy(got);
        accumulate(got.floats(), source.data(), from, 0.3f, n, nullptr);
        accumulate_ref(want.floats(), source.data(), from, 0.3f, n);
        EXPECT_SAME(got, want);
      }
    }
  }
}

TEST(DeviceReduce, FindsTheFirstThatIsNotFinite) {
  for (int64_t n : {1, 7, 5000}) {
    for (DType dtype : kFloats) {
      in_every_order([&] {
        DeviceArray x(dtype, n, 1), index(DType::F32, 2);
        std::string bits;
        for (int64_t at : {int64_t{-1}, n - 1, n / 2, int64_t{0}}) {  // one more each time
          if (at >= 0) x.set(at, at % 2 == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
          first_nonfinite(x.data(), dtype, n, index.as<int64_t>(), nullptr);
          EXPECT_EQ(*index.as<int64_t>(), at);
          bits += index.bits();
        }
        return bits;
      });
    }
  }
}

TEST(DeviceReduce, CountsWhatIsNotFinite) {
  DeviceArray x(DType::F32, 3000);
  x.fill(1);
  x.set(1, std::numeric_limits<float>::infinity());
  x.set(2999, std::numeric_limits<float>::quiet_NaN());
  Workspace space;
  sum_squares(x.floats(), 3000, space.stats.as<double>(), space.memory.data(), nullptr);
  EXPECT_EQ(space.stats.as<double>()[1], 2.0);
  EXPECT_FALSE(std::isfinite(space.stats.as<double>()[0]));
}

}  // namespace
}  // namespace ds::kernels::testing
