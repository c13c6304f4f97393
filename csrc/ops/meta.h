// SPDX-License-Identifier: Apache-2.0
// How Meta kernels are registered: those that know the sizes and dtypes of results and no values.
//
// Note [Mixed devices]: torch hands a call to the Meta kernel if any tensor among its arguments lies on the meta device. Where others do not,
// results made like them would be memory that nobody has written: such calls are refused, as between a CPU and a GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstddef>
#include <optional>
#include <string>
#include <type_traits>

namespace ds::ops {

// Walks over an operator's arguments: all tensors must lie where the first one lies.
class OneDevice {
 public:
  explicit OneDevice(const char* op) : op_(op) {}

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

  std::string name(size_t index) const {
    return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("deepspeed::") + op_).c_str(), "").schema().arguments()[index].name();
  }

  const char* op_;
  std::optional<at::Device> device_;
  size_t index_ = 0, first_ = 0;
};

template <auto kernel>
struct MetaKernel;

template <typename Result, typename... Arguments, Result (*kernel)(Arguments...)>
struct MetaKernel<kernel> {
  static inline const char* op = nullptr;

  static Result call(Arguments... arguments) {
    OneDevice devices(op);
    (devices.next(arguments), ...);
    return kernel(arguments...);
  }
};

// m.impl(op, kernel) with the check of Note [Mixed devices]; `kernel` serves one operator.
template <auto kernel>
void implement_meta(torch::Library& m, const char* op) {
  MetaKernel<kernel>::op = op;
  m.impl(op, &MetaKernel<kernel>::call);
}

}  // namespace ds::ops
