// SPDX-License-Identifier: Apache-2.0
#include "kernels/dispatch.h"
#include "kernels/rope/rope.h"

namespace ds::kernels {
namespace {

double element(const void* p, DType dtype, int64_t i) {
  double x = 0.0;
  dispatch_float(dtype, "tables", [&](auto tag) { x = tag.load(static_cast<const typename decltype(tag)::Raw*>(p)[i]); });
  return x;
}

template <class T>
void rotate_head(const RopeShape& shape, const RopeTables& tables, int64_t row, const typename T::Raw* in, typename T::Raw* out) {
  const int64_t half = shape.rotary_dim / 2;
  for (int64_t k = 0; k < half; ++k) {
    const RopeEntry at = rope_entry(shape, tables.width, k);
    const int64_t base = row * tables.width;
    const double c1 = element(tables.cos, tables.dtype, base + at.first), c2 = element(tables.cos, tables.dtype, base + at.second);
    const double s1 = element(tables.sin, tables.dtype, base + at.first), s2 = element(tables.sin, tables.dtype, base + at.second);
    const int64_t i = shape.interleaved ? 2 * k : k, j = shape.interleaved ? 2 * k + 1 : k + half;
    const double x1 = T::load(in[i]), x2 = T::load(in[j]);
    out[i] = T::store(static_cast<float>(shape.inverse ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1));
    out[j] = T::store(static_cast<float>(shape.inverse ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2));
  }
  for (int64_t i = shape.rotary_dim; i < shape.dim; ++i) out[i] = in[i];
}

}  // namespace

void check_rope(const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count) {
  DS_CHECK_VALUE(shape.batch >= 0 && shape.seq >= 0 && shape.dim >= 0, "batch, seq and dim must not be negative");
  DS_CHECK_VALUE(shape.rotary_dim >= 0 && shape.rotary_dim <= shape.dim && shape.rotary_dim % 2 == 0,
                 "rotary_dim must be even and at most " << shape.dim << ", got " << shape.rotary_dim);
  DS_CHECK_VALUE(tables.width == shape.rotary_dim || 2 * tables.width == shape.rotary_dim,
                 "width must be rotary_dim or half of it, got " << tables.width);
  DS_CHECK_VALUE(count >= 0 && count <= kRopeTensors, "count must be between 0 and " << kRopeTensors << ", got " << count);
  if (shape.batch * shape.seq == 0) return;
  DS_CHECK_VALUE(shape.rotary_dim == 0 || (tables.cos != nullptr && tables.sin != nullptr), "cos or sin is null");
  for (int t = 0; t < count; ++t) {
    DS_CHECK_VALUE(tensors[t].heads >= 0, "heads must not be negative, got " << tensors[t].heads);
    const bool empty = tensors[t].heads == 0 || shape.dim == 0;
    DS_CHECK_VALUE(empty || (tensors[t].in != nullptr && tensors[t].out != nullptr), "in or out is null");
  }
}

void rope_ref(DType dtype, const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count, int64_t begin,
              int64_t end) {
  dispatch_float(dtype, "in", [&](auto tag) {
    using T = decltype(tag);
    using Raw = typename T::Raw;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / shape.seq, s = token % shape.seq;
      const int64_t row = tables.positions != nullptr ? tables.positions[b * tables.positions_batch + s] : b * tables.batch_rows + s;
      for (int t = 0; t < count; ++t) {
        const RopeTensor& x = tensors[t];
        for (int64_t h = 0; h < x.heads; ++h) {
          rotate_head<T>(shape, tables, row, static_cast<const Raw*>(x.in) + b * x.in_batch + s * x.in_seq + h * x.in_head,
                         static_cast<Raw*>(x.out) + b * x.out_batch + s * x.out_seq + h * x.out_head);
        }
      }
    }
  });
}

}  // namespace ds::kernels
