// SPDX-License-Identifier: Apache-2.0
// The CUDA norms, run on the host, against the double-precision reference, every element: every team of threads, both paths, all arguments.
#include "kernels/norm/norm.h"

#include "arrays.h"
#include "base/error.h"

namespace ds::kernels::testing {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

enum class Which { All, X, Residual, H, Y, Dy, Dh, Dx, Weight, Bias };

struct Case {
  Norm norm;
  DType dtype;
  int64_t rows, columns;
  bool residual, weight, bias;
  DType parameters;
  float offset;      // of the weight
  int64_t apart;     // elements from an aligned address to where arrays begin ...
  Which apart_from;  // ... this one alone, or all
};

std::string name(const Case& c) {
  return std::string(c.norm == Norm::Layer ? "layer " : "rms ") + dtype_name(c.dtype) + " [" + std::to_string(c.rows) + ", " +
         std::to_string(c.columns) + "] residual=" + std::to_string(c.residual) + " weight=" + std::to_string(c.weight) +
         " bias=" + std::to_string(c.bias) + " " + dtype_name(c.parameters) + " offset=" + std::to_string(c.offset) +
         " apart=" + std::to_string(c.apart) + " from " + std::to_string(static_cast<int>(c.apart_from));
}

// NaN in every format, so that what a kernel leaves alone is seen.
void spoil(DeviceArray& a) { std::memset(a.data(), 0xff, static_cast<size_t>(a.size()) * dtype_size(a.dtype())); }

// Everything a forward and a backward read and write; the same case gives the same inputs.
struct Arrays {
  explicit Arrays(const Case& c, float low = -2.0f, float high = 3.0f)
      : c(c), x(rows(Which::X)), residual(rows(Which::Residual)), h(rows(Which::H)), y(rows(Which::Y)), dy(rows(Which::Dy)),
        dh(rows(Which::Dh)), dx(rows(Which::Dx)), weight(c.parameters, c.columns, begin(Which::Weight)),
        bias(c.parameters, c.columns, begin(Which::Bias)), mean(DType::F32, c.rows), rstd(DType::F32, c.rows) {
    x.fill(1, low, high);
    residual.fill(2);
    weight.fill(3, -1.5f, 1.5f);
    bias.fill(4);
    dy.fill(5);
    dh.fill(6);
    for (DeviceArray* a : {&h, &y, &dx, &mean, &rstd}) spoil(*a);
  }
  int64_t begin(Which a) const { return c.apart_from == Which::All || c.apart_from == a ? c.apart : 0; }
  DeviceArray rows(Which a) const { return DeviceArray(c.dtype, c.rows * c.columns, begin(a)); }

  // Weight and bias are null here, for the kernels; the reference's are those of Floats.
  NormForward forward() {
    return {c.norm, c.dtype, c.columns, 1e-5f, x.data(), c.residual ? residual.data() : nullptr, nullptr, nullptr,
            c.residual ? h.data() : nullptr, y.data(), c.norm == Norm::Layer ? mean.floats() : nullptr, rstd.floats()};
  }
  NormBackward backward() {
    return {c.norm, c.dtype, c.columns, dy.data(), c.residual ? dh.data() : nullptr, c.residual ? h.data() : x.data(),
            nullptr, c.norm == Norm::Layer ? mean.floats() : nullptr, rstd.floats(), dx.data()};
  }
  NormParameters parameters() { return {c.weight ? weight.data() : nullptr, c.bias ? bias.data() : nullptr, c.parameters, c.offset}; }
  bool guards_intact() const {
    bool intact = true;
    for (const DeviceArray* a : {&x, &residual, &h, &y, &dy, &dh, &dx, &weight, &bias, &mean, &rstd}) intact = intact && a->guards_intact();
    return intact;
  }

