// SPDX-License-Identifier: Apache-2.0
#include "kernels/quantize/blocks.cuh"

namespace ds::kernels {
namespace {

using namespace quant;

struct Sources {
  ConstQuantized at[kCudaMaxQuantized];
};

// v += (or, the first time, =) the values of a unit of one quantised array.
template <class C>
__device__ __forceinline__ void add_unit(const ConstQuantized& src, int64_t block_bytes, const Unit& u, bool is_aligned, bool first,
                                         float (&v)[kUnit]) {
  const Packed p = load_packed<C::kBits>(src.data + u.b * block_bytes + u.j / kUnit * C::kBits, u.count, u.whole && is_aligned);
  const float scale = src.scale[u.b], zero = C::kSymmetric ? 0.0f : src.zero[u.b];
#pragma unroll
  for (int k = 0; k < kUnit; ++k) {
    const float x = decode<C>(code_of<C::kBits>(p, k), scale, zero);
    v[k] = first ? x : add(v[k], x);
  }
}

// Where a block's values come from: the sum of quantised arrays, which also goes to `out`.
struct ReducedSource {
  Sources src;
  int nsrc;
  float factor;
  QuantFormat format;
  bool symmetric;
  int64_t block_bytes;
  void* out;
  DType out_dt;
  bool is_aligned;

  __device__ __forceinline__ void add_source(int s, const Unit& u, float (&v)[kUnit]) const {
    const ConstQuantized& from = src.at[s];
    switch (format) {
      case QuantFormat::INT8:
        if (symmetric) return add_unit<IntCodes<8, true>>(from, block_bytes, u, is_aligned, s == 0, v);
        return add_unit<IntCodes<8, false>>(from, block_bytes, u, is_aligned, s == 0, v);
      case QuantFormat::INT4:
        if (symmetric) return add_unit<IntCodes<4, true>>(from, block_bytes, u, is_aligned, s == 0, v);
        return add_unit<IntCodes<4, false>>(from, block_bytes, u, is_aligned, s == 0, v);
      case QuantFormat::FP8_E4M3: return add_unit<FloatCodes<4, 3, 0x7f>>(from, block_bytes, u, is_aligned, s == 0, v);
      case QuantFormat::FP8_E5M2: return add_unit<FloatCodes<5, 2, 0x7c>>(from, block_bytes, u, is_aligned, s == 0, v);
      case QuantFormat::FP6_E3M2: return add_unit<FloatCodes<3, 2, 0>>(from, block_bytes, u, is_aligned, s == 0, v);
      case QuantFormat::FP4_E2M1: return add_unit<FloatCodes<2, 1, 0>>(from, block_bytes, u, is_aligned, s == 0, v);
      case QuantFormat::FP12_E4M7: return add_unit<FloatCodes<4, 7, 0>>(from, block_bytes, u, is_aligned, s == 0, v);
    }
  }
  __device__ __forceinline__ void read(const Unit& u, bool write, float (&v)[kUnit]) const {
    for (int s = 0; s < nsrc; ++s) add_source(s, u, v);
    if (factor != 1.0f) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) v[k] = mul(v[k], factor);
    }
    if (!write || out == nullptr) return;
    store_unit(v, out, out_dt, u, is_aligned);
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    read_kernel(const __grid_constant__ Sources src, int nsrc, float factor, const Shape shape, int64_t block_bytes, void* out, DType out_dt,
                bool is_aligned) {
  const int per_block = kThreads / shape.team;
  const int64_t step = int64_t{shape.team} * kUnit;
  for (int64_t base = int64_t{blockIdx.x} * per_block; base < shape.blocks; base += int64_t{gridDim.x} * per_block) {
    const Turn turn(shape, base);
    for (int64_t j = int64_t{turn.rank} * kUnit; j < turn.length; j += step) {
      const Unit u = turn.unit(shape, j);
      float v[kUnit];
      for (int s = 0; s < nsrc; ++s) add_unit<C>(src.at[s], block_bytes, u, is_aligned, s == 0, v);
      if (factor != 1.0f) {
#pragma unroll
        for (int k = 0; k < kUnit; ++k) v[k] = mul(v[k], factor);
      }
      store_unit(v, out, out_dt, u, is_aligned);
    }
  }
}

Sources gather(const ConstQuantized* src, int nsrc, bool& is_aligned) {
  DS_CHECK_VALUE(nsrc <= kCudaMaxQuantized, "nsrc must be at most " << kCudaMaxQuantized << ", got " << nsrc);
  Sources all{};
  for (int k = 0; k < nsrc; ++k) {
    all.at[k] = src[k];
    is_aligned = is_aligned && aligned({src[k].data});
  }
  return all;
}

}  // namespace

void dequantize_reduce(const Blocks& blocks, const ConstQuantized* src, int nsrc, float factor, int64_t n, void* out, DType out_dt,
                       const Requantize* again, cudaStream_t stream) {
  check_blocks(blocks, n);
  check_sources(blocks, src, nsrc, n);
  if (again != nullptr) check_output(again->symmetric, again->out, n);
  if (n == 0 || (out == nullptr && again == nullptr)) return;
  if (out != nullptr) dispatch_float(out_dt, "out", [](auto) {});
  bool is_aligned = aligned({out});
  const Sources sources = gather(src, nsrc, is_aligned);
  const Shape shape = shape_of(blocks, n);
  const int64_t block_bytes = quant_block_bytes(blocks.format, blocks.group_size);
  if (again != nullptr) {
    const ReducedSource source{sources, nsrc, factor, blocks.format, blocks.symmetric, block_bytes, out, out_dt, is_aligned};
    const Target target{again->out,      quant_block_bytes(again->format, blocks.group_size), again->rounding, nullptr, nullptr, DType::F32, false,
                        aligned({again->out.data})};
    return write("dequantize_reduce", again->format, again->symmetric, source, shape, target, stream);
  }
  dispatch_codes(blocks.format, blocks.symmetric, [&](auto codes) {
    launch("dequantize_reduce", read_kernel<decltype(codes)>, grid_for(shape), stream, sources, nsrc, factor, shape, block_bytes, out, out_dt,
           is_aligned);
  });
}

}  // namespace ds::kernels
