// SPDX-License-Identifier: Apache-2.0
// A row is read from memory once, by the first sweep over it; the others find it in the cache. So that memory has work all the time, as in
// a plain copy, the first sweep also asks for the lines that the last one will write, and the last one for the next row.
#include "kernels/simd_targets.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/norm/norm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm/norm_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/simd_stream-inl.h"

// A lambda of a vector loop: compiled for the target and always part of the loop.
#define DS_BODY HWY_ATTR __attribute__((always_inline))

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {
namespace norm {

constexpr int kChains = 4;  // independent sums, to hide the latency of addition

template <int kIndex>
using Chain = std::integral_constant<int, kIndex>;
using Full = std::integral_constant<int64_t, kLanes>;  // how many lanes of a vector hold elements; otherwise an int64_t

template <class T>
HWY_INLINE V load(T tag, const typename T::Raw* p, Full) {
  return load_as(tag, p);
}
template <class T>
HWY_INLINE V load(T tag, const typename T::Raw* p, int64_t count) {  // zeros behind the end
  typename T::Raw raw[kLanes] = {};
  std::memcpy(raw, p, static_cast<size_t>(count) * sizeof(raw[0]));
  return load_as(tag, raw);
}

template <class T>
HWY_INLINE void store(T tag, V v, typename T::Raw* p, Full) {
  store_as(tag, v, p);
}
template <class T>
HWY_INLINE void store(T tag, V v, typename T::Raw* p, int64_t count) {
  typename T::Raw raw[kLanes];
  store_as(tag, v, raw);
  std::memcpy(p, raw, static_cast<size_t>(count) * sizeof(raw[0]));
}

HWY_INLINE V keep(V v, Full) { return v; }
HWY_INLINE V keep(V v, int64_t count) { return hn::IfThenElseZero(hn::FirstN(FloatTag(), static_cast<size_t>(count)), v); }

// body(chain, i, lanes) for every vector of [0, n); the chain says which sum to add to.
template <class Body>
HWY_INLINE void sweep(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
    body(Chain<0>(), i, Full());
    body(Chain<1>(), i + kLanes, Full());
    body(Chain<2>(), i + 2 * kLanes, Full());
    body(Chain<3>(), i + 3 * kLanes, Full());
  }
  for (; i + kLanes <= n; i += kLanes) body(Chain<0>(), i, Full());
  if (i < n) body(Chain<1>(), i, n - i);
}

// out[i...] = value(i, lanes) for every vector of [0, n). kPast: written past the caches.
template <bool kPast = false, class T, class Value>
HWY_INLINE void fill(T tag, typename T::Raw* out, int64_t n, const Value& value) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const V first = value(i, Full());
    const V second = value(i + kLanes, Full());
    if constexpr (kPast) stream_pair_as(tag, first, second, out + i);
    else store_pair_as(tag, first, second, out + i);
  }
  for (; i + kLanes <= n; i += kLanes) store_as(tag, value(i, Full()), out + i);
  if (i < n) store(tag, value(i, n - i), out + i, n - i);
}

HWY_INLINE float add_lanes(V v) { return hn::GetLane(hn::SumOfLanes(FloatTag(), v)); }

struct Sums {
  V chains[kChains];
  HWY_INLINE Sums() {
    for (V& chain : chains) chain = hn::Zero(FloatTag());
  }
  HWY_INLINE double total() const {
    return static_cast<double>(add_lanes(hn::Add(hn::Add(chains[0], chains[1]), hn::Add(chains[2], chains[3]))));
  }
};

HWY_INLINE V set(float x) { return hn::Set(FloatTag(), x); }

// To the second-level cache: rows are long, and the first level holds what is being worked on. No harm is done beyond an array.
template <class Raw>
HWY_INLINE void prefetch(const Raw* p) {
  __builtin_prefetch(p, 0, 2);
}
template <class Raw>
HWY_INLINE void prefetch_to_write(Raw* p) {
  __builtin_prefetch(p, 1, 2);
}

constexpr int kRowsAtOnce = 4;
// Of shorter rows some lie in one small page, and the hardware foresees none of the next page: they are asked for so many rows ahead.
constexpr int64_t kShortRowBytes = 2 << 10;

// What makes a row normal: (x - mean) * rstd is ((x - near) - rest) * rstd, see norm.h, Note [precision].
struct Normaliser {
  float near = 0.0f, rest = 0.0f, rstd = 0.0f;
};

