// SPDX-License-Identifier: Apache-2.0
#include "optim/device_ops.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "kernels/optim/element.h"
#include "kernels/reduce/reduce.h"
#include "optim/split_master.h"
#include "optim/tensor_step.h"
#ifdef DS_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace ds::optim {
namespace {

// Statistics are summed chunk by chunk in order, so chunks must not depend on the number of threads.
constexpr int64_t kChunk = int64_t{1} << 18;

char* ptr(const at::Tensor& t) { return t.defined() ? static_cast<char*>(t.data_ptr()) : nullptr; }
float* f32(const at::Tensor& t) { return reinterpret_cast<float*>(ptr(t)); }
float* f32_at(const at::Tensor& t, int64_t i) { return t.defined() ? f32(t) + i : nullptr; }
char* at_index(const at::Tensor& t, int64_t i) {
  return t.defined() ? ptr(t) + i * static_cast<int64_t>(t.element_size()) : nullptr;
}
DType dtype_or_f32(const at::Tensor& t) { return t.defined() ? to_dtype(t.scalar_type()) : DType::F32; }

void sum_chunks(const std::vector<double>& parts, double* stats) {
  stats[0] = stats[1] = 0;
  for (size_t i = 0; i < parts.size(); i += 2) {
    stats[0] += parts[i];
    stats[1] += parts[i + 1];
  }
}

std::vector<double> chunk_stats(int64_t n) { return std::vector<double>(static_cast<size_t>(2 * ops::chunks_of(n, kChunk))); }

#ifdef DS_WITH_CUDA
cudaStream_t stream_of(const at::Tensor& t) { return c10::cuda::getCurrentCUDAStream(t.device().index()).stream(); }
at::Tensor cuda_workspace(const at::Tensor& like) {
  return at::empty({kernels::kCudaReduceWorkspaceBytes}, at::TensorOptions().dtype(at::kByte).device(like.device()));
}
#define DS_ON_CUDA(tensor, ...)                       \
  if ((tensor).is_cuda()) {                           \
    const c10::cuda::CUDAGuard guard((tensor).device()); \
    __VA_ARGS__;                                      \
    return;                                           \
  }
#else
#define DS_ON_CUDA(tensor, ...) \
  DS_CHECK((tensor).is_cpu(),   \
           "a tensor lies on " << (tensor).device().str() << " but this build of deepspeed has no CUDA code: rebuild with nvcc on PATH")
#endif

}  // namespace

void reduce_sum(const at::Tensor& dst, const void* const* srcs, int nsrc, DType src_dtype, float scale, bool accumulate,
                const at::Tensor& stats) {
  const int64_t n = dst.numel();
  double* out = stats.data_ptr<double>();
  DS_ON_CUDA(dst, kernels::reduce_sum(f32(dst), srcs, nsrc, src_dtype, scale, accumulate, n, out,
                                      cuda_workspace(dst).data_ptr(), stream_of(dst)));
  std::vector<double> parts = chunk_stats(n);
  const int64_t es = static_cast<int64_t>(dtype_size(src_dtype));
  ops::for_chunks(n, kChunk, [&](int64_t c, int64_t begin, int64_t end) {
    std::vector<const void*> moved(static_cast<size_t>(nsrc));
    for (int r = 0; r < nsrc; ++r) moved[r] = static_cast<const char*>(srcs[r]) + begin * es;
    kernels::reduce_sum(f32(dst) + begin, moved.data(), nsrc, src_dtype, scale, accumulate, end - begin, &parts[2 * c]);
  });
  sum_chunks(parts, out);
}

void copy_scale(const at::Tensor& dst, const at::Tensor& src, float scale) {
  const int64_t n = dst.numel();
  const DType to = to_dtype(dst.scalar_type()), from = to_dtype(src.scalar_type());
  DS_ON_CUDA(dst, kernels::copy_scale(ptr(dst), to, ptr(src), from, scale, n, stream_of(dst)));
  ops::for_chunks(n, kChunk, [&](int64_t, int64_t begin, int64_t end) {
    kernels::copy_scale(at_index(dst, begin), to, at_index(src, begin), from, scale, end - begin);
  });
}

void accumulate(const at::Tensor& dst, const at::Tensor& src, float scale) {
  const int64_t n = dst.numel();
  const DType from = to_dtype(src.scalar_type());
  DS_ON_CUDA(dst, kernels::accumulate(f32(dst), ptr(src), from, scale, n, stream_of(dst)));
  ops::for_chunks(n, kChunk, [&](int64_t, int64_t begin, int64_t end) {
    kernels::accumulate(f32(dst) + begin, at_index(src, begin), from, scale, end - begin);
  });
}

void sum_squares(const at::Tensor& x, const at::Tensor& stats) {
  const int64_t n = x.numel();
  double* out = stats.data_ptr<double>();
  DS_ON_CUDA(x, kernels::sum_squares(f32(x), n, out, cuda_workspace(x).data_ptr(), stream_of(x)));
  std::vector<double> parts = chunk_stats(n);
  ops::for_chunks(n, kChunk, [&](int64_t c, int64_t begin, int64_t end) { kernels::sum_squares(f32(x) + begin, end - begin, &parts[2 * c]); });
  sum_chunks(parts, out);
}

int64_t first_nonfinite(const void* src, DType dtype, int64_t n, at::Device device) {
#ifdef DS_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    at::Tensor index = at::empty({1}, at::TensorOptions().dtype(at::kLong).device(device));
    kernels::first_nonfinite(src, dtype, n, index.data_ptr<int64_t>(), stream_of(index));
    return index.item<int64_t>();
  }
