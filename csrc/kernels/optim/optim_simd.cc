// SPDX-License-Identifier: Apache-2.0
#include "kernels/optim/optim.h"

namespace ds::kernels {

void adam(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low, DType low_dt, int64_t n) { return adam_ref(h, grad_scale, p, g, g_dt, m, v, low, low_dt, n); }
void lion(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt, int64_t n) { return lion_ref(h, grad_scale, p, g, g_dt, m, low, low_dt, n); }
void adagrad(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low, DType low_dt, int64_t n) { return adagrad_ref(h, grad_scale, p, g, g_dt, sum, low, low_dt, n); }
void sgd(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt, int64_t n) { return sgd_ref(h, grad_scale, p, g, g_dt, buf, low, low_dt, n); }
void lamb_direction(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v, float* u, int64_t n, double* norms) { return lamb_direction_ref(h, grad_scale, p, g, g_dt, m, v, u, n, norms); }
void lamb_apply(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n) { return lamb_apply_ref(lr_times_ratio, p, u, low, low_dt, n); }

}  // namespace ds::kernels
