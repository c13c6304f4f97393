// SPDX-License-Identifier: Apache-2.0
// One kernel for the dispatch keys of tensors that are no array of numbers: without it torch would say that it "could not run" the operator "with
// arguments from the 'SparseCPU' backend", and not which argument that is.
#include "ops/dense.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace ds::ops {
namespace {

using c10::DispatchKey;

// Nested tensors are met before autograd asks for their sizes, which they do not have.
constexpr DispatchKey kKeys[] = {DispatchKey::SparseCPU,       DispatchKey::SparseCUDA,       DispatchKey::SparseMeta,
                                 DispatchKey::SparseCsrCPU,    DispatchKey::SparseCsrCUDA,    DispatchKey::SparseCsrMeta,
                                 DispatchKey::QuantizedCPU,    DispatchKey::QuantizedCUDA,    DispatchKey::QuantizedMeta,
                                 DispatchKey::NestedTensorCPU, DispatchKey::NestedTensorCUDA, DispatchKey::NestedTensorMeta,
                                 DispatchKey::MkldnnCPU,       DispatchKey::AutogradNestedTensor};

void check_dense(const at::Tensor& t, const std::string& name) {
  if (!t.defined()) return;
  TORCH_CHECK_VALUE(!t.is_nested(), name, " must be a dense tensor, it is nested: give the values of its parts, or pad it");
  TORCH_CHECK_VALUE(!t.is_quantized(), name, " must be a dense tensor, it is quantized: call dequantize()");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, its layout is ", t.layout(), ": call to_dense()");
}

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) check_dense(value.toTensor(), arguments[i].name());
    if (!value.isTensorList()) continue;
    const auto tensors = value.toTensorVector();
    for (size_t k = 0; k < tensors.size(); ++k) check_dense(tensors[k], arguments[i].name() + "[" + std::to_string(k) + "]");
  }
  TORCH_CHECK_VALUE(false, op.schema().name(), " takes dense tensors alone");
}

}  // namespace

void refuse_what_is_not_dense() {
  static auto& libraries = *new std::vector<torch::Library>;  // as long as the process: the registrations go with them
  if (!libraries.empty()) return;
  const auto operators = c10::Dispatcher::singleton().getAllOpNames();
  for (const DispatchKey key : kKeys) {
    auto& library = libraries.emplace_back(torch::Library::IMPL, "deepspeed", key, __FILE__, __LINE__);
    for (const c10::OperatorName& name : operators) {
      if (name.getNamespace() != "deepspeed") continue;
      const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
    }
  }
}

}  // namespace ds::ops