#endif
  return kernels::first_nonfinite(src, dtype, n);
}

void adam(const kernels::Adam& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& m,
          const at::Tensor& v, const at::Tensor& low) {
  if (is_split(p)) return adam_step(h, grad_scale, {low}, {g}, {m}, {v}, {{p}, {}, {}});
  const DType gd = to_dtype(g.scalar_type()), ld = dtype_or_f32(low);
  DS_ON_CUDA(p, kernels::adam(h, grad_scale, f32(p), ptr(g), gd, f32(m), f32(v), ptr(low), ld, p.numel(), stream_of(p)));
  ops::for_chunks(p.numel(), kChunk, [&](int64_t, int64_t b, int64_t e) {
    kernels::adam(h, grad_scale, f32_at(p, b), at_index(g, b), gd, f32_at(m, b), f32_at(v, b), at_index(low, b), ld, e - b);
  });
}

void lion(const kernels::Lion& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& m,
          const at::Tensor& low) {
  if (is_split(p)) return lion_step(h, grad_scale, {low}, {g}, {m}, {{p}, {}, {}});
  const DType gd = to_dtype(g.scalar_type()), ld = dtype_or_f32(low);
  DS_ON_CUDA(p, kernels::lion(h, grad_scale, f32(p), ptr(g), gd, f32(m), ptr(low), ld, p.numel(), stream_of(p)));
  ops::for_chunks(p.numel(), kChunk, [&](int64_t, int64_t b, int64_t e) {
    kernels::lion(h, grad_scale, f32_at(p, b), at_index(g, b), gd, f32_at(m, b), at_index(low, b), ld, e - b);
  });
}

void adagrad(const kernels::Adagrad& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& sum,
             const at::Tensor& low) {
  if (is_split(p)) return adagrad_step(h, grad_scale, {low}, {g}, {sum}, {{p}, {}, {}});
  const DType gd = to_dtype(g.scalar_type()), ld = dtype_or_f32(low);
  DS_ON_CUDA(p, kernels::adagrad(h, grad_scale, f32(p), ptr(g), gd, f32(sum), ptr(low), ld, p.numel(), stream_of(p)));
  ops::for_chunks(p.numel(), kChunk, [&](int64_t, int64_t b, int64_t e) {
    kernels::adagrad(h, grad_scale, f32_at(p, b), at_index(g, b), gd, f32_at(sum, b), at_index(low, b), ld, e - b);
  });
}

void sgd(const kernels::Sgd& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& buf,
         const at::Tensor& low) {
  if (is_split(p)) return sgd_step(h, grad_scale, {low}, {g}, {buf}, {{p}, {}, {}});
  const DType gd = to_dtype(g.scalar_type()), ld = dtype_or_f32(low);
  DS_ON_CUDA(p, kernels::sgd(h, grad_scale, f32(p), ptr(g), gd, f32(buf), ptr(low), ld, p.numel(), stream_of(p)));
  ops::for_chunks(p.numel(), kChunk, [&](int64_t, int64_t b, int64_t e) {
    kernels::sgd(h, grad_scale, f32_at(p, b), at_index(g, b), gd, f32_at(buf, b), at_index(low, b), ld, e - b);
  });
}

void lamb_direction(const kernels::Lamb& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& m,
                    const at::Tensor& v, const at::Tensor& u, const at::Tensor& norms) {
  const DType gd = to_dtype(g.scalar_type());
  const int64_t n = p.numel();
  double* out = norms.data_ptr<double>();
  DS_ON_CUDA(p, kernels::lamb_direction(h, grad_scale, f32(p), ptr(g), gd, f32(m), f32(v), f32(u), n, out,
                                        cuda_workspace(p).data_ptr(), stream_of(p)));
  std::vector<double> parts = chunk_stats(n);
  ops::for_chunks(n, kChunk, [&](int64_t c, int64_t b, int64_t e) {
    kernels::lamb_direction(h, grad_scale, f32_at(p, b), at_index(g, b), gd, f32_at(m, b), f32_at(v, b), f32_at(u, b), e - b,
                            &parts[2 * c]);
  });
  double sums[2];
  sum_chunks(parts, sums);
  out[0] += sums[0];
  out[1] += sums[1];
}

void lamb_apply(float lr_times_ratio, const at::Tensor& p, const at::Tensor& u, const at::Tensor& low) {
  const DType ld = dtype_or_f32(low);
  DS_ON_CUDA(p, kernels::lamb_apply(lr_times_ratio, f32(p), f32(u), ptr(low), ld, p.numel(), stream_of(p)));
  ops::for_chunks(p.numel(), kChunk, [&](int64_t, int64_t b, int64_t e) {
    kernels::lamb_apply(lr_times_ratio, f32_at(p, b), f32_at(u, b), at_index(low, b), ld, e - b);
  });
}

void lamb_apply(const kernels::LambScale& scale, const at::Tensor& norms, const at::Tensor& ratio, const at::Tensor& p, const at::Tensor& u,
                const at::Tensor& low) {
  double* found = ratio.data_ptr<double>();
  DS_ON_CUDA(p, kernels::lamb_apply(scale, norms.data_ptr<double>(), found, f32(p), f32(u), ptr(low), dtype_or_f32(low), p.numel(), stream_of(p)));
  *found = kernels::trust_ratio(norms.data_ptr<double>(), scale);
  lamb_apply(static_cast<float>(scale.lr * *found), p, u, low);
}

}  // namespace ds::optim