// Note [One sweep for the variance]: sums of differences from `near`, the mean of a row's first elements, give mean and variance in one
// sweep. They lose precision only as far as near is off the mean, compared with the deviation. So if the square of the former is beyond
// kFarOff times the variance, which takes rows that begin unlike the rest, a second sweep starts from the mean that the first one found.
constexpr int64_t kFirst = 64;
constexpr double kFarOff = 4.0;

struct LayerSums {
  Sums rest, squares;
  HWY_INLINE LayerSums() {}  // spelled out: an implicit one is not compiled for the target
  template <class Index>
  HWY_INLINE void add(Index chain, V v, V near, Full) {
    add_centred(chain, hn::Sub(v, near));
  }
  template <class Index>
  HWY_INLINE void add(Index chain, V v, V near, int64_t lanes) {
    add_centred(chain, keep(hn::Sub(v, near), lanes));
  }
  template <class Index>
  HWY_INLINE void add_centred(Index chain, V centred) {
    rest.chains[chain] = hn::Add(rest.chains[chain], centred);
    squares.chains[chain] = hn::MulAdd(centred, centred, squares.chains[chain]);
  }
};

template <class T>
HWY_INLINE Normaliser layer_statistics(T tag, const typename T::Raw* h, int64_t n, float first, const LayerSums& sums, float eps) {
  Normaliser row;
  row.near = first;
  double mean_rest = sums.rest.total() / static_cast<double>(n);
  double variance = sums.squares.total() / static_cast<double>(n) - mean_rest * mean_rest;
  if (HWY_UNLIKELY(mean_rest * mean_rest > kFarOff * variance)) {
    row.near = static_cast<float>(static_cast<double>(first) + mean_rest);
    const V near = set(row.near);
    LayerSums again;
    sweep(n, [&](auto chain, int64_t i, auto lanes) DS_BODY { again.add(chain, load(tag, h + i, lanes), near, lanes); });
    mean_rest = again.rest.total() / static_cast<double>(n);
    variance = again.squares.total() / static_cast<double>(n) - mean_rest * mean_rest;
  }
  row.rest = static_cast<float>(mean_rest);
  row.rstd = static_cast<float>(1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + static_cast<double>(eps)));
  return row;
}

template <class T, Norm kNorm, bool kResidual, bool kWeight, bool kBias>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  using Raw = typename T::Raw;
  const T tag{};
  const int64_t n = a.columns;
  const bool is_short = n * static_cast<int64_t>(sizeof(Raw)) <= kShortRowBytes;
  for (int64_t row = begin; row < end; ++row) {
    const Raw* x = static_cast<const Raw*>(a.x) + row * n;
    const Raw* residual = kResidual ? static_cast<const Raw*>(a.residual) + row * n : nullptr;
    Raw* stored = kResidual ? static_cast<Raw*>(a.h) + row * n : nullptr;
    const Raw* h = kResidual ? stored : x;
    float first = 0.0f;
    if constexpr (kNorm == Norm::Layer) {
      const int64_t count = n < kFirst ? n : kFirst;
      Sums sums;
      sweep(count, [&](auto chain, int64_t i, auto lanes) DS_BODY {
        V v = load(tag, x + i, lanes);
        if constexpr (kResidual) v = hn::Add(v, load(tag, residual + i, lanes));
        sums.chains[chain] = hn::Add(sums.chains[chain], v);
      });
      first = static_cast<float>(sums.total() / static_cast<double>(count));
    }
    const V around = set(first);
    Raw* y = static_cast<Raw*>(a.y) + row * n;
    Sums squares;
    LayerSums layer;
    sweep(n, [&](auto chain, int64_t i, auto lanes) DS_BODY {
      prefetch_to_write(y + i);
      if constexpr (kResidual) {
        store(tag, hn::Add(load(tag, x + i, lanes), load(tag, residual + i, lanes)), stored + i, lanes);
      }
      const V v = load(tag, h + i, lanes);
      if constexpr (kNorm == Norm::Layer) {
        layer.add(chain, v, around, lanes);
      } else {
        squares.chains[chain] = hn::MulAdd(v, v, squares.chains[chain]);
      }
    });
    Normaliser to;
    if constexpr (kNorm == Norm::Layer) {
      to = layer_statistics(tag, h, n, first, layer, a.eps);
      a.mean[row] = static_cast<float>(static_cast<double>(to.near) + static_cast<double>(to.rest));
    } else {
      to.rstd = static_cast<float>(1.0 / std::sqrt(squares.total() / static_cast<double>(n) + static_cast<double>(a.eps)));
    }
    a.rstd[row] = to.rstd;
    const V near = set(to.near), rest = set(-to.rest * to.rstd), rstd = set(to.rstd);
    const int64_t ahead = is_short ? kRowsAtOnce * n : row + 1 < end ? n : 0;
    fill(tag, y, n, [&](int64_t i, auto lanes) DS_BODY {
      prefetch(x + ahead + i);
      if constexpr (kResidual) prefetch(residual + ahead + i);
      const V v = load(tag, h + i, lanes);
      V out = kNorm == Norm::Layer ? hn::MulAdd(hn::Sub(v, near), rstd, rest) : hn::Mul(v, rstd);
      if constexpr (kWeight && kBias) {
        out = hn::MulAdd(out, load(F32{}, a.weight + i, lanes), load(F32{}, a.bias + i, lanes));
      } else if constexpr (kWeight) {
        out = hn::Mul(out, load(F32{}, a.weight + i, lanes));
      } else if constexpr (kBias) {
        out = hn::Add(out, load(F32{}, a.bias + i, lanes));
      }
      return out;
    });
  }
}

