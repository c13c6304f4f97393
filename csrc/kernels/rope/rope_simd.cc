// SPDX-License-Identifier: Apache-2.0
// For a block of tokens the tables are brought into one form: y = x * factor + partner(x) * cross, both float32 and in the order of the elements,
// with the signs of style and direction in `cross`. Every head of q and k then reads them from the first-level cache.
#include "kernels/simd_targets.h"

#include <algorithm>
#include <new>

#include "hwy/aligned_allocator.h"
#include "kernels/dispatch.h"
#include "kernels/rope/rope.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rope/rope_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/simd_pair-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

// (x1, x0, x3, x2, ...). The one lane of plain scalar code finds its neighbour in the other vector of the pair.
HWY_INLINE Pair swap_neighbours(const Pair& x) {
#if HWY_TARGET == HWY_SCALAR
  return {x.b, x.a};
#else
  return {hn::Shuffle2301(x.a), hn::Shuffle2301(x.b)};
#endif
}

HWY_INLINE Pair rotated(const Pair& x, const Pair& factor, const Pair& partner, const Pair& cross) {
  return {hn::MulAdd(x.a, factor.a, hn::Mul(partner.a, cross.a)), hn::MulAdd(x.b, factor.b, hn::Mul(partner.b, cross.b))};
}

template <class T>
struct RotateHalves {
  const typename T::Raw* in;
  typename T::Raw* out;
  const float *factor, *cross;
  int64_t half;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    const int64_t j = i + half;
    const Pair x1 = get_pair<kWhole>(T{}, in + i, n), x2 = get_pair<kWhole>(T{}, in + j, n);
    const Pair y1 = rotated(x1, get_pair<kWhole>(F32{}, factor + i, n), x2, get_pair<kWhole>(F32{}, cross + i, n));
    const Pair y2 = rotated(x2, get_pair<kWhole>(F32{}, factor + j, n), x1, get_pair<kWhole>(F32{}, cross + j, n));
    put_pair<kWhole>(T{}, y1, out + i, n);
    put_pair<kWhole>(T{}, y2, out + j, n);
  }
};

template <class T>
struct RotateNeighbours {
  const typename T::Raw* in;
  typename T::Raw* out;
  const float *factor, *cross;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    const Pair x = get_pair<kWhole>(T{}, in + i, n);
    const Pair f = get_pair<kWhole>(F32{}, factor + i, n), c = get_pair<kWhole>(F32{}, cross + i, n);
    put_pair<kWhole>(T{}, rotated(x, f, swap_neighbours(x), c), out + i, n);
  }
};

template <class Table>
void prepare_row(const RopeShape& shape, const RopeTables& tables, int64_t row, float* factor, float* cross) {
  const auto* cos = static_cast<const typename Table::Raw*>(tables.cos) + row * tables.width;
  const auto* sin = static_cast<const typename Table::Raw*>(tables.sin) + row * tables.width;
  const int64_t half = shape.rotary_dim / 2;
  const auto loop = [&](auto interleaved) {
    constexpr bool kInterleaved = decltype(interleaved)::value;
    const int64_t to_second = tables.width == half ? 0 : kInterleaved ? 1 : half;
    const int64_t step = tables.width == half || !kInterleaved ? 1 : 2;
    const float sign = shape.inverse ? -1.0f : 1.0f;
    const int64_t from_first = shape.inverse ? to_second : 0, from_second = shape.inverse ? 0 : to_second;
    for (int64_t k = 0; k < half; ++k) {
      const int64_t i = kInterleaved ? 2 * k : k, j = kInterleaved ? 2 * k + 1 : k + half;
      factor[i] = Table::load(cos[k * step]);
      factor[j] = Table::load(cos[k * step + to_second]);
      cross[i] = -sign * Table::load(sin[k * step + from_first]);
      cross[j] = sign * Table::load(sin[k * step + from_second]);
    }
  };
  shape.interleaved ? loop(std::true_type()) : loop(std::false_type());
}

