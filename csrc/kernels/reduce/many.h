// SPDX-License-Identifier: Apache-2.0
// CUDA: norms and scaling of thousands of arrays in one launch each (built with DS_CUDA; the CPU walks them with reduce.h).
//
// The table is written on the host and copied to the device by the caller (kernels/many.h). Sums are float64, one part a chunk, joined in order:
// for given sizes they repeat bit for bit on any GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "base/dtype.h"
#include "kernels/many.h"

namespace ds::kernels {

struct FloatArray {
  void* data;
  int64_t n;
  DType dtype;  // F32, F16 or BF16
};

ManyPlan many_arrays_plan(const std::vector<FloatArray>& arrays);
void write_arrays_table(const ManyPlan& plan, const std::vector<FloatArray>& arrays, void* table);

// stats[0] = sum of squares of all elements, stats[1] = how many are not finite. workspace: many_workspace_bytes(plan) on the device.
inline int64_t many_workspace_bytes(const ManyPlan& plan) { return plan.chunks * 2 * static_cast<int64_t>(sizeof(double)); }
void squares_many(const ManyPlan& plan, const void* device_table, double* stats, void* workspace, cudaStream_t stream);

// Every element times float(*factor), a number on the device: the bits of copy_scale (reduce.h). Nothing is written if the factor is 1.
void scale_many(const ManyPlan& plan, const void* device_table, const double* factor, cudaStream_t stream);

}  // namespace ds::kernels
