// SPDX-License-Identifier: Apache-2.0
#include "optim/split_master.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "base/error.h"
#include "optim/many_device.h"
#include "optim/tensor_rows.h"
#include "ops/arguments.h"

namespace ds::optim {
namespace {

using kernels::Dice;
using kernels::Form;
using kernels::Stored;

constexpr int64_t kTile = int64_t{1} << 20;   // elements

void check(const at::Tensor& t, const char* name, at::ScalarType dtype, int64_t numel) {
  DS_CHECK_VALUE(t.dim() == 1 && t.is_contiguous() && t.numel() == numel && t.scalar_type() == dtype,
                 name << " must be contiguous and one-dimensional, " << numel << " elements of " << c10::toString(dtype) << ", not "
                      << c10::toString(t.scalar_type()) << " " << t.sizes());
#ifdef DS_WITH_CUDA
  if (t.is_cuda()) return;
#endif
  require_cpu(t.device());
}

Stored split_array(const at::Tensor& weights, const at::Tensor& low_bits) { return {Form::Split, weights.data_ptr(), low_bits.data_ptr()}; }

}  // namespace

void widen(const Stored& from, const at::Tensor& to) {
#ifdef DS_WITH_CUDA
  if (to.is_cuda()) {
    const ops::OnGpu gpu(to);
    return kernels::widen(from, to.data_ptr<float>(), to.numel(), gpu.stream());
  }
#endif
  for_row_pieces({to.numel()}, [&](size_t, int64_t begin, int64_t end) { kernels::widen(from.at(begin), to.data_ptr<float>() + begin, end - begin); });
}

void narrow(const at::Tensor& from, const Stored& to, const Dice& dice) {
#ifdef DS_WITH_CUDA
  if (from.is_cuda()) {
    const ops::OnGpu gpu(from);
    return kernels::narrow(from.data_ptr<float>(), to, dice, from.numel(), gpu.stream());
  }
#endif
  for_row_pieces({from.numel()}, [&](size_t, int64_t begin, int64_t end) {
    kernels::narrow(from.data_ptr<float>() + begin, to.at(begin), {dice.seed, dice.draw, dice.first + static_cast<uint64_t>(begin)}, end - begin);
  });
}

void read_split(const at::Tensor& weights, const at::Tensor& low_bits, const at::Tensor& values) {
  const int64_t numel = values.numel();
  check(weights, "weights", at::kBFloat16, numel);
  check(low_bits, "low_bits", at::kShort, numel);
  check(values, "values", at::kFloat, numel);
  at::NoGradGuard no_grad;
  for (int64_t begin = 0; begin < numel; begin += kTile) {
    const int64_t n = std::min(kTile, numel - begin);
    const at::Tensor low = low_bits.narrow(0, begin, n), weight = weights.narrow(0, begin, n).to(low.device());
    at::Tensor to = values.narrow(0, begin, n);
    if (to.device() == low.device()) {
      widen(split_array(weight, low), to);
    } else {
      const at::Tensor here = at::empty({n}, low.options().dtype(at::kFloat));
      widen(split_array(weight, low), here);
      to.copy_(here);
    }
  }
}

void write_split(const at::Tensor& values, const at::Tensor& weights, const at::Tensor& low_bits) {
  const int64_t numel = weights.numel();
  check(weights, "weights", at::kBFloat16, numel);
  if (low_bits.defined()) check(low_bits, "low_bits", at::kShort, numel);
  DS_CHECK_VALUE(values.dim() == 1 && values.numel() == numel, "values must be one-dimensional, " << numel << " elements, not " << values.sizes());
  at::NoGradGuard no_grad;
  const at::Device device = low_bits.defined() ? low_bits.device() : weights.device();
  for (int64_t begin = 0; begin < numel; begin += kTile) {
    const int64_t n = std::min(kTile, numel - begin);
    const at::Tensor from = values.narrow(0, begin, n).to(device, at::kFloat).contiguous();
    const at::Tensor low = low_bits.defined() ? low_bits.narrow(0, begin, n) : at::empty({n}, from.options().dtype(at::kShort));
    at::Tensor weight = weights.narrow(0, begin, n);
    const at::Tensor here = weight.device() == device ? weight : at::empty({n}, from.options().dtype(at::kBFloat16));
    narrow(from, split_array(here, low), {});
    if (!here.is_same(weight)) weight.copy_(here);
  }
}

}  // namespace ds::optim
