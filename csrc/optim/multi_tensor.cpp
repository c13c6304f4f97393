// SPDX-License-Identifier: Apache-2.0
#include "optim/multi_tensor.h"

#include <ATen/Functions.h>

#include "kernels/reduce/many.h"
#include "kernels/reduce/reduce.h"
#include "ops/arguments.h"
#include "optim/many_device.h"
#include "optim/tensor_rows.h"

namespace ds::optim {
namespace {

struct Arrays {
  std::vector<kernels::FloatArray> arrays;
  std::vector<int64_t> numels;
  at::Device device = at::kCPU;
};

Arrays checked_arrays(const std::vector<at::Tensor>& tensors) {
  Arrays result;
  if (!tensors.empty() && tensors[0].defined()) result.device = tensors[0].device();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors[i];
    check_memory(t, "tensors", i);
    DS_CHECK_VALUE(ops::is_kernel_float(t.scalar_type()),
                   "tensors[" << i << "]: dtype must be float32, bfloat16 or float16, not " << c10::toString(t.scalar_type()));
    DS_CHECK_VALUE(t.is_non_overlapping_and_dense(), "tensors[" << i << "] overlaps itself or has gaps: make it contiguous");
    DS_CHECK_VALUE(t.device() == result.device, "tensors[" << i << "] lies on " << t.device().str() << ", tensors[0] on " << result.device.str());
    result.arrays.push_back({t.data_ptr(), t.numel(), ops::to_dtype(t.scalar_type())});
    result.numels.push_back(t.numel());
  }
  return result;
}

char* at_index(const kernels::FloatArray& a, int64_t i) { return static_cast<char*>(a.data) + i * static_cast<int64_t>(dtype_size(a.dtype)); }

void squared_norm_on_cpu(const Arrays& a, double* stats) {
  std::vector<size_t> first_part = {0};  // of each tensor
  for (int64_t n : a.numels) first_part.push_back(first_part.back() + static_cast<size_t>(ops::chunks_of(n, kRowPiece)));
  std::vector<double> parts(2 * first_part.back());
  for_row_pieces(a.numels, [&](size_t row, int64_t begin, int64_t end) {
    const kernels::FloatArray& array = a.arrays[row];
    kernels::sum_squares(at_index(array, begin), array.dtype, end - begin, &parts[2 * (first_part[row] + static_cast<size_t>(begin / kRowPiece))]);
  });
  stats[0] = stats[1] = 0.0;
  for (size_t i = 0; i < parts.size(); i += 2) {
    stats[0] += parts[i];
    stats[1] += parts[i + 1];
  }
}

}  // namespace

at::Tensor squared_norm(const std::vector<at::Tensor>& tensors) {
  const Arrays a = checked_arrays(tensors);
  const at::Tensor stats = at::empty({2}, at::TensorOptions().dtype(at::kDouble).device(a.device));
#ifdef DS_WITH_CUDA
  if (a.device.is_cuda()) {
    const kernels::ManyPlan plan = kernels::many_arrays_plan(a.arrays);
    const DeviceTable table(plan.bytes, a.device, [&](void* host) { kernels::write_arrays_table(plan, a.arrays, host); });
    const at::Tensor workspace = at::empty({kernels::many_workspace_bytes(plan)}, stats.options().dtype(at::kByte));
    kernels::squares_many(plan, table.data(), stats.data_ptr<double>(), workspace.data_ptr(), table.stream());
    return stats;
  }
#endif
  require_cpu(a.device);
  squared_norm_on_cpu(a, stats.data_ptr<double>());
  return stats;
}

void scale_tensors(const std::vector<at::Tensor>& tensors, const at::Tensor& factor) {
  const Arrays a = checked_arrays(tensors);
  if (tensors.empty()) return;
  DS_CHECK_VALUE(factor.defined() && factor.scalar_type() == at::kDouble && factor.numel() == 1, "factor must be one float64");
  DS_CHECK_VALUE(factor.device() == a.device, "factor lies on " << factor.device().str() << ", tensors[0] on " << a.device.str());
  for (const at::Tensor& t : tensors) ops::mark_written(t);
#ifdef DS_WITH_CUDA
  if (a.device.is_cuda()) {
    const kernels::ManyPlan plan = kernels::many_arrays_plan(a.arrays);
    const DeviceTable table(plan.bytes, a.device, [&](void* host) { kernels::write_arrays_table(plan, a.arrays, host); });
    return kernels::scale_many(plan, table.data(), factor.data_ptr<double>(), table.stream());
  }
#endif
  require_cpu(a.device);
  const float by = static_cast<float>(*factor.data_ptr<double>());
  if (by == 1.0f) return;
  for_row_pieces(a.numels, [&](size_t row, int64_t begin, int64_t end) {
    const kernels::FloatArray& array = a.arrays[row];
    kernels::copy_scale(at_index(array, begin), array.dtype, at_index(array, begin), array.dtype, by, end - begin);
  });
}

}  // namespace ds::optim
