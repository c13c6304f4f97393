// SPDX-License-Identifier: Apache-2.0
// Random words are drawn for a block of elements that stays in the first-level cache, then rows, whole or in part, are worked off with them.
#include "kernels/simd_targets.h"

#include <algorithm>

#include "kernels/dispatch.h"
#include "kernels/dropout/dropout.h"
#include "kernels/philox.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/dropout/dropout_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/philox_simd-inl.h"
#include "kernels/simd_pair-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

constexpr int64_t kBlock = 1024;  // elements, a multiple of every vector group

// Keeps x * scale where the word says so, else zero.
struct Mask {
  const uint32_t* words;  // of the elements of this piece of a row, readable beyond its end
  int32_t threshold;
  V scale;
  HWY_INLINE V operator()(V x, int64_t i) const {
    const hn::Rebind<uint32_t, FloatTag> du32;
    const hn::Rebind<int32_t, FloatTag> di32;
    const auto top = hn::BitCast(di32, hn::ShiftRight<8>(hn::LoadU(du32, words + i)));
    const auto keep = hn::RebindMask(FloatTag(), hn::Gt(top, hn::Set(di32, threshold - 1)));
    return hn::IfThenElseZero(keep, hn::Mul(x, scale));
  }
};

template <class T, bool kBias>
struct DropoutAddPiece {
  Mask mask;
  const typename T::Raw* x;
  const float* bias;
  const typename T::Raw* residual;
  typename T::Raw* y;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    Pair in = get_pair<kWhole>(T{}, x + i, n);
    if (kBias) {
      const Pair b = get_pair<kWhole>(F32{}, bias + i, n);
      in = {hn::Add(in.a, b.a), hn::Add(in.b, b.b)};
    }
    const Pair rest = get_pair<kWhole>(T{}, residual + i, n);
    put_pair<kWhole>(T{}, Pair{hn::Add(rest.a, mask(in.a, i)), hn::Add(rest.b, mask(in.b, i + kLanes))}, y + i, n);
  }
};

template <class T, bool kBias>
struct DropoutBackwardPiece {
  Mask mask;
  const typename T::Raw* dy;
  typename T::Raw* dx;
  float* dbias;
  bool past_caches;
  template <bool kWhole>
  HWY_INLINE void pair(int64_t i, int64_t n) const {
    const Pair grad = get_pair<kWhole>(T{}, dy + i, n);
    const Pair out = {mask(grad.a, i), mask(grad.b, i + kLanes)};
    put_pair<kWhole>(T{}, out, dx + i, n, past_caches);
    if (kBias) {
      const Pair old = get_pair<kWhole>(F32{}, dbias + i, n);
      put_pair<kWhole>(F32{}, Pair{hn::Add(old.a, out.a), hn::Add(old.b, out.b)}, dbias + i, n);
    }
  }
};

// piece(mask, at, column) makes the body for elements from `at` on, which lie in one row from `column` on.
template <class Piece>
HWY_INLINE void for_pieces(const Dropout& dropout, int64_t first, int64_t n, int64_t cols, const Piece& piece) {
  alignas(64) uint32_t words[kBlock + 2 * kPairLanes] = {};
  const PhiloxVectors generator(dropout.seed, dropout.offset);
  const int32_t threshold = philox_threshold(dropout.p);
  const V scale = hn::Set(FloatTag(), dropout.p < 1.0 ? static_cast<float>(1.0 / (1.0 - dropout.p)) : 0.0f);
  const int64_t shift = first % 4;  // words come in groups of four
  for (int64_t at = 0; at < n;) {
    const int64_t begin = at;
    const int64_t end = std::min(n, at - (at + shift) % kBlock + kBlock);
    const int64_t skip = (first + begin) % 4;
    if (threshold > 0) generator.fill(static_cast<uint64_t>(first + begin - skip), end - begin + skip, words);
    while (at < end) {
      const int64_t column = at % cols, count = std::min(cols - column, end - at);
      for_pairs(piece(Mask{words + skip + (at - begin), threshold, scale}, at, column), count);
      at += count;
    }
  }
}

