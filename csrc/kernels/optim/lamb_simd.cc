// SPDX-License-Identifier: Apache-2.0
// LAMB's direction with the norms of parameter and direction. Its second pass, lamb_apply, is a loop of optim_simd.cc.
#include "kernels/exact_fp.h"
#include "kernels/simd_targets.h"

#include <cstring>

#include "kernels/optim/optim.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/optim/lamb_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/optim/update-inl.h"
#include "kernels/reduce/squares-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

// One group of kStatLanes elements.
template <class G>
HWY_INLINE void lamb_group(const LambDirection& direction, V scale, const float* p, const typename G::Raw* g, float* m,
                           float* v, float* u, Squares& p_squares, Squares& u_squares) {
  for (int k = 0; k < kStatLanes / kLanes; ++k) {
    const int64_t i = k * kLanes;
    const V x = load_as(F32{}, p + i);
    V m_new = load_as(F32{}, m + i), v_new = load_as(F32{}, v + i);
    const V update = direction(hn::Mul(load_as(G{}, g + i), scale), x, m_new, v_new);
    store_as(F32{}, m_new, m + i);
    store_as(F32{}, v_new, v + i);
    store_as(F32{}, update, u + i);
    p_squares.add(k, x);
    u_squares.add(k, update);
  }
}

template <class G>
void lamb_loop(const LambDirection& direction, float grad_scale, const float* p, const typename G::Raw* g, float* m,
               float* v, float* u, int64_t n, double* lanes) {
  const V scale = set(grad_scale);
  Squares p_squares, u_squares;
  int64_t i = 0;
  for (; i + kStatLanes <= n; i += kStatLanes) {
    lamb_group<G>(direction, scale, p + i, g + i, m + i, v + i, u + i, p_squares, u_squares);
  }
  p_squares.store(lanes);
  u_squares.store(lanes + kStatLanes);
  if (i == n) return;
  const size_t count = static_cast<size_t>(n - i), bytes = count * sizeof(float);
  float tail_p[kStatLanes] = {}, tail_m[kStatLanes] = {}, tail_v[kStatLanes] = {}, tail_u[kStatLanes];
  typename G::Raw tail_g[kStatLanes] = {};
  std::memcpy(tail_p, p + i, bytes);
  std::memcpy(tail_m, m + i, bytes);
  std::memcpy(tail_v, v + i, bytes);
  std::memcpy(tail_g, g + i, count * sizeof(tail_g[0]));
  Squares unused_p, unused_u;  // the padding's update may be 0 / 0, so the few squares are added here
  lamb_group<G>(direction, scale, tail_p, tail_g, tail_m, tail_v, tail_u, unused_p, unused_u);
  std::memcpy(m + i, tail_m, bytes);
  std::memcpy(v + i, tail_v, bytes);
  std::memcpy(u + i, tail_u, bytes);
  for (size_t j = 0; j < count; ++j) {
    lanes[j] += static_cast<double>(tail_p[j]) * tail_p[j];
    lanes[kStatLanes + j] += static_cast<double>(tail_u[j]) * tail_u[j];
  }
}

// lanes: kStatLanes for p, then kStatLanes for u; overwritten.
void LambDirectionSlice(const LambConstants& c, float grad_scale, const float* p, const void* g, DType g_dt, float* m,
                        float* v, float* u, int64_t n, double* lanes) {
  const LambDirection direction(c);
  dispatch_float(g_dt, "g", [&](auto in) {
    using G = decltype(in);
    lamb_loop<G>(direction, grad_scale, p, static_cast<const typename G::Raw*>(g), m, v, u, n, lanes);
  });
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(LambDirectionSlice);

void lamb_direction(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v,
                    float* u, int64_t n, double* norms) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}, {v, "v"}, {u, "u"}});
  double lanes[2 * kStatLanes];
  HWY_DYNAMIC_DISPATCH(LambDirectionSlice)(LambConstants(h), grad_scale, p, g, g_dt, m, v, u, n, lanes);
  norms[0] += add_lanes(lanes);
  norms[1] += add_lanes(lanes + kStatLanes);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
