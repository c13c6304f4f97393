// SPDX-License-Identifier: Apache-2.0
// The update of one element, in float32 with one rounding an operation, and the constants it needs, formed once in
// double. Used by the scalar reference and the CUDA kernels; the SIMD kernels spell the same operations in vectors.
#pragma once

#include <cmath>

#include "kernels/optim/optim.h"

#ifdef __CUDACC__
#define DS_HD __host__ __device__ __forceinline__
#else
#define DS_HD inline
#endif

namespace ds::kernels {

// On the device a plain a * b + c would become one fused operation; these keep the bits of the CPU.
DS_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
DS_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
DS_HD float sub(float a, float b) { return add(a, -b); }
DS_HD float div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
DS_HD float root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

// LAMB's ||p|| / ||u||, from the squares of both norms.
DS_HD double trust_ratio(const double* norms, const LambScale& scale) {
  const double p_norm = std::sqrt(norms[0]), u_norm = std::sqrt(norms[1]);
  if (p_norm == 0.0 || u_norm == 0.0) return 1.0;
  const double ratio = p_norm / u_norm;
  return ratio < scale.min_coeff ? scale.min_coeff : ratio > scale.max_coeff ? scale.max_coeff : ratio;
}

// a + w (b - a), written from the nearer end as torch.lerp does: the error then is that of one rounding near the result.
struct Lerp {
  float w, rest;  // rest = 1 - w
  bool from_b;    // w >= 0.5
  explicit Lerp(double weight)
      : w(static_cast<float>(weight)), rest(static_cast<float>(1.0 - weight)), from_b(weight >= 0.5) {}
  DS_HD float operator()(float a, float b) const {
    return from_b ? sub(b, mul(sub(b, a), rest)) : add(a, mul(w, sub(b, a)));
  }
};

struct AdamConstants {
  Lerp first;               // m towards g
  float beta2, rest2;       // v = beta2 v + (1 - beta2) g^2
  float inverse_root_bc2;   // 1 / sqrt(1 - beta2^step)
  float eps, step_size;     // step_size = lr / (1 - beta1^step)
  float decay, l2;          // p *= decay (AdamW), g += l2 p (Adam)
  bool has_decay, has_l2;
  explicit AdamConstants(const Adam& h)
      : first(1.0 - h.beta1), beta2(static_cast<float>(h.beta2)), rest2(static_cast<float>(1.0 - h.beta2)),
        eps(static_cast<float>(h.eps)), decay(static_cast<float>(1.0 - h.lr * h.weight_decay)),
        l2(static_cast<float>(h.weight_decay)), has_decay(h.adamw && h.weight_decay != 0.0),
        has_l2(!h.adamw && h.weight_decay != 0.0) {
    const double bc1 = h.bias_correction ? 1.0 - std::pow(h.beta1, static_cast<double>(h.step)) : 1.0;
    const double bc2 = h.bias_correction ? 1.0 - std::pow(h.beta2, static_cast<double>(h.step)) : 1.0;
    inverse_root_bc2 = static_cast<float>(1.0 / std::sqrt(bc2));
    step_size = static_cast<float>(h.lr / bc1);
  }
  DS_HD void operator()(float g, float& p, float& m, float& v) const {
    if (has_decay) p = mul(p, decay);
    if (has_l2) g = add(g, mul(l2, p));
    m = first(m, g);
    v = add(mul(v, beta2), mul(mul(rest2, g), g));
    const float denominator = add(mul(root(v), inverse_root_bc2), eps);
    p = sub(p, div(mul(step_size, m), denominator));
  }
};

struct LionConstants {
  Lerp update, average;
  float decay, lr;
  explicit LionConstants(const Lion& h)
      : update(1.0 - h.beta1), average(1.0 - h.beta2), decay(static_cast<float>(1.0 - h.lr * h.weight_decay)),
        lr(static_cast<float>(h.lr)) {}
  DS_HD void operator()(float g, float& p, float& m) const {
    const float u = update(m, g);
    const float delta = u > 0.0f ? lr : u < 0.0f ? -lr : u;  // zero and NaN go through
    p = sub(mul(p, decay), delta);
    m = average(m, g);
  }
};

struct AdagradConstants {
  float lr, eps, l2;
  bool has_l2;
  explicit AdagradConstants(const Adagrad& h)
      : lr(static_cast<float>(h.lr)), eps(static_cast<float>(h.eps)), l2(static_cast<float>(h.weight_decay)),
        has_l2(h.weight_decay != 0.0) {}
  DS_HD void operator()(float g, float& p, float& sum) const {
    if (has_l2) g = add(g, mul(l2, p));
    sum = add(sum, mul(g, g));
    p = sub(p, div(mul(lr, g), add(root(sum), eps)));
  }
};

struct SgdConstants {
  float lr, momentum, rest, l2;  // rest = 1 - dampening
  bool has_l2, has_momentum, nesterov, first_step;
  explicit SgdConstants(const Sgd& h)
      : lr(static_cast<float>(h.lr)), momentum(static_cast<float>(h.momentum)),
        rest(static_cast<float>(1.0 - h.dampening)), l2(static_cast<float>(h.weight_decay)),
        has_l2(h.weight_decay != 0.0), has_momentum(h.momentum != 0.0), nesterov(h.nesterov),
        first_step(h.first_step) {}
  DS_HD void operator()(float g, float& p, float& buf) const {
    if (has_l2) g = add(g, mul(l2, p));
    if (has_momentum) {
      buf = first_step ? g : add(mul(buf, momentum), mul(rest, g));
      g = nesterov ? add(g, mul(momentum, buf)) : buf;
    }
    p = sub(p, mul(lr, g));
  }
};

struct LambConstants {
  Lerp first;
  float beta2, rest2, inverse_bc1, inverse_bc2, eps, weight_decay;
  bool eps_inside_sqrt;
  explicit LambConstants(const Lamb& h)
      : first(1.0 - h.beta1), beta2(static_cast<float>(h.beta2)), rest2(static_cast<float>(1.0 - h.beta2)),
        eps(static_cast<float>(h.eps)), weight_decay(static_cast<float>(h.weight_decay)),
        eps_inside_sqrt(h.eps_inside_sqrt) {
    const double step = static_cast<double>(h.step);
    inverse_bc1 = static_cast<float>(h.bias_correction ? 1.0 / (1.0 - std::pow(h.beta1, step)) : 1.0);
    inverse_bc2 = static_cast<float>(h.bias_correction ? 1.0 / (1.0 - std::pow(h.beta2, step)) : 1.0);
  }
  DS_HD float operator()(float g, float p, float& m, float& v) const {
    m = first(m, g);
    v = add(mul(v, beta2), mul(mul(rest2, g), g));
    const float second = mul(v, inverse_bc2);
    const float denominator = eps_inside_sqrt ? root(add(second, eps)) : add(root(second), eps);
    return add(div(mul(m, inverse_bc1), denominator), mul(weight_decay, p));
  }
};

}  // namespace ds::kernels
