// SPDX-License-Identifier: Apache-2.0
#include "kernels/reduce/reduce.h"

namespace ds::kernels {

void reduce_sum(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n, double* stats) { return reduce_sum_ref(dst, src, nsrc, src_dt, scale, accumulate, n, stats); }
void copy_scale(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n) { return copy_scale_ref(dst, dst_dt, src, src_dt, scale, n); }
void accumulate(float* dst, const void* src, DType src_dt, float scale, int64_t n) { return accumulate_ref(dst, src, src_dt, scale, n); }
int64_t first_nonfinite(const void* src, DType src_dt, int64_t n) { return first_nonfinite_ref(src, src_dt, n); }
void sum_squares(const float* x, int64_t n, double* stats) { return sum_squares_ref(x, n, stats); }

}  // namespace ds::kernels
