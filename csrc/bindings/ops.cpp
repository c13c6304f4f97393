// SPDX-License-Identifier: Apache-2.0
// deepspeed._C: optimizer updates of whole parameters, for deepspeed/ops. Conversion only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cerrno>
#include <optional>
#include <tuple>

#include "ops/dense.h"
#include "optim/long_lived.h"
#include "optim/multi_tensor.h"
#include "optim/tensor_step.h"

namespace py = pybind11;
using namespace ds;
using optim::Tensors;
using Release = py::call_guard<py::gil_scoped_release>;
using Scales = std::vector<Tensors>;
using Dice = std::optional<std::tuple<uint64_t, uint64_t, std::vector<int64_t>>>;  // seed, draw, numbers

namespace {

optim::Storage storage_of(const Tensors& low_bits, const Scales& scales, const Dice& rounding) {
  optim::Storage storage{low_bits, scales, std::nullopt};
  if (rounding) storage.rounding = optim::Rounding{std::get<0>(*rounding), std::get<1>(*rounding), std::get<2>(*rounding)};
  return storage;
}

}  // namespace

void bind_ops(py::module_& m) {
  ops::refuse_what_is_not_dense();
#ifdef DS_WITH_CUDA
  m.attr("OPS_HAVE_CUDA") = true;
#else
  m.attr("OPS_HAVE_CUDA") = false;
#endif
  m.def("adam_step",
        [](const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, int64_t step, double lr,
           double beta1, double beta2, double eps, double weight_decay, bool adamw, bool bias_correction, float grad_scale,
           const Tensors& low_bits, const Scales& scales, const Dice& rounding) {
          optim::adam_step({lr, beta1, beta2, eps, weight_decay, adamw, bias_correction, step}, grad_scale, params, grads, exp_avgs,
                           exp_avg_sqs, storage_of(low_bits, scales, rounding));
        },
        py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::kw_only(), py::arg("step"), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("adamw"), py::arg("bias_correction"),
        py::arg("grad_scale") = 1.0f, py::arg("low_bits") = Tensors(), py::arg("scales") = Scales(), py::arg("rounding") = Dice(), Release());
  m.def("lion_step",
        [](const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, double lr, double beta1, double beta2,
           double weight_decay, float grad_scale,
           const Tensors& low_bits, const Scales& scales, const Dice& rounding) {
          optim::lion_step({lr, beta1, beta2, weight_decay}, grad_scale, params, grads, exp_avgs, storage_of(low_bits, scales, rounding));
        },
        py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("weight_decay"), py::arg("grad_scale") = 1.0f, py::arg("low_bits") = Tensors(), py::arg("scales") = Scales(), py::arg("rounding") = Dice(), Release());
  m.def("adagrad_step",
        [](const Tensors& params, const Tensors& grads, const Tensors& sums, double lr, double eps, double weight_decay, float grad_scale,
           const Tensors& low_bits, const Scales& scales, const Dice& rounding) { optim::adagrad_step({lr, eps, weight_decay}, grad_scale, params, grads, sums, storage_of(low_bits, scales, rounding)); },
        py::arg("params"), py::arg("grads"), py::arg("sums"), py::kw_only(), py::arg("lr"), py::arg("eps"), py::arg("weight_decay"),
        py::arg("grad_scale") = 1.0f, py::arg("low_bits") = Tensors(), py::arg("scales") = Scales(), py::arg("rounding") = Dice(), Release());
  m.def("sgd_step",
        [](const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers, double lr, double momentum, double dampening,
           double weight_decay, bool nesterov, bool first_step, float grad_scale,
           const Tensors& low_bits, const Scales& scales, const Dice& rounding) {
          optim::sgd_step({lr, momentum, dampening, weight_decay, nesterov, first_step}, grad_scale, params, grads, momentum_buffers,
                          storage_of(low_bits, scales, rounding));
        },
        py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"), py::kw_only(), py::arg("lr"), py::arg("momentum"),
        py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"), py::arg("first_step"), py::arg("grad_scale") = 1.0f, py::arg("low_bits") = Tensors(), py::arg("scales") = Scales(), py::arg("rounding") = Dice(), Release());
  m.def("lamb_step",
        [](const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, int64_t step, double lr,
           double beta1, double beta2, double eps, double weight_decay, bool bias_correction, bool eps_inside_sqrt, double min_coeff,
           double max_coeff, float grad_scale,
           const Tensors& low_bits, const Scales& scales, const Dice& rounding) {
          return optim::lamb_step({lr, beta1, beta2, eps, weight_decay, bias_correction, step, eps_inside_sqrt}, min_coeff, max_coeff,
                                  grad_scale, params, grads, exp_avgs, exp_avg_sqs, storage_of(low_bits, scales, rounding));
        },
        py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::kw_only(), py::arg("step"), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("bias_correction"),
        py::arg("eps_inside_sqrt"), py::arg("min_coeff"), py::arg("max_coeff"), py::arg("grad_scale") = 1.0f, py::arg("low_bits") = Tensors(), py::arg("scales") = Scales(), py::arg("rounding") = Dice(), Release());
  m.def("long_lived_zeros",
        [](int64_t numel, at::ScalarType dtype, at::Device device) { return optim::long_lived_zeros(numel, dtype, device); },
        py::arg("numel"), py::arg("dtype"), py::arg("device"), Release());
  m.def("settle", &optim::settle, py::arg("tensor"), Release());
  m.def("discard", [](const at::Tensor& t) { return optim::discard(t) ? 0 : errno; }, py::arg("tensor"), Release(),
        "Frees the memory of a tensor on the host, and its values with it. 0, or the errno with which the system keeps it.");
  m.def("squared_norm", &optim::squared_norm, py::arg("tensors"), Release());
  m.def("scale_tensors", &optim::scale_tensors, py::arg("tensors"), py::arg("factor"), Release());
}