  Case c;
  DeviceArray x, residual, h, y, dy, dh, dx, weight, bias, mean, rstd;
};

// The parameters as the reference takes them.
struct Floats {
  explicit Floats(Arrays& a) : given(a.c) {
    for (int64_t i = 0; i < a.c.columns; ++i) {
      weight.push_back(a.weight.get(i) + a.c.offset);
      bias.push_back(a.bias.get(i));
    }
  }
  const float* weight_or_null() const { return given.weight ? weight.data() : nullptr; }
  const float* bias_or_null() const { return given.bias ? bias.data() : nullptr; }
  Case given;
  std::vector<float> weight, bias;
};

// Half a spacing of the storage format, relative to the value, and half its smallest spacing near zero.
double rounding(DType dtype) { return dtype == DType::F32 ? 0x1p-24 : dtype == DType::BF16 ? 0x1p-8 : 0x1p-11; }
double smallest(DType dtype) { return dtype == DType::F16 ? 0x1p-25 : 0.0; }

// |got - want| <= the two roundings to storage + units * eps32 * scale.
void expect_close(DeviceArray& got, DeviceArray& want, double units, double scale, const char* what) {
  for (int64_t i = 0; i < got.size(); ++i) {
    const double bound = 2 * rounding(got.dtype()) * std::abs(want.get(i)) + smallest(got.dtype()) + units * 0x1p-24 * scale;
    ASSERT_LE(std::abs(static_cast<double>(got.get(i)) - want.get(i)), bound) << what << "[" << i << "] want " << want.get(i);
  }
}

// As the CPU's twins: a term takes part in at most n / 4 additions of a chain (here fewer), whose errors have both signs.
double units(const Case& c) { return 16 + std::sqrt(static_cast<double>(c.columns)); }

// The reference's results in `want`, the kernel's against them.
void compare_forward(const Case& c, Arrays& want) {
  const Floats floats(want);
  NormForward reference = want.forward();
  reference.weight = floats.weight_or_null();
  reference.bias = floats.bias_or_null();
  norm_forward_ref(reference, 0, c.rows);
  double largest = 1.0;
  for (int64_t i = 0; i < want.y.size(); ++i) largest = std::max<double>(largest, std::abs(want.y.get(i)));
  Arrays got(c);
  in_every_order([&] {
    for (DeviceArray* a : {&got.h, &got.y, &got.mean, &got.rstd}) spoil(*a);
    norm_forward(got.forward(), got.parameters(), c.rows, nullptr);
    EXPECT_TRUE(got.guards_intact());
    EXPECT_SAME(got.h, want.h);  // left alone without a residual
    expect_close(got.rstd, want.rstd, units(c), 1, "rstd");
    if (c.norm == Norm::Layer) expect_close(got.mean, want.mean, units(c), 1, "mean");
    expect_close(got.y, want.y, units(c), largest, "y");
    return got.y.bits() + got.h.bits() + got.mean.bits() + got.rstd.bits();
  });
}

// `want`: the reference's forward pass.
void compare_backward(const Case& c, Arrays& want) {
  const Floats floats(want);
  NormBackward reference = want.backward();
  reference.weight = floats.weight_or_null();
  norm_backward_ref(reference, 0, c.rows, nullptr, nullptr);
  const DeviceArray& h = c.residual ? want.h : want.x;
  double steepest = 1.0, normal = 1.0;
  for (int64_t i = 0; i < h.size(); ++i) {
    const double rstd = want.rstd.get(i / c.columns), mean = c.norm == Norm::Layer ? want.mean.get(i / c.columns) : 0.0;
    steepest = std::max(steepest, rstd);
    normal = std::max(normal, std::abs((const_cast<DeviceArray&>(h).get(i) - mean) * rstd));
  }
  Arrays got(c);
  got.h.copy(want.h);
  got.mean.copy(want.mean);
  got.rstd.copy(want.rstd);
  in_every_order([&] {
    spoil(got.dx);
    norm_backward(got.backward(), got.parameters(), c.rows, nullptr);
    EXPECT_TRUE(got.guards_intact());
    expect_close(got.dx, want.dx, units(c), 4 * steepest * (normal + 2) * (normal + 2), "dx");  // terms: |dy| |weight| rstd max|normal|^2
    return got.dx.bits();
  });
}

void compare(const Case& c) {
  SCOPED_TRACE(name(c));
  Arrays want(c);
  compare_forward(c, want);
  compare_backward(c, want);
}

int64_t vector_of(DType dtype) { return 16 / static_cast<int64_t>(dtype_size(dtype)); }

// Both ends of every range of lengths that with_shape() tells apart, and one vector more than registers hold.
TEST(DeviceNorm, EveryTeamAndNumberOfVectors) {
  for (DType dtype : kFloats) {
    bool full = true;
    for (int64_t vectors : {1, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 2048, 2049, 4096, 4097}) {
      if (dtype != DType::F32 && vectors > 2049) continue;
      for (Norm norm : {Norm::Layer, Norm::Rms}) {
        const bool bias = full && norm == Norm::Layer;
        const int64_t rows = vectors <= 128 ? 9 : 2;  // a warp a row: the second block has one
        const DType parameters = full ? DType::F32 : dtype;
        compare({norm, dtype, rows, vectors * vector_of(dtype), full, true, bias, parameters, full ? 0.5f : 0.0f, 0, Which::All});
        if (HasFailure()) return;
      }
      full = !full;
    }
  }
}

TEST(DeviceNorm, SingleElements) {
  for (DType dtype : kFloats) {
    bool full = false;
    for (int64_t columns : {1, 2, 9, 31, 255, 257, 513}) {
      for (int64_t apart : {0, 1, 3}) {
        for (Norm norm : {Norm::Layer, Norm::Rms}) {
          const DType parameters = apart == 1 ? DType::F32 : dtype;
          compare({norm, dtype, 2, columns, full, full, full && norm == Norm::Layer, parameters, 0.5f, apart, Which::All});
          if (HasFailure()) return;
        }
        full = !full;
      }
    }
  }
}

TEST(DeviceNorm, EveryArgument) {
  for (DType dtype : kFloats) {
    for (int64_t columns : {37, 40}) {
      for (int bits = 0; bits < 32; ++bits) {
        const bool residual = bits & 1, weight = bits & 2, bias = bits & 4;
        const DType parameters = bits & 8 ? DType::F32 : dtype;
        const float offset = bits & 16 ? 0.5f : 0.0f;  // ones stay ones where there is no weight
        compare({Norm::Layer, dtype, 1, columns, residual, weight, bias, parameters, offset, 0, Which::All});
        if (!bias) compare({Norm::Rms, dtype, 1, columns, residual, weight, false, parameters, offset, 0, Which::All});
        if (HasFailure()) return;
      }
    }
  }
}

TEST(DeviceNorm, EveryNumberOfRows) {
  for (Norm norm : {Norm::Layer, Norm::Rms}) {
    for (int64_t rows : {0, 1, 7, 8, 9, 17}) {
      for (int64_t columns : {16, 17}) compare({norm, DType::BF16, rows, columns, true, true, false, DType::BF16, 0.0f, 0, Which::All});
    }
    const Case none{norm, DType::BF16, 3, 0, true, true, false, DType::BF16, 0.0f, 0, Which::All};
    Arrays a(none), untouched(none);
    norm_forward(a.forward(), a.parameters(), 3, nullptr);
    norm_backward(a.backward(), a.parameters(), 3, nullptr);
    EXPECT_SAME(a.mean, untouched.mean);
    EXPECT_SAME(a.rstd, untouched.rstd);
  }
}

// One array that begins off an aligned address: vectors of the others would be read or written apart from it.
TEST(DeviceNorm, OneArrayThatIsNotAligned) {
  for (DType dtype : kFloats) {
    for (int which = static_cast<int>(Which::X); which <= static_cast<int>(Which::Bias); ++which) {
      for (DType parameters : {DType::F32, dtype}) {
        for (int64_t apart : {1, 2}) {  // 8 bytes are not enough either
          compare({Norm::Layer, dtype, 1, 40, true, true, true, parameters, 0.0f, apart, static_cast<Which>(which)});
          if (HasFailure()) return;
        }
      }
    }
  }
}

// Columns of both paths, and of a team that is a block.
constexpr int64_t kPaths[] = {37, 40, 2080};

TEST(DeviceNorm, MayBeWrittenInPlace) {
  for (int64_t columns : kPaths) {
    for (Norm norm : {Norm::Layer, Norm::Rms}) {
      const Case c{norm, DType::BF16, 3, columns, true, true, false, DType::F32, 0.0f, 0, Which::All};
      Arrays apart(c);
      norm_forward(apart.forward(), apart.parameters(), 3, nullptr);
      Arrays first(c), second(c), alone(c), alone_apart(c);
      NormForward a = first.forward(), b = second.forward(), x = alone.forward(), x_apart = alone_apart.forward();
      a.h = first.x.data(), a.y = first.residual.data();
      b.h = second.residual.data(), b.y = second.x.data();
      x.residual = x_apart.residual = nullptr, x.y = alone.x.data();
      in_every_order([&] {
        for (Arrays* arrays : {&first, &second, &alone}) arrays->x.fill(1, -2.0f, 3.0f), arrays->residual.fill(2);
        norm_forward(a, first.parameters(), 3, nullptr);
        norm_forward(b, second.parameters(), 3, nullptr);
        norm_forward(x, alone.parameters(), 3, nullptr);
        norm_forward(x_apart, alone_apart.parameters(), 3, nullptr);
        EXPECT_SAME(first.x, apart.h);
        EXPECT_SAME(first.residual, apart.y);
        EXPECT_SAME(second.residual, apart.h);
        EXPECT_SAME(second.x, apart.y);
        EXPECT_SAME(alone.x, alone_apart.y);
        return first.x.bits() + alone.x.bits();
      });
      norm_backward(apart.backward(), apart.parameters(), 3, nullptr);
      for (bool over_dy : {true, false}) {
        NormBackward in_place = apart.backward();
        DeviceArray& from = over_dy ? apart.dy : apart.dh;
        DeviceArray saved(c.dtype, from.size());
        saved.copy(from);
        in_place.dx = from.data();
        in_every_order([&] {
          from.copy(saved);
          norm_backward(in_place, apart.parameters(), 3, nullptr);
          EXPECT_SAME(from, apart.dx);
          return from.bits();
        });
        from.copy(saved);
      }
    }
  }
}

TEST(DeviceNorm, ARowDoesNotDependOnTheOthers) {
  for (int64_t columns : {40, 1024, 2080}) {  // rows that all begin aligned
    const Case c{Norm::Layer, DType::BF16, 9, columns, false, true, true, DType::BF16, 0.0f, 0, Which::All};
    Arrays all(c);
    norm_forward(all.forward(), all.parameters(), 9, nullptr);
    Case last = c;
    last.rows = 1;
    Arrays one(last);
    for (int64_t i = 0; i < columns; ++i) one.x.set(i, all.x.get(8 * columns + i));
    norm_forward(one.forward(), one.parameters(), 1, nullptr);
    for (int64_t i = 0; i < columns; ++i) ASSERT_EQ(one.y.get(i), all.y.get(8 * columns + i)) << i;
  }
}

TEST(DeviceNorm, NotANumberStaysInItsRow) {
  for (int64_t columns : kPaths) {
    for (Norm norm : {Norm::Layer, Norm::Rms}) {
      const Case c{norm, DType::F32, 3, columns, false, true, false, DType::F32, 0.0f, 0, Which::All};
      Arrays a(c);
      a.x.set(2 * columns - 1, kNan);
      norm_forward(a.forward(), a.parameters(), 3, nullptr);
      for (int64_t i = 0; i < 3 * columns; ++i) ASSERT_EQ(std::isnan(a.y.get(i)), i / columns == 1) << i;
      norm_backward(a.backward(), a.parameters(), 3, nullptr);
      for (int64_t i = 0; i < 3 * columns; ++i) ASSERT_EQ(std::isnan(a.dx.get(i)), i / columns == 1) << i;
    }
  }
}

// Values near 1e4 with deviation 1: the spacing of floats there is 2^-10, so a rounded mean alone would cost 5e-4. Beyond 2^20 the square
// of what the first mean lacks shows in the variance, and the whole mean is rounded once.
TEST(DeviceNorm, RowsFarFromZeroKeepTheirPrecision) {
  for (float centre : {1e4f, 1.05e6f}) {
    for (int64_t columns : {2, 37, 40, 2080, 16384, 16388}) {
      const Case c{Norm::Layer, DType::F32, 3, columns, false, false, false, DType::F32, 0.0f, 0, Which::All};
      Arrays got(c, centre - 2.0f, centre + 2.0f), want(c, centre - 2.0f, centre + 2.0f);
      norm_forward(got.forward(), got.parameters(), 3, nullptr);
      norm_forward_ref(want.forward(), 0, 3);
      for (int64_t r = 0; r < 3; ++r) {
        ASSERT_NEAR(got.rstd.get(r), want.rstd.get(r), 64 * 0x1p-24 * want.rstd.get(r)) << columns;
        double mean = 0.0;
        for (int64_t i = 0; i < columns; ++i) mean += static_cast<double>(got.x.get(r * columns + i)) / static_cast<double>(columns);
        ASSERT_NEAR(got.mean.get(r), mean, 0x1p-24 * mean + 16 * 0x1p-24) << columns;
      }
      for (int64_t i = 0; i < 3 * columns; ++i) {
        ASSERT_NEAR(got.y.get(i), want.y.get(i), 256 * 0x1p-24 * std::max(1.0f, std::abs(want.y.get(i)))) << columns;
      }
    }
  }
}

TEST(DeviceNorm, ConstantRowsBecomeTheBias) {
  for (DType dtype : kFloats) {
    for (int64_t columns : kPaths) {
      const Case c{Norm::Layer, dtype, 2, columns, false, true, true, DType::F32, 0.0f, 0, Which::All};
      Arrays a(c, 3.0f, 3.0f);
      norm_forward(a.forward(), a.parameters(), 2, nullptr);
      for (int64_t i = 0; i < 2 * columns; ++i) {
        ASSERT_NEAR(a.y.get(i), a.bias.get(i % columns), rounding(dtype) * 2);
        ASSERT_TRUE(std::isfinite(a.rstd.get(i / columns)));
      }
    }
  }
}

// dweight and, behind it, dbias in double, beside the sums of what was added without its sign.
struct Gradients {
  std::vector<double> sums, sizes;
  Gradients(Arrays& a) : sums(static_cast<size_t>(2 * a.c.columns)), sizes(sums.size()) {
    const int64_t n = a.c.columns;
    DeviceArray& h = a.c.residual ? a.h : a.x;
    for (int64_t i = 0; i < a.c.rows * n; ++i) {
      const double mean = a.c.norm == Norm::Layer ? a.mean.get(i / n) : 0.0, dy = a.dy.get(i);
      const double along = dy * ((h.get(i) - mean) * a.rstd.get(i / n));
      const auto column = static_cast<size_t>(i % n), bias = column + static_cast<size_t>(n);
      sums[column] += along, sizes[column] += std::abs(along);
      sums[bias] += dy, sizes[bias] += std::abs(dy);
    }
  }
};

// Both together: dx as the reference has it, and the gradients of the parameters.
void compare_whole_backward(const Case& c, DType out_dtype) {
  SCOPED_TRACE(name(c) + " into " + dtype_name(out_dtype));
  const int64_t halves = c.norm == Norm::Layer ? 2 : 1;
  Arrays want(c), got(c);
  for (Arrays* a : {&want, &got}) {
    a->h.fill(9);
    a->mean.fill(7, -0.5f, 0.5f);
    a->rstd.fill(8, 0.5f, 1.5f);
  }
  const Floats floats(want);
  NormBackward reference = want.backward();
  reference.weight = floats.weight_or_null();
  norm_backward_ref(reference, 0, c.rows, nullptr, nullptr);
  const Gradients sums(want);
  DeviceArray out(out_dtype, c.columns * halves, c.apart % 4);
  DeviceArray workspace(DType::F32, cuda_norm_sums_bytes(c.norm, c.rows, c.columns) / 4);
  in_every_order([&] {
    for (DeviceArray* a : {&got.dx, &out, &workspace}) spoil(*a);
    norm_backward(got.backward(), got.parameters(), c.rows, {out.data(), out_dtype, workspace.data()}, nullptr);
    EXPECT_TRUE(got.guards_intact() && out.guards_intact() && workspace.guards_intact());
    expect_close(got.dx, want.dx, units(c), 4 * 1.5 * 7 * 7, "dx");
    // A term is rounded three times, then in a thread's chain of its rows and a block's of its warps; blocks add in double.
    const double roundings = 4 + static_cast<double>(std::min<int64_t>(c.rows, 264));
    for (int64_t i = 0; i < out.size(); ++i) {
      const double sum = sums.sums[static_cast<size_t>(i)], size = sums.sizes[static_cast<size_t>(i)];
      const double inexact = roundings * 0x1p-24 * size;
      const double bound = rounding(out_dtype) * (std::abs(sum) + inexact) + smallest(out_dtype) + inexact;
      if (std::abs(static_cast<double>(out.get(i)) - sum) <= bound) continue;
      ADD_FAILURE() << "column " << i << ": " << out.get(i) << " for " << sum;
      break;
    }
    return got.dx.bits() + out.bits();
  });
}

// Columns around a tile's width and a power of two, with vectors and without; rows around those that a team has at once.
TEST(DeviceNorm, ParameterGradients) {
  for (Norm norm : {Norm::Layer, Norm::Rms}) {
    for (DType dtype : kFloats) {
      const int64_t vec = vector_of(dtype);
      for (int64_t columns : {int64_t{0}, int64_t{1}, int64_t{5}, vec, 3 * vec, 33 * vec, 65 * vec, 257 * vec, int64_t{300}}) {
        for (int64_t rows : {0, 1, 4, 5, 33}) {
          if (rows > 5 && columns > 33 * vec && dtype != DType::F32) continue;
          const DType out = rows % 2 == 0 ? DType::F32 : dtype;
          compare_whole_backward({norm, dtype, rows, columns, rows == 4, rows != 1, false, out, rows == 5 ? 0.5f : 0.0f, columns % 2, Which::All}, out);
          if (HasFailure()) return;
        }
      }
    }
  }
  const auto plain = [](Norm norm, int64_t rows, int64_t columns, int64_t apart, Which which) {
    return Case{norm, DType::BF16, rows, columns, false, true, false, DType::BF16, 0.0f, apart, which};
  };
  compare_whole_backward(plain(Norm::Layer, 1025, 5, 0, Which::All), DType::F16);   // a second block of rows
  compare_whole_backward(plain(Norm::Rms, 1030, 256, 1, Which::All), DType::F32);   // 256 blocks of four rows are not enough
  compare_whole_backward(plain(Norm::Rms, 1741, 16, 0, Which::All), DType::F32);    // 216 blocks of eight rows are not enough
  compare_whole_backward(plain(Norm::Layer, 4, 64, 1, Which::Dy), DType::F32);
  compare_whole_backward(plain(Norm::Layer, 4, 64, 1, Which::X), DType::F32);
  compare_whole_backward(plain(Norm::Layer, 4, 64, 1, Which::Dx), DType::F32);
}

// Both ends of every range of lengths that with_walk() tells apart, and one vector more than it takes.
TEST(DeviceNorm, RowsAndColumnsAtOnce) {
  for (DType dtype : kFloats) {
    bool full = true;
    for (int64_t vectors : {1, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 2048, 2049, 4096, 4097}) {
      if (dtype != DType::F32 && vectors > 2049) continue;
      for (Norm norm : {Norm::Layer, Norm::Rms}) {
        const int64_t rows = vectors <= 128 ? 9 : vectors <= 512 ? 5 : 2;
        const DType parameters = full ? DType::F32 : dtype;
        compare_whole_backward({norm, dtype, rows, vectors * vector_of(dtype), full, true, false, parameters, full ? 0.5f : 0.0f, 0, Which::All}, parameters);
        if (HasFailure()) return;
      }
      full = !full;
    }
  }
  // More rows than blocks take at once: a block's team goes round.
  compare_whole_backward({Norm::Layer, DType::BF16, 216 * 16 + 3, 16, true, true, false, DType::BF16, 0.0f, 0, Which::All}, DType::F32);
  compare_whole_backward({Norm::Rms, DType::F32, 216 * 3 + 1, 516, true, true, false, DType::F32, 0.0f, 0, Which::All}, DType::F32);
  compare_whole_backward({Norm::Layer, DType::F32, 216 * 6 + 1, 520, true, true, false, DType::F32, 0.0f, 0, Which::All}, DType::F32);
}

TEST(DeviceNorm, WholeBackwardMayBeWrittenInPlace) {
  for (int64_t columns : {37, 40, 2080, 4104}) {
    for (Norm norm : {Norm::Layer, Norm::Rms}) {
      const Case c{norm, DType::BF16, 5, columns, true, true, false, DType::F32, 0.0f, 0, Which::All};
      Arrays a(c);
      a.h.fill(9);
      a.mean.fill(7, -0.5f, 0.5f);
      a.rstd.fill(8, 0.5f, 1.5f);
      DeviceArray want(DType::F32, 2 * columns), out(DType::F32, 2 * columns);
      DeviceArray workspace(DType::F32, cuda_norm_sums_bytes(norm, c.rows, columns) / 4);
      norm_backward(a.backward(), a.parameters(), c.rows, {want.data(), DType::F32, workspace.data()}, nullptr);
      for (bool over_dy : {true, false}) {
        NormBackward in_place = a.backward();
        DeviceArray& from = over_dy ? a.dy : a.dh;
        DeviceArray saved(c.dtype, from.size());
        saved.copy(from);
        in_place.dx = from.data();
        in_every_order([&] {
          from.copy(saved);
          norm_backward(in_place, a.parameters(), c.rows, {out.data(), DType::F32, workspace.data()}, nullptr);
          EXPECT_SAME(from, a.dx);
          EXPECT_SAME(out, want);
          return from.bits();
        });
        from.copy(saved);
      }
    }
  }
}

TEST(DeviceNorm, RefusesBadArguments) {
  Arrays a({Norm::Layer, DType::BF16, 2, 8, true, true, true, DType::BF16, 0.0f, 0, Which::All});
  const auto refuses = [&](auto change) {
    NormForward f = a.forward();
    NormParameters p = a.parameters();
    int64_t rows = 2;
    change(f, p, rows);
    EXPECT_THROW(norm_forward(f, p, rows, nullptr), ValueError);
  };
  refuses([](NormForward& f, NormParameters&, int64_t&) { f.mean = nullptr; });
  refuses([](NormForward& f, NormParameters&, int64_t&) { f.h = nullptr; });
  refuses([](NormForward& f, NormParameters&, int64_t&) { f.x = nullptr; });
  refuses([](NormForward& f, NormParameters&, int64_t&) { f.dtype = DType::I32; });
  refuses([](NormForward& f, NormParameters&, int64_t&) { f.columns = -1; });
  refuses([](NormForward&, NormParameters& p, int64_t&) { p.dtype = DType::F16; });
  refuses([](NormForward&, NormParameters&, int64_t& rows) { rows = -1; });
  refuses([](NormForward& f, NormParameters&, int64_t&) { f.norm = Norm::Rms; });  // which has no bias
  NormBackward b = a.backward();
  DeviceArray out(DType::F32, 16), workspace(DType::F32, cuda_norm_sums_bytes(Norm::Layer, 2, 8) / 4);
  b.mean = nullptr;
  EXPECT_THROW(norm_backward(b, a.parameters(), 2, nullptr), ValueError);
  const auto whole = [&](void* sums, void* memory) { norm_backward(b, a.parameters(), 2, {sums, DType::F32, memory}, nullptr); };
  EXPECT_THROW(whole(out.data(), workspace.data()), ValueError);
  b = a.backward();
  EXPECT_THROW(whole(out.data(), nullptr), ValueError);
  EXPECT_THROW(whole(nullptr, workspace.data()), ValueError);
  b.dx = nullptr;
  EXPECT_THROW(norm_backward(b, a.parameters(), 2, nullptr), ValueError);
  EXPECT_THROW(whole(out.data(), workspace.data()), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