template <class T, Norm kNorm, bool kWeight, bool kBias>
void forward_affine(const NormForward& a, int64_t begin, int64_t end) {
  a.residual != nullptr ? forward_rows<T, kNorm, true, kWeight, kBias>(a, begin, end)
                        : forward_rows<T, kNorm, false, kWeight, kBias>(a, begin, end);
}

void forward(const NormForward& a, int64_t begin, int64_t end) {
  dispatch_float(a.dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    const bool weight = a.weight != nullptr, bias = a.bias != nullptr;
    if (a.norm == Norm::Rms) {
      weight ? forward_affine<T, Norm::Rms, true, false>(a, begin, end) : forward_affine<T, Norm::Rms, false, false>(a, begin, end);
    } else if (weight) {
      bias ? forward_affine<T, Norm::Layer, true, true>(a, begin, end) : forward_affine<T, Norm::Layer, true, false>(a, begin, end);
    } else {
      bias ? forward_affine<T, Norm::Layer, false, true>(a, begin, end) : forward_affine<T, Norm::Layer, false, false>(a, begin, end);
    }
  });
}

// What backward needs of one row.
template <class Raw>
struct BackwardRow {
  const Raw *dy, *h, *dh;
  Raw* dx;
  float mean, rstd;
};

template <class Raw, Norm kNorm>
HWY_INLINE BackwardRow<Raw> backward_row(const NormBackward& a, int64_t row) {
  const auto at = [&](const void* p) { return static_cast<const Raw*>(p) + row * a.columns; };
  return {at(a.dy), at(a.h), a.dh != nullptr ? at(a.dh) : nullptr, static_cast<Raw*>(a.dx) + row * a.columns,
          kNorm == Norm::Layer ? a.mean[row] : 0.0f, a.rstd[row]};
}

// Times rstd it is the normalised row. Where h is close to the mean the difference is exact.
template <Norm kNorm>
HWY_INLINE V centred(V h, V mean) {
  return kNorm == Norm::Layer ? hn::Sub(h, mean) : h;
}

// dx of a row from the mean of its gradient g = dy * weight and `along`, the mean of g times the normalised row:
// (g - mean of g - along * rstd * (h - mean)) * rstd.
template <class T, Norm kNorm, bool kWeight, bool kHints, bool kHasDh, bool kPast>
HWY_INLINE void write_dx(T tag, const BackwardRow<typename T::Raw>& r, const float* weight, int64_t n, float grad_mean, float along,
                         int64_t ahead) {
  const V mean = set(r.mean), rstd = set(r.rstd), slope = set(-along * r.rstd), minus_grad_mean = set(-grad_mean);
  fill<kPast>(tag, r.dx, n, [&](int64_t i, auto lanes) DS_BODY {
    if constexpr (kHints) prefetch(r.dy + ahead + i);
    if constexpr (kHints) prefetch(r.h + ahead + i);
    const V dy = load(tag, r.dy + i, lanes), h = centred<kNorm>(load(tag, r.h + i, lanes), mean);
    V g = kNorm == Norm::Layer ? hn::MulAdd(h, slope, minus_grad_mean) : hn::Mul(h, slope);
    if constexpr (kWeight) g = hn::MulAdd(dy, load(F32{}, weight + i, lanes), g);
    else g = hn::Add(dy, g);
    return kHasDh ? hn::MulAdd(g, rstd, load(tag, r.dh + i, lanes)) : hn::Mul(g, rstd);
  });
}

