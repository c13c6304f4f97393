// SPDX-License-Identifier: Apache-2.0
#include "optim/tensor_step.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "optim/device_ops.h"

namespace ds::optim {
namespace {

// Elements widened at a time where a parameter or state is not float32: the float32 copies stay in the second-level cache.
constexpr int64_t kBlock = int64_t{1} << 15;

bool kernel_dtype(at::ScalarType t) { return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf; }

// The elements of a dense tensor in the order they lie in memory.
at::Tensor flat(const at::Tensor& t) { return t.detach().as_strided({t.numel()}, {1}, t.storage_offset()); }

void check_param(const at::Tensor& p, size_t index) {
  DS_CHECK_VALUE(p.layout() == at::kStrided, "params[" << index << "] is not a strided tensor");
  DS_CHECK_VALUE(kernel_dtype(p.scalar_type()),
                 "params[" << index << "]: dtype must be float32, bfloat16 or float16, not " << c10::toString(p.scalar_type()));
  DS_CHECK_VALUE(p.is_non_overlapping_and_dense(), "params[" << index << "] overlaps itself or has gaps: make it contiguous");
}

void check_like(const at::Tensor& t, const char* name, size_t index, const at::Tensor& p) {
  DS_CHECK_VALUE(t.defined(), name << "[" << index << "] is undefined");
  DS_CHECK_VALUE(t.layout() == at::kStrided, name << "[" << index << "]: sparse tensors are not supported");
  DS_CHECK_VALUE(kernel_dtype(t.scalar_type()),
                 name << "[" << index << "]: dtype must be float32, bfloat16 or float16, not " << c10::toString(t.scalar_type()));
  DS_CHECK_VALUE(t.device() == p.device(),
                 name << "[" << index << "] lies on " << t.device().str() << ", its parameter on " << p.device().str());
  DS_CHECK_VALUE(t.sizes() == p.sizes(), name << "[" << index << "] has shape " << t.sizes() << ", its parameter " << p.sizes());
}

struct NamedStates {
  const char* name;
  const Tensors* tensors;
};

// The arrays of one parameter, flat and laid out alike.
struct Arrays {
  at::Tensor p, g;
  Tensors states;
  bool all_float() const {
    return p.scalar_type() == at::kFloat &&
           std::all_of(states.begin(), states.end(), [](const at::Tensor& s) { return s.scalar_type() == at::kFloat; });
  }
  Arrays narrow(int64_t begin, int64_t count) const {
    Arrays a{p.narrow(0, begin, count), g.narrow(0, begin, count), {}};
    for (const at::Tensor& s : states) a.states.push_back(s.narrow(0, begin, count));
    return a;
  }
};

Arrays arrays_of(size_t index, const Tensors& params, const Tensors& grads, const std::vector<NamedStates>& states) {
  const at::Tensor& p = params[index];
  check_param(p, index);
  at::Tensor g = grads[index];
  check_like(g, "grads", index, p);
  if (g.strides() != p.strides()) {
    at::Tensor copy = at::empty_strided(p.sizes(), p.strides(), g.options());
    copy.copy_(g.detach());
    g = copy;
  }
  Arrays a{flat(p), flat(g), {}};
  for (const NamedStates& s : states) {
    const at::Tensor& t = (*s.tensors)[index];
    check_like(t, s.name, index, p);
    DS_CHECK_VALUE(t.strides() == p.strides(),
                   s.name << "[" << index << "] has strides " << t.strides() << ", its parameter " << p.strides());
    a.states.push_back(flat(t));
  }
  return a;
}

// Float32 room for the arrays that are narrower, one to a thread: allocated once, used for every block.
class Scratch {
 public:
  Scratch(const Arrays& a, int64_t numel) : p_(room(a.p, numel)) {
    for (const at::Tensor& s : a.states) states_.push_back(room(s, numel));
  }
  // update(p, g, states, low) on float32 copies of what is narrower; `low` is then the parameter itself.
  template <typename Update>
  void operator()(const Arrays& a, const Update& update) const {
    Tensors states;
    for (size_t k = 0; k < states_.size(); ++k) states.push_back(widened(a.states[k], states_[k]));
    update(widened(a.p, p_), a.g, states, p_.defined() ? a.p : at::Tensor());
    for (size_t k = 0; k < states_.size(); ++k) {
      if (states_[k].defined()) copy_scale(a.states[k], states[k], 1.0f);
    }
  }

