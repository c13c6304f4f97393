// SPDX-License-Identifier: Apache-2.0
#include "kernels/exact_fp.h"

#include <type_traits>

#include "kernels/dispatch.h"
#include "kernels/optim/element.h"
#include "kernels/reduce/statistics.h"

namespace ds::kernels {
namespace {

// Calls update(i, g) for every element, then stores p[i] to `low`.
template <typename Update>
void for_each(float grad_scale, const float* p, const void* g, DType g_dt, void* low, DType low_dt, int64_t n,
              const Update& update) {
  dispatch_float(g_dt, "g", [&](auto in) {
    dispatch_optional(low, low_dt, "low", [&](auto out) {
      auto* grad = static_cast<const typename decltype(in)::Raw*>(g);
      auto* copy = static_cast<typename decltype(out)::Raw*>(low);
      for (int64_t i = 0; i < n; ++i) {
        update(i, in.load(grad[i]) * grad_scale);
        if constexpr (!std::is_same_v<decltype(out), None>) copy[i] = out.store(p[i]);
      }
    });
  });
}

}  // namespace

void adam_ref(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low,
              DType low_dt, int64_t n) {
  const AdamConstants update(h);
  for_each(grad_scale, p, g, g_dt, low, low_dt, n, [&](int64_t i, float x) { update(x, p[i], m[i], v[i]); });
}

void lion_ref(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt,
              int64_t n) {
  const LionConstants update(h);
  for_each(grad_scale, p, g, g_dt, low, low_dt, n, [&](int64_t i, float x) { update(x, p[i], m[i]); });
}

void adagrad_ref(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low,
                 DType low_dt, int64_t n) {
  const AdagradConstants update(h);
  for_each(grad_scale, p, g, g_dt, low, low_dt, n, [&](int64_t i, float x) { update(x, p[i], sum[i]); });
}

void sgd_ref(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt,
             int64_t n) {
  const SgdConstants update(h);
  float unused = 0.0f;
  for_each(grad_scale, p, g, g_dt, low, low_dt, n,
           [&](int64_t i, float x) { update(x, p[i], h.momentum != 0.0 ? buf[i] : unused); });
}

void lamb_direction_ref(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v,
                        float* u, int64_t n, double* norms) {
  const LambConstants direction(h);
  double p_lanes[kStatLanes] = {}, u_lanes[kStatLanes] = {};
  for_each(grad_scale, p, g, g_dt, nullptr, DType::F32, n, [&](int64_t i, float x) {
    u[i] = direction(x, p[i], m[i], v[i]);
    p_lanes[i % kStatLanes] += static_cast<double>(p[i]) * p[i];
    u_lanes[i % kStatLanes] += static_cast<double>(u[i]) * u[i];
  });
  norms[0] += add_lanes(p_lanes);
  norms[1] += add_lanes(u_lanes);
}

void lamb_apply_ref(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n) {
  for_each(lr_times_ratio, p, u, DType::F32, low, low_dt, n, [&](int64_t i, float x) { p[i] -= x; });
}

}  // namespace ds::kernels
