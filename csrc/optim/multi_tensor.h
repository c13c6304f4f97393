// SPDX-License-Identifier: Apache-2.0
// Norms and scaling of lists of tensors: on the CPU over torch's threads, on a GPU in one launch for each list.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace ds::optim {

// float64 [2] on the tensors' device: the sum of the squares of all elements, and how many are not finite. Tensors are float32, bfloat16 or
// float16, dense without overlap and on one device. The bits depend neither on the number of threads nor on the GPU.
at::Tensor squared_norm(const std::vector<at::Tensor>& tensors);

// Multiplies all elements by `factor`, a float64 scalar on the tensors' device, which is rounded to float32 first; nothing is written if it is 1.
void scale_tensors(const std::vector<at::Tensor>& tensors, const at::Tensor& factor);

}  // namespace ds::optim
