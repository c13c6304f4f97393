// SPDX-License-Identifier: Apache-2.0
// What the two cross-entropy operators share: checks, and the kernels over contiguous logits [rows, columns] on any device.
//
// Note [Labels on a GPU]. To look at labels there would wait for the device with every call. So the kernels look: a row whose label is out of range has
// a loss and a gradient of NaN, reads nothing by the label, and says row and label in a word of page-locked memory, which a kernel writes only then.
// Whoever calls a cross-entropy on that device next, forward or backward, reads the word, which costs nothing, and gets the ValueError.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/cross_entropy/cross_entropy.h"

namespace ds::ops {

constexpr int64_t kChunkElements = 32768;  // a thread's piece of work, in whole rows

void check_settings(double smoothing, double z_loss);
void check_label_tensor(const at::Tensor& labels, const at::Tensor& like, const char* name);

// Contiguous int64. On the CPU: refuses labels out of range by their position; how many are not ignored. On a GPU: refuses what kernels have found in an
// earlier call, and does not count. See Note [Labels on a GPU].
std::optional<int64_t> check_labels(const at::Tensor& labels, const kernels::CrossEntropy& c);

// first_row: what a report calls row 0.
void losses_of_rows(float* losses, float* stats, const at::Tensor& logits, const int64_t* labels, const kernels::CrossEntropy& c,
                    int64_t first_row = 0);

// dx may be the logits' own memory. weights: see the kernel.
void gradients_of_rows(void* dx, const at::Tensor& logits, const int64_t* labels, const float* stats, const float* weights, float weight,
                       const kernels::CrossEntropy& c);

}  // namespace ds::ops