 private:
  static at::Tensor room(const at::Tensor& t, int64_t numel) {
    if (t.scalar_type() == at::kFloat) return {};
    return at::empty({numel}, t.options().dtype(at::kFloat));
  }
  static at::Tensor widened(const at::Tensor& t, const at::Tensor& room) {
    if (!room.defined()) return t;
    at::Tensor wide = room.narrow(0, 0, t.numel());
    copy_scale(wide, t, 1.0f);
    return wide;
  }
  at::Tensor p_;
  Tensors states_;  // undefined where the array is float32 itself
};

template <typename Update>
void update_param(const Arrays& a, const Update& update) {
  const int64_t n = a.p.numel();
  if (a.all_float() || !a.p.is_cpu()) return Scratch(a, n)(a, update);
  at::parallel_for(0, (n + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
    const Scratch scratch(a, std::min(kBlock, n));
    for (int64_t b = first; b < last; ++b) scratch(a.narrow(b * kBlock, std::min(kBlock, n - b * kBlock)), update);
  });
}

void check_lengths(const Tensors& params, const Tensors& grads, const std::vector<NamedStates>& states) {
  DS_CHECK_VALUE(grads.size() == params.size(), "grads has " << grads.size() << " tensors, params " << params.size());
  for (const NamedStates& s : states) {
    DS_CHECK_VALUE(s.tensors->size() == params.size(), s.name << " has " << s.tensors->size() << " tensors, params " << params.size());
  }
}

// Everything is checked before anything is updated.
std::vector<Arrays> checked(const Tensors& params, const Tensors& grads, const std::vector<NamedStates>& states) {
  check_lengths(params, grads, states);
  std::vector<Arrays> all;
  all.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) all.push_back(arrays_of(i, params, grads, states));
  return all;
}

template <typename Update>
void update_all(const Tensors& params, const Tensors& grads, const std::vector<NamedStates>& states, const Update& update) {
  for (const Arrays& a : checked(params, grads, states)) update_param(a, update);
}

}  // namespace

void adam_step(const kernels::Adam& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs) {
  update_all(params, grads, {{"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}},
             [&](const at::Tensor& p, const at::Tensor& g, const Tensors& s, const at::Tensor& low) {
               adam(h, grad_scale, p, g, s[0], s[1], low);
             });
}

void lion_step(const kernels::Lion& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs) {
  update_all(params, grads, {{"exp_avgs", &exp_avgs}},
             [&](const at::Tensor& p, const at::Tensor& g, const Tensors& s, const at::Tensor& low) {
               lion(h, grad_scale, p, g, s[0], low);
             });
}

void adagrad_step(const kernels::Adagrad& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& sums) {
  update_all(params, grads, {{"sums", &sums}},
             [&](const at::Tensor& p, const at::Tensor& g, const Tensors& s, const at::Tensor& low) {
               adagrad(h, grad_scale, p, g, s[0], low);
             });
}

void sgd_step(const kernels::Sgd& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers) {
  const bool has_buffers = h.momentum != 0.0;
  const std::vector<NamedStates> states = has_buffers ? std::vector<NamedStates>{{"momentum_buffers", &momentum_buffers}}
                                                      : std::vector<NamedStates>{};
  update_all(params, grads, states, [&](const at::Tensor& p, const at::Tensor& g, const Tensors& s, const at::Tensor& low) {
    sgd(h, grad_scale, p, g, has_buffers ? s[0] : at::Tensor(), low);
  });
}

std::vector<double> lamb_step(const kernels::Lamb& h, double min_coeff, double max_coeff, float grad_scale, const Tensors& params,
                              const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs) {
  std::vector<double> ratios;
  for (const Arrays& a : checked(params, grads, {{"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}})) {
    double ratio = 1.0;
    Scratch(a, a.p.numel())(a, [&](const at::Tensor& p, const at::Tensor& g, const Tensors& s, const at::Tensor& low) {
      const at::Tensor u = at::empty_like(p);
      const at::Tensor norms = at::zeros({2}, p.options().dtype(at::kDouble));
      lamb_direction(h, grad_scale, p, g, s[0], s[1], u, norms);
      const at::Tensor host = norms.cpu();
      const double p_norm = std::sqrt(host.data_ptr<double>()[0]), u_norm = std::sqrt(host.data_ptr<double>()[1]);
      if (p_norm != 0.0 && u_norm != 0.0) ratio = std::clamp(p_norm / u_norm, min_coeff, max_coeff);
      lamb_apply(static_cast<float>(h.lr * ratio), p, u, low);
    });
    ratios.push_back(ratio);
  }
  return ratios;
}

}  // namespace ds::optim