// How far ahead of itself, in elements, the first sweep asks for what it reads.
template <class Raw>
constexpr int64_t kHint = 1024 / static_cast<int64_t>(sizeof(Raw));

// What is asked for before it is needed: nothing; in the first sweep what comes soon in the row, in the last one the next rows; in the first
// sweep the next rows.
enum class Hints { None, Soon, NextRows };

// kRows rows side by side: the gradients of weight and bias are read and written once for all of them, and their sums hide latency.
template <class T, Norm kNorm, bool kWeight, bool kParameters, int kRows, Hints kHints>
void backward_block(const NormBackward& a, int64_t first, bool last, float* dweight, float* dbias) {
  using Raw = typename T::Raw;
  const T tag{};
  const int64_t n = a.columns;
  BackwardRow<Raw> rows[kRows];
  V mean[kRows], rstd[kRows], grads[kRows], alongs[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = backward_row<Raw, kNorm>(a, first + r);
    rstd[r] = set(rows[r].rstd);
    mean[r] = set(rows[r].mean);
    grads[r] = alongs[r] = hn::Zero(FloatTag());
  }
  const bool ahead = a.past_caches || a.dx == a.dy;  // nothing comes into the caches to be overwritten
  const auto body = [&](int64_t i, auto lanes) DS_BODY {
    V weight, of_weight = set(0.0f), of_bias = set(0.0f);
    if constexpr (kWeight) weight = load(F32{}, a.weight + i, lanes);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kHints == Hints::NextRows) {
        prefetch(rows[r].dy + i + kRows * n);
        prefetch(rows[r].h + i + kRows * n);
      } else if constexpr (kHints == Hints::Soon) {
        if (ahead) {
          prefetch(rows[r].dy + i + kHint<Raw>);
          prefetch(rows[r].h + i + kHint<Raw>);
        } else {
          prefetch_to_write(rows[r].dx + i);
        }
      }
      const V dy = load(tag, rows[r].dy + i, lanes);
      const V x = hn::Mul(centred<kNorm>(load(tag, rows[r].h + i, lanes), mean[r]), rstd[r]);
      const V g = kWeight ? hn::Mul(dy, weight) : dy;  // zero behind the end
      if constexpr (kNorm == Norm::Layer) grads[r] = hn::Add(grads[r], g);
      alongs[r] = hn::MulAdd(g, x, alongs[r]);
      if constexpr (kParameters) of_weight = hn::MulAdd(dy, x, of_weight);
      if constexpr (kParameters && kNorm == Norm::Layer) of_bias = hn::Add(of_bias, dy);
    }
    if constexpr (kParameters) store(F32{}, hn::Add(load(F32{}, dweight + i, lanes), of_weight), dweight + i, lanes);
    if constexpr (kParameters && kNorm == Norm::Layer) {
      store(F32{}, hn::Add(load(F32{}, dbias + i, lanes), of_bias), dbias + i, lanes);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full());
  if (i < n) body(i, n - i);
  const float share = static_cast<float>(1.0 / static_cast<double>(n));
  for (int r = 0; r < kRows; ++r) {
    const float grad_mean = add_lanes(grads[r]) * share, along = add_lanes(alongs[r]) * share;
    const int64_t ahead = last ? 0 : kRows * n;
    const auto write = [&](auto has_dh) DS_BODY {
      if (a.past_caches && is_streamable(rows[r].dx)) {
        write_dx<T, kNorm, kWeight, kHints == Hints::Soon, has_dh.value, true>(tag, rows[r], a.weight, n, grad_mean, along, ahead);
      } else {
        write_dx<T, kNorm, kWeight, kHints == Hints::Soon, has_dh.value, false>(tag, rows[r], a.weight, n, grad_mean, along, ahead);
      }
    };
    a.dh != nullptr ? write(std::true_type()) : write(std::false_type());
  }
}

