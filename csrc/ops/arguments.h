// SPDX-License-Identifier: Apache-2.0
// What every operator over tensors does with its arguments: checks that blame the argument by name (Python: ValueError), the dtype the
// kernels know, the order of work on the CPU and the stream on a GPU.
//
// Operators are registered here, in csrc/ops, as deepspeed::<name>: schema, CPU, CUDA, Meta (sizes only, for torch.compile) and Autograd.
// Their checks use TORCH_CHECK_VALUE instead of DS_CHECK_VALUE: they are called through torch's dispatcher, which knows only torch's exceptions.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "base/dtype.h"

#ifndef INTRA_OP_PARALLEL
#error "at::parallel_for would use one thread only: compile with OpenMP, as torch is"
#endif

#ifdef DS_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace ds::ops {

// The dtypes that kernels compute in float32: float32, bfloat16, float16.
inline bool is_kernel_float(at::ScalarType t) { return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf; }

inline DType to_dtype(at::ScalarType t) {
  switch (t) {
    case at::kFloat: return DType::F32;
    case at::kBFloat16: return DType::BF16;
    case at::kHalf: return DType::F16;
    case at::kDouble: return DType::F64;
    case at::kLong: return DType::I64;
    case at::kInt: return DType::I32;
    case at::kShort: return DType::I16;
    case at::kChar: return DType::I8;
    case at::kByte: return DType::U8;
    case at::kBool: return DType::BOOL;
    default: TORCH_CHECK_VALUE(false, "no kernel takes dtype ", t);
  }
}

inline void check_float(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.defined(), name, " is missing");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, its layout is ", t.layout());
  TORCH_CHECK_VALUE(is_kernel_float(t.scalar_type()), name, ": dtype must be float32, bfloat16 or float16, not ", t.scalar_type());
}

inline void check_device(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " lies on ", t.device(), ", ", like_name, " on ", like.device());
}

inline void check_dtype(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.scalar_type() == like.scalar_type(), name, " is ", t.scalar_type(), ", ", like_name, " is ", like.scalar_type());
}

inline void check_shape(const at::Tensor& t, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " has shape ", t.sizes(), ", expected ", sizes);
}

// Same shape, dtype and device.
inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(t.defined(), name, " is missing");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, its layout is ", t.layout());
  check_device(t, name, like, like_name);
  check_dtype(t, name, like, like_name);
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, " has shape ", t.sizes(), ", ", like_name, " ", like.sizes());
}

// A per-column vector beside activations, such as a weight or bias: [columns], of x's dtype or float32.
inline void check_vector(const at::Tensor& t, const char* name, int64_t columns, const at::Tensor& x, const char* x_name) {
  check_float(t, name);
  check_device(t, name, x, x_name);
  TORCH_CHECK_VALUE(t.scalar_type() == x.scalar_type() || t.scalar_type() == at::kFloat, name, " is ", t.scalar_type(), ", must be float32 or ",
                    x.scalar_type(), " as ", x_name);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == columns, name, " has shape ", t.sizes(), ", expected [", columns, "]");
}

// Pointers for the kernels; null for an undefined (optional) tensor.
inline const void* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* mutable_data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
inline at::Tensor value_or_undefined(const std::optional<at::Tensor>& t) { return t.has_value() ? *t : at::Tensor(); }

// Says that a kernel has written into the tensor: autograd then notices if it had saved the old values.
inline void mark_written(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

inline int64_t chunks_of(int64_t n, int64_t chunk) { return (n + chunk - 1) / chunk; }

// body(index, begin, end) for [0, n) cut into chunks of `chunk`, over torch's threads. The cuts are fixed: whoever keeps one partial
// sum a chunk and joins them in order gets the same bits from any number of threads.
template <typename F>
void for_chunks(int64_t n, int64_t chunk, F&& body) {
  const int64_t chunks = chunks_of(n, chunk);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) body(c, c * chunk, std::min(n, (c + 1) * chunk));
    std::atomic_thread_fence(std::memory_order_seq_cst);  // see kernels/output.h
  };
  if (chunks <= 1 || at::get_num_threads() == 1) return run(0, chunks);
  at::parallel_for(0, chunks, 1, run);
}

#ifdef DS_WITH_CUDA
// Makes the tensor's GPU current and names the stream that torch computes on there.
class OnGpu {
 public:
  explicit OnGpu(const at::Tensor& t) : guard_(t.device()), stream_(c10::cuda::getCurrentCUDAStream(t.device().index()).stream()) {}
  cudaStream_t stream() const { return stream_; }

 private:
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
};
#endif

}  // namespace ds::ops