template <class T>
HWY_INLINE void rotate_head(const RopeShape& shape, const float* factor, const float* cross, const typename T::Raw* in,
                            typename T::Raw* out) {
  if (shape.interleaved) {
    for_pairs(RotateNeighbours<T>{in, out, factor, cross}, shape.rotary_dim);
  } else {
    for_pairs(RotateHalves<T>{in, out, factor, cross, shape.rotary_dim / 2}, shape.rotary_dim / 2);
  }
  if (in != out && shape.rotary_dim < shape.dim) {
    std::memcpy(out + shape.rotary_dim, in + shape.rotary_dim, static_cast<size_t>(shape.dim - shape.rotary_dim) * sizeof(*in));
  }
}

// Tokens [begin, end) of one batch entry; the prepared rows begin at `factors`, factor and cross of a token side by side.
template <class T>
HWY_NOINLINE void rotate_tensor(const RopeShape& shape, const RopeTensor& x, const float* factors, int64_t begin, int64_t end) {
  using Raw = typename T::Raw;
  const int64_t b = begin / shape.seq;
  const auto head = [&](int64_t token, int64_t h) HWY_ATTR {
    const float* factor = factors + (token - begin) * 2 * shape.rotary_dim;
    const int64_t s = token - b * shape.seq;
    rotate_head<T>(shape, factor, factor + shape.rotary_dim, static_cast<const Raw*>(x.in) + b * x.in_batch + s * x.in_seq + h * x.in_head,
                   static_cast<Raw*>(x.out) + b * x.out_batch + s * x.out_seq + h * x.out_head);
  };
  if (x.in_head > x.in_seq) {  // the tokens of a head lie together: go along memory
    for (int64_t h = 0; h < x.heads; ++h) {
      for (int64_t token = begin; token < end; ++token) head(token, h);
    }
  } else {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t h = 0; h < x.heads; ++h) head(token, h);
    }
  }
}

void Rope(DType dtype, const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count, int64_t begin, int64_t end) {
  constexpr int64_t kBlockFloats = 4096;  // half of a small first-level cache
  const int64_t row_floats = 2 * shape.rotary_dim;
  const int64_t most = std::max<int64_t>(1, kBlockFloats / std::max<int64_t>(1, row_floats));
  const auto rows = hwy::AllocateAligned<float>(static_cast<size_t>(std::max<int64_t>(1, std::min(most, end - begin) * row_floats)));
  if (rows == nullptr) throw std::bad_alloc();
  for (int64_t token = begin; token < end;) {
    const int64_t b = token / shape.seq;
    const int64_t stop = std::min({end, token + most, (b + 1) * shape.seq});
    for (int64_t t = token; t < stop; ++t) {
      const int64_t s = t - b * shape.seq;
      const int64_t row = tables.positions != nullptr ? tables.positions[b * tables.positions_batch + s] : b * tables.batch_rows + s;
      float* factor = rows.get() + (t - token) * row_floats;
      dispatch_float(tables.dtype, "tables",
                     [&](auto tag) { prepare_row<decltype(tag)>(shape, tables, row, factor, factor + shape.rotary_dim); });
    }
    for (int i = 0; i < count; ++i) {
      dispatch_float(dtype, "in", [&](auto tag) { rotate_tensor<decltype(tag)>(shape, tensors[i], rows.get(), token, stop); });
    }
    token = stop;
  }
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(Rope);

void rope(DType dtype, const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count, int64_t begin, int64_t end) {
  check_rope(shape, tables, tensors, count);
  DS_CHECK_VALUE(begin >= 0 && begin <= end && end <= shape.batch * shape.seq, "tokens [" << begin << ", " << end << ") are not there");
  if (begin == end) return;
  HWY_DYNAMIC_DISPATCH(Rope)(dtype, shape, tables, tensors, count, begin, end);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
