// SPDX-License-Identifier: Apache-2.0
#include "kernels/exact_fp.h"

#include <cstring>

#include "kernels/dispatch.h"
#include "kernels/reduce/reduce.h"
#include "kernels/reduce/statistics.h"

namespace ds::kernels {

void reduce_sum_ref(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n,
                    double* stats) {
  dispatch_float(src_dt, "src", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t i = 0; i < n; ++i) {
      float sum = tag.load(static_cast<const Raw*>(src[0])[i]);
      for (int k = 1; k < nsrc; ++k) sum += tag.load(static_cast<const Raw*>(src[k])[i]);
      sum *= scale;
      dst[i] = accumulate ? dst[i] + sum : sum;
    }
  });
  if (stats != nullptr) sum_squares_ref(dst, DType::F32, n, stats);
}

void copy_scale_ref(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n) {
  if (dst_dt == src_dt && scale == 1.0f) {
    std::memmove(dst, src, static_cast<size_t>(n) * dtype_size(src_dt));
    return;
  }
  dispatch_float(dst_dt, "dst", [&](auto to) {
    dispatch_float(src_dt, "src", [&](auto from) {
      auto* d = static_cast<typename decltype(to)::Raw*>(dst);
      auto* s = static_cast<const typename decltype(from)::Raw*>(src);
      for (int64_t i = 0; i < n; ++i) d[i] = to.store(scale * from.load(s[i]));
    });
  });
}

void accumulate_ref(float* dst, const void* src, DType src_dt, float scale, int64_t n) {
  reduce_sum_ref(dst, &src, 1, src_dt, scale, true, n, nullptr);
}

int64_t first_nonfinite_ref(const void* src, DType src_dt, int64_t n) {
  int64_t found = -1;
  dispatch_float(src_dt, "src", [&](auto tag) {
    auto* s = static_cast<const typename decltype(tag)::Raw*>(src);
    for (int64_t i = 0; i < n && found < 0; ++i) {
      if (!std::isfinite(tag.load(s[i]))) found = i;
    }
  });
  return found;
}

void sum_squares_ref(const void* x, DType dt, int64_t n, double* stats) {
  dispatch_float(dt, "x", [&](auto tag) {
    using T = decltype(tag);
    const auto* values = static_cast<const typename T::Raw*>(x);
    double lanes[kStatLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const double value = T::load(values[i]);
      lanes[i % kStatLanes] += value * value;
    }
    finish_statistics(lanes, [&](int64_t i) { return T::load(values[i]); }, n, stats);
  });
}

}  // namespace ds::kernels
