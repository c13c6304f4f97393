// SPDX-License-Identifier: Apache-2.0
// Fused optimizer updates over one contiguous slice: one pass reads each array once and writes it once.
//
// Conventions. p, the states and u are float32; g is F32, F16 or BF16 and is multiplied by grad_scale (unscale x clip)
// when loaded. `low` (nullable) receives the updated p rounded to low_dt in the same pass; arrays do not overlap each other,
// except that `low` may be g. An element's result depends on its own inputs only, not on where it lies in a slice, and has the same bits on
// every instruction set (no multiply is contracted into an add). Nothing here starts threads: callers split ranges. Hyperparameters are
// double because 1 - beta is formed from them: 1 - 0.999f is off by 1.3e-5.
#pragma once

#include <cstdint>

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

// Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), as torch.optim computes them: with `adamw` p is decayed first, otherwise
// weight_decay * p is added to the gradient. `step` is the number of this update, from 1.
struct Adam {
    double lr, beta1, beta2, eps, weight_decay;
    bool adamw;
    bool bias_correction;
    int64_t step;
};
void adam(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low, DType low_dt, int64_t n);

// Lion (Chen et al. 2023): p = p * (1 - lr wd) - lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g; sign(0) = 0.
struct Lion {
    double lr, beta1, beta2, weight_decay;
};
void lion(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt, int64_t n);

// Adagrad (Duchi et al. 2011): g += wd p; sum += g^2; p -= lr g / (sqrt(sum) + eps).
struct Adagrad {
    double lr, eps, weight_decay;
};
void adagrad(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low, DType low_dt, int64_t n);

// torch.optim.SGD. With momentum, `first_step` starts buf as the gradient itself; buf may be null when momentum is 0.
struct Sgd {
    double lr, momentum, dampening, weight_decay;
    bool nesterov;
    bool first_step;
};
void sgd(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt, int64_t n);

// LAMB (You et al. 2020). The trust ratio belongs to a whole parameter, so the update comes in two passes: `lamb_direction` updates m and
// v, writes u = mhat / (sqrt(vhat) + eps) + wd p and ADDS ||p||^2 and ||u||^2 to norms[0] and norms[1] (order of summation as in reduce.h,
// Note [statistics]); the caller completes the norms over all slices of the parameter; `lamb_apply` does p -= lr_times_ratio u.
struct Lamb {
    double lr, beta1, beta2, eps, weight_decay;
    bool bias_correction;
    int64_t step;
    bool eps_inside_sqrt = false;  // sqrt(vhat + eps) instead of sqrt(vhat) + eps
};
void lamb_direction(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v, float* u, int64_t n,
                    double* norms);
void lamb_apply(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n);
// lr and the bounds of the trust ratio ||p|| / ||u||, which is 1 where a norm is zero (element.h: trust_ratio).
struct LambScale {
    double lr, min_coeff, max_coeff;
};

// Plain scalar loops with the same results bit for bit: the oracle of the tests.
void adam_ref(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low, DType low_dt, int64_t n);
void lion_ref(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt, int64_t n);
void adagrad_ref(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low, DType low_dt, int64_t n);
void sgd_ref(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt, int64_t n);
void lamb_direction_ref(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v, float* u, int64_t n,
                        double* norms);
void lamb_apply_ref(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n);

// CUDA twins (built with DS_CUDA): device pointers, launched on `stream`, nothing waits. `norms` and `workspace` (kCudaReduceWorkspaceBytes
// of reduce.h) live on the device.
void adam(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low, DType low_dt, int64_t n,
          cudaStream_t stream);
void lion(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt, int64_t n,
          cudaStream_t stream);
void adagrad(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low, DType low_dt, int64_t n,
             cudaStream_t stream);
void sgd(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt, int64_t n,
         cudaStream_t stream);
void lamb_direction(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v, float* u, int64_t n,
                    double* norms, void* workspace, cudaStream_t stream);
void lamb_apply(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n, cudaStream_t stream);
// The same with lr times the ratio of `norms`, which never leave the device; the ratio is written to *ratio.
void lamb_apply(const LambScale& scale, const double* norms, double* ratio, float* p, const float* u, void* low, DType low_dt, int64_t n,
                cudaStream_t stream);

}  // namespace ds::kernels
