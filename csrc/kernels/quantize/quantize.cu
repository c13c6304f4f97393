// SPDX-License-Identifier: Apache-2.0
#include "kernels/quantize/blocks.cuh"

namespace ds::kernels {
namespace {

using namespace quant;

// Where a block's values come from: x (+ residual).
struct PlainSource {
  const void* x;
  DType dt;
  const float* residual;
  bool is_aligned;

  __device__ __forceinline__ void read(const Unit& u, bool, float (&v)[kUnit]) const {
    load_unit(x, dt, u, is_aligned, v);
    if (residual == nullptr) return;
    float r[kUnit];
    load_unit<F32>(residual, u, is_aligned, r);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) v[k] = add(v[k], r[k]);
  }
};

}  // namespace

void quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType x_dt, float* residual, int64_t n, const Quantized& out,
              cudaStream_t stream) {
  check_blocks(blocks, n);
  check_arrays(n, {{x, "x"}});
  check_output(blocks.symmetric, out, n);
  dispatch_float(x_dt, "x", [](auto) {});
  if (n == 0) return;
  const bool is_aligned = aligned({x, residual});
  const PlainSource source{x, x_dt, residual, is_aligned};
  const int64_t block_bytes = quant_block_bytes(blocks.format, blocks.group_size);
  const Target target{out, block_bytes, rounding, residual, nullptr, DType::F32, is_aligned, aligned({out.data})};
  write("quantize", blocks.format, blocks.symmetric, source, shape_of(blocks, n), target, stream);
}

void fake_quantize(const Blocks& blocks, const Rounding& rounding, const void* x, DType dtype, int64_t n, void* out, cudaStream_t stream) {
  check_blocks(blocks, n);
  check_arrays(n, {{x, "x"}, {out, "out"}});
  dispatch_float(dtype, "x", [](auto) {});
  if (n == 0) return;
  const bool is_aligned = aligned({x, out});
  const PlainSource source{x, dtype, nullptr, is_aligned};
  const Target target{{nullptr, nullptr, nullptr}, 0, rounding, nullptr, out, dtype, is_aligned, false};
  write("fake_quantize", blocks.format, blocks.symmetric, source, shape_of(blocks, n), target, stream);
}

}  // namespace ds::kernels
