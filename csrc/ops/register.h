// SPDX-License-Identifier: Apache-2.0
// What is checked of arguments whatever the operator: by wrappers with which Meta and Autograd kernels are registered.
//
// Note [Mixed devices]: torch hands a call to the Meta kernel if any tensor among its arguments lies on the meta device. Where others do not,
// results made like them would be memory that nobody has written: such calls are refused, as between a CPU and a GPU.
//
// Note [Missing tensors]: torch takes None for a tensor, too, where the schema does not allow for one. Autograd would ask it for its device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstddef>
#include <optional>
#include <string>
#include <type_traits>

namespace ds::ops {

// An operator's arguments, one after the other.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

 protected:
  std::string name(size_t index) const {
    return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("deepspeed::") + op_).c_str(), "").schema().arguments()[index].name();
  }
  size_t index_ = 0;

 private:
  const char* op_;
};

// All tensors must lie where the first one lies.
class OnOneDevice : Arguments {
 public:
  using Arguments::Arguments;

  template <typename T>
  void next(const T& argument) {
    if constexpr (std::is_same_v<T, at::Tensor>) {
      check(argument);
    } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
      if (argument.has_value()) check(*argument);
    } else if constexpr (std::is_same_v<T, at::TensorList>) {
      for (const at::Tensor& t : argument) check(t);
    }
    ++index_;
  }

 private:
  void check(const at::Tensor& t) {
    if (!t.defined()) return;
    if (!device_.has_value()) {
      device_ = t.device();
      first_ = index_;
    }
    TORCH_CHECK_VALUE(t.device() == *device_, name(index_), " lies on ", t.device(), ", ", name(first_), " on ", *device_);
  }

  std::optional<at::Device> device_;
  size_t first_ = 0;
};

// What is a tensor by the schema must be one.
class Given : Arguments {
 public:
  using Arguments::Arguments;

  template <typename T>
  void next(const T& argument) {
    if constexpr (std::is_same_v<T, at::Tensor>) TORCH_CHECK_VALUE(argument.defined(), name(index_), " must be a tensor, not None");
    ++index_;
  }
};

template <typename Check, auto kernel>
struct Checked;

template <typename Check, typename Result, typename... Args, Result (*kernel)(Args...)>
struct Checked<Check, kernel> {
  static inline const char* op = nullptr;

  static Result call(Args... arguments) {
    Check check(op);
    (check.next(arguments), ...);
    return kernel(arguments...);
  }
};

// m.impl(op, kernel) with the check of Note [Mixed devices]; `kernel` serves one operator.
template <auto kernel>
void implement_meta(torch::Library& m, const char* op) {
  Checked<OnOneDevice, kernel>::op = op;
  m.impl(op, &Checked<OnOneDevice, kernel>::call);
}

// m.impl(op, kernel) with the check of Note [Missing tensors]; `kernel` serves one operator.
template <auto kernel>
void implement_autograd(torch::Library& m, const char* op) {
  Checked<Given, kernel>::op = op;
  m.impl(op, &Checked<Given, kernel>::call);
}

}  // namespace ds::ops