constexpr int64_t kBlockBytes = 512 << 10;  // what four rows of dy and h may take of the second-level cache

template <class T, Norm kNorm, bool kWeight, bool kParameters>
void backward_rows(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  const int64_t row_bytes = a.columns * static_cast<int64_t>(sizeof(typename T::Raw));
  int64_t row = begin;
  if (row_bytes <= kShortRowBytes) {
    // Of 16 bits, whose arithmetic takes longest, rows side by side; of 32 bits, and with a third array, dh, one by one, which is how memory is fastest.
    for (; sizeof(typename T::Raw) == 2 && a.dh == nullptr && row + kRowsAtOnce <= end; row += kRowsAtOnce) {
      backward_block<T, kNorm, kWeight, kParameters, kRowsAtOnce, Hints::NextRows>(a, row, true, dweight, dbias);
    }
    for (; row < end; ++row) backward_block<T, kNorm, kWeight, kParameters, 1, Hints::None>(a, row, true, dweight, dbias);
  } else if (2 * kRowsAtOnce * row_bytes <= kBlockBytes) {
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) {
      backward_block<T, kNorm, kWeight, kParameters, kRowsAtOnce, Hints::Soon>(a, row, row + 2 * kRowsAtOnce > end, dweight, dbias);
    }
  }
  for (; row < end; ++row) backward_block<T, kNorm, kWeight, kParameters, 1, Hints::Soon>(a, row, row + 1 == end, dweight, dbias);
}

template <class T, Norm kNorm>
void backward_norm(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  if (dweight != nullptr) {
    a.weight != nullptr ? backward_rows<T, kNorm, true, true>(a, begin, end, dweight, dbias)
                        : backward_rows<T, kNorm, false, true>(a, begin, end, dweight, dbias);
  } else {
    a.weight != nullptr ? backward_rows<T, kNorm, true, false>(a, begin, end, dweight, dbias)
                        : backward_rows<T, kNorm, false, false>(a, begin, end, dweight, dbias);
  }
}

void backward(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  dispatch_float(a.dtype, "dy", [&](auto tag) {
    using T = decltype(tag);
    a.norm == Norm::Layer ? backward_norm<T, Norm::Layer>(a, begin, end, dweight, dbias)
                          : backward_norm<T, Norm::Rms>(a, begin, end, dweight, dbias);
  });
}

}  // namespace norm

void NormForwardRows(const NormForward& a, int64_t begin, int64_t end) { norm::forward(a, begin, end); }
void NormBackwardRows(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  norm::backward(a, begin, end, dweight, dbias);
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(NormForwardRows);
HWY_EXPORT(NormBackwardRows);

void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  DS_CHECK_VALUE(begin >= 0 && begin <= end, "rows [" << begin << ", " << end << ") are no range");
  check_arrays(a.columns * (end - begin), {{a.x, "x"}, {a.y, "y"}, {a.rstd, "rstd"}});
  if (begin == end || a.columns == 0) return;
  DS_CHECK_VALUE(a.residual == nullptr || a.h != nullptr, "h is null");
  DS_CHECK_VALUE(a.norm == Norm::Rms || a.mean != nullptr, "mean is null");
  DS_CHECK_VALUE(a.norm == Norm::Layer || a.bias == nullptr, "bias: RMS norm has none");
  HWY_DYNAMIC_DISPATCH(NormForwardRows)(a, begin, end);
}

void norm_backward(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  DS_CHECK_VALUE(begin >= 0 && begin <= end, "rows [" << begin << ", " << end << ") are no range");
  check_arrays(a.columns * (end - begin), {{a.dy, "dy"}, {a.h, "h"}, {a.rstd, "rstd"}, {a.dx, "dx"}});
  if (begin == end || a.columns == 0) return;
  DS_CHECK_VALUE(a.norm == Norm::Rms || a.mean != nullptr, "mean is null");
  DS_CHECK_VALUE((a.norm == Norm::Layer && dweight != nullptr) == (dbias != nullptr),
                 "dbias: layer norm has both gradients or none, RMS norm only dweight");
  HWY_DYNAMIC_DISPATCH(NormBackwardRows)(a, begin, end, dweight, dbias);
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
