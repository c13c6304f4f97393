// SPDX-License-Identifier: Apache-2.0
// What the two cross-entropy operators share: checks, and the kernels over contiguous logits [rows, columns] on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/cross_entropy/cross_entropy.h"

namespace ds::ops {

constexpr int64_t kChunkElements = 32768;  // a thread's piece of work, in whole rows

void check_settings(double smoothing, double z_loss);
void check_label_tensor(const at::Tensor& labels, const at::Tensor& like, const char* name);

// How many labels are not ignored; refuses others out of range by their position. Contiguous int64; on a GPU it waits for them.
int64_t check_labels(const at::Tensor& labels, const kernels::CrossEntropy& c);

void losses_of_rows(float* losses, float* stats, const at::Tensor& logits, const int64_t* labels, const kernels::CrossEntropy& c);

// dx may be the logits' own memory. weights: see the kernel.
void gradients_of_rows(void* dx, const at::Tensor& logits, const int64_t* labels, const float* stats, const float* weights, float weight,
                       const kernels::CrossEntropy& c);

}  // namespace ds::ops