template <class T, bool kBias>
struct MakeDropoutAdd {
  const void *x, *residual;
  const float* bias;
  void* y;
  HWY_INLINE DropoutAddPiece<T, kBias> operator()(const Mask& mask, int64_t at, int64_t column) const {
    using Raw = typename T::Raw;
    return {mask, static_cast<const Raw*>(x) + at, kBias ? bias + column : nullptr, static_cast<const Raw*>(residual) + at,
            static_cast<Raw*>(y) + at};
  }
};

template <class T, bool kBias>
struct MakeDropoutBackward {
  const void* dy;
  Output dx;
  float* dbias;
  HWY_INLINE DropoutBackwardPiece<T, kBias> operator()(const Mask& mask, int64_t at, int64_t column) const {
    using Raw = typename T::Raw;
    Raw* out = static_cast<Raw*>(dx.data) + at;
    return {mask, static_cast<const Raw*>(dy) + at, out, kBias ? dbias + column : nullptr, dx.past_caches && is_streamable(out)};
  }
};

void DropoutAdd(DType dtype, const void* x, const float* bias, const void* residual, void* y, const Dropout& dropout, int64_t first_row,
                int64_t rows, int64_t cols) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    if (bias != nullptr) {
      for_pieces(dropout, first_row * cols, rows * cols, cols, MakeDropoutAdd<T, true>{x, residual, bias, y});
    } else {
      for_pieces(dropout, first_row * cols, rows * cols, rows * cols, MakeDropoutAdd<T, false>{x, residual, bias, y});
    }
  });
}

void DropoutAddBackward(DType dtype, const void* dy, Output dx, float* dbias, const Dropout& dropout, int64_t first_row, int64_t rows,
                        int64_t cols) {
  dispatch_float(dtype, "dy", [&](auto tag) {
    using T = decltype(tag);
    if (dbias != nullptr) {
      for_pieces(dropout, first_row * cols, rows * cols, cols, MakeDropoutBackward<T, true>{dy, dx, dbias});
    } else {
      for_pieces(dropout, first_row * cols, rows * cols, rows * cols, MakeDropoutBackward<T, false>{dy, dx, dbias});
    }
  });
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(DropoutAdd);
HWY_EXPORT(DropoutAddBackward);

namespace {

bool check_rows(int64_t first_row, int64_t rows, int64_t cols, const Dropout& dropout, std::initializer_list<NamedArray> arrays) {
  DS_CHECK_VALUE(first_row >= 0 && rows >= 0 && cols >= 0,
                 "first_row, rows and cols must not be negative, got " << first_row << ", " << rows << " and " << cols);
  philox_threshold(dropout.p);
  check_arrays(std::min<int64_t>(rows, 1) * cols, arrays);
  return rows > 0 && cols > 0;
}

}  // namespace

void dropout_add(DType dtype, const void* x, const float* bias, const void* residual, void* y, const Dropout& dropout, int64_t first_row,
                 int64_t rows, int64_t cols) {
  if (!check_rows(first_row, rows, cols, dropout, {{x, "x"}, {residual, "residual"}, {y, "y"}})) return;
  HWY_DYNAMIC_DISPATCH(DropoutAdd)(dtype, x, bias, residual, y, dropout, first_row, rows, cols);
}

void dropout_add_backward(DType dtype, const void* dy, Output dx, float* dbias, const Dropout& dropout, int64_t first_row, int64_t rows,
                          int64_t cols) {
  const bool any = check_rows(first_row, rows, cols, dropout, {{dy, "dy"}, {dx.data, "dx"}});
  if (dbias != nullptr) std::fill_n(dbias, cols, 0.0f);
  if (any) HWY_DYNAMIC_DISPATCH(DropoutAddBackward)(dtype, dy, dx, dbias, dropout, first_row, rows, cols);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
