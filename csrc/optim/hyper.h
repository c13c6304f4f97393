// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <tuple>

namespace ds::optim {

// The hyperparameters of one parameter group as they stand when the step runs; each kind reads what it needs.
struct Hyper {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0, momentum = 0, dampening = 0;
  double max_coeff = 10, min_coeff = 0.01;
  bool decoupled = true, bias_correction = true, nesterov = false, eps_inside_sqrt = false;
  int64_t step = 1;   // number of this update, from 1

  auto all() const {
    return std::tie(lr, beta1, beta2, eps, weight_decay, momentum, dampening, max_coeff, min_coeff, decoupled, bias_correction, nesterov,
                    eps_inside_sqrt, step);
  }
  bool operator==(const Hyper& other) const { return all() == other.all(); }
  bool operator!=(const Hyper& other) const { return all() != other.all(); }
};

}  // namespace ds::optim
