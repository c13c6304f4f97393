// SPDX-License-Identifier: Apache-2.0
// Softmax cross-entropy of rows of logits, and its gradient. With lse = log(sum(exp(x))) of a row and label t:
//   loss = (1 - smoothing) * (lse - x[t]) + smoothing * (lse - mean(x)) + z_loss * lse^2
//   d x  = weight * ((1 + 2 * z_loss * lse) * softmax(x) - smoothing / columns - (1 - smoothing) at t)
// A row whose label is `ignored` has loss 0 and gradient 0.
//
// x, dx: [rows, columns], rows one after the other, one storage format, any alignment; dx may be x. stats: [rows, 2], a row's largest logit
// and its sum of exp(x - largest): apart they give the gradient more exactly than lse = largest + log(sum) would; {0, 1} where ignored.
// Labels and losses: one a row. Outputs are overwritten. Arithmetic is float32 (float64 in the reference). Labels must lie in [0, columns)
// or be `ignored`: see find_bad_label; the CUDA twins do without. Nothing is owned, nothing starts threads: calls take rows [begin, end), and
// a row's bits do not depend on the cut.
#pragma once

#include <cstdint>

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

struct CrossEntropy {
  int64_t columns = 0;
  int64_t ignored = -100;
  float smoothing = 0.0f;
  float z_loss = 0.0f;
};

void cross_entropy(float* loss, float* stats, const void* x, DType dtype, const int64_t* labels, const CrossEntropy& c, int64_t begin, int64_t end);

// stats: what the forward pass left. weights: one a row, or null: `weight` for all.
void cross_entropy_backward(void* dx, const void* x, DType dtype, const int64_t* labels, const float* stats, const float* weights, float weight,
                            const CrossEntropy& c, int64_t begin, int64_t end);

// The first of n labels that is neither in [0, columns) nor ignored; -1 if there is none. counted: how many are not ignored.
int64_t find_bad_label(const int64_t* labels, int64_t n, const CrossEntropy& c, int64_t* counted);

// Plain scalar loops in float64: the oracle of the tests.
void cross_entropy_ref(float* loss, float* stats, const void* x, DType dtype, const int64_t* labels, const CrossEntropy& c, int64_t begin, int64_t end);
void cross_entropy_backward_ref(void* dx, const void* x, DType dtype, const int64_t* labels, const float* stats, const float* weights,
                                float weight, const CrossEntropy& c, int64_t begin, int64_t end);

// CUDA twins (built with DS_CUDA): device pointers, all rows [0, rows), launched on `stream`; nothing waits. A block owns a row.
// Labels need not have been checked: a row whose label is out of range reads nothing by it, and its loss, stats and gradient are NaN.
// Where `report` has a word, such a row is written there too (bad_label_word, of any one of them if there are several). The word may be
// page-locked memory of the host.
struct LabelReport {
  uint64_t* word = nullptr;
  int64_t first_row = 0;  // the number of row 0
};
struct BadLabel {
  int64_t row, label;  // of at most 31 bits and a sign; beyond them the nearest
};
BadLabel bad_label_of(uint64_t word);  // of a word that is not 0

void cross_entropy(float* loss, float* stats, const void* x, DType dtype, const int64_t* labels, const CrossEntropy& c, int64_t rows,
                   cudaStream_t stream, const LabelReport& report = {});
void cross_entropy_backward(void* dx, const void* x, DType dtype, const int64_t* labels, const float* stats, const float* weights, float weight,
                            const CrossEntropy& c, int64_t rows, cudaStream_t stream);

}  // namespace ds::kernels
