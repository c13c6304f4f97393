// SPDX-License-Identifier: Apache-2.0
// The CUDA rotation, run on the host, against the reference: both styles and directions, both widths of tables, strides, partial, in place.
#include "kernels/rope/rope.h"

#include "arrays.h"
#include "base/error.h"

namespace ds::kernels::testing {
namespace {

struct Layout {
  bool heads_first, interleaved, inverse, wide, positions;
};

std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (int bits = 0; bits < 32; ++bits) {
    const auto bit = [&](int k) { return (bits >> k & 1) != 0; };
    all.push_back({bit(0), bit(1), bit(2), bit(3), bit(4)});
  }
  return all;
}

struct Case {
  DType dtype, table_dtype;
  int64_t batch, seq, q_heads, k_heads, half, rest;
  int64_t apart, cos_apart, sin_apart, gap;  // elements off an aligned address; between heads of what is written
};

void spoil(DeviceArray& a) { std::memset(a.data(), 0xff, static_cast<size_t>(a.size()) * dtype_size(a.dtype())); }

// Strides of [batch, seq, heads] or [batch, heads, seq] rows of `row` elements.
struct Strides {
  Strides(const Layout& layout, const Case& c, int64_t heads, int64_t row)
      : of_batch(c.seq * heads * row), of_seq(layout.heads_first ? row : heads * row), of_head(layout.heads_first ? c.seq * row : row) {}
  int64_t of_batch, of_seq, of_head;
};

struct Tensor {
  Tensor(const Case& c, int64_t heads_, unsigned seed)
      : heads(heads_), in(c.dtype, c.batch * c.seq * heads * dim(c), c.apart),
        out(c.dtype, c.batch * c.seq * heads * (dim(c) + c.gap), c.apart), want(c.dtype, out.size()) {
    in.fill(seed);
    spoil(out);
    spoil(want);
  }
  static int64_t dim(const Case& c) { return 2 * c.half + c.rest; }
  RopeTensor to(DeviceArray& target, const Layout& layout, const Case& c, int64_t gap) {
    const Strides from(layout, c, heads, dim(c)), into(layout, c, heads, dim(c) + gap);
    return {in.data(), target.data(), heads, from.of_batch, from.of_seq, from.of_head, into.of_batch, into.of_seq, into.of_head};
  }
  int64_t heads;
  DeviceArray in, out, want;
};

// NaNs, which neither writes, are between the heads.
void expect_near(DeviceArray& got, DeviceArray& want) {
  const double eps = got.dtype() == DType::F32 ? 0x1p-23 : got.dtype() == DType::F16 ? 0x1p-10 : 0x1p-7;
  for (int64_t i = 0; i < got.size(); ++i) {
    if (std::isnan(want.get(i)) && std::isnan(got.get(i))) continue;
    ASSERT_NEAR(got.get(i), want.get(i), eps * std::abs(want.get(i)) + 8 * 0x1p-23) << i;
  }
  EXPECT_TRUE(got.guards_intact());
}

void compare(const Case& c, const Layout& layout) {
  SCOPED_TRACE(std::string(dtype_name(c.dtype)) + " table " + dtype_name(c.table_dtype) + " half " + std::to_string(c.half) + " rest " +
               std::to_string(c.rest) + " interleaved " + std::to_string(layout.interleaved) + " wide " + std::to_string(layout.wide));
  constexpr int64_t kTableRows = 7;
  const int64_t width = layout.wide ? 2 * c.half : c.half, tokens = c.batch * c.seq;
  Tensor q(c, c.q_heads, 1), k(c, c.k_heads, 2);
  DeviceArray cos(c.table_dtype, kTableRows * width, c.cos_apart), sin(c.table_dtype, kTableRows * width, c.sin_apart);
  cos.fill(3, -1, 1), sin.fill(4, -1, 1);
  DeviceArray positions(DType::I64, tokens);
  for (int64_t t = 0; t < tokens; ++t) positions.as<int64_t>()[t] = (5 * t + 6) % kTableRows;
  const RopeShape shape{c.batch, c.seq, Tensor::dim(c), 2 * c.half, layout.interleaved, layout.inverse};
  RopeTables tables{cos.data(), sin.data(), c.table_dtype, width, kTableRows, layout.heads_first ? c.seq : 0, nullptr, 0};
  if (layout.positions) tables.positions = positions.as<int64_t>(), tables.positions_batch = layout.heads_first ? c.seq : 0;
  const RopeTensor got[] = {q.to(q.out, layout, c, c.gap), k.to(k.out, layout, c, c.gap)};
  const RopeTensor want[] = {q.to(q.want, layout, c, c.gap), k.to(k.want, layout, c, c.gap)};
  rope(c.dtype, shape, tables, got, 2, nullptr);
  rope_ref(c.dtype, shape, tables, want, 2, 0, tokens);
  expect_near(q.out, q.want);
  expect_near(k.out, k.want);
  EXPECT_TRUE(cos.guards_intact() && sin.guards_intact() && positions.guards_intact());
  DeviceArray apart(c.dtype, q.in.size(), c.apart);
  const RopeTensor packed = q.to(apart, layout, c, 0), in_place = q.to(q.in, layout, c, 0);
  rope(c.dtype, shape, tables, &packed, 1, nullptr);
  rope(c.dtype, shape, tables, &in_place, 1, nullptr);
  EXPECT_SAME(q.in, apart);
}

// Vectors are 4 or 8 elements: halves and rests that are whole ones, and that are not.
TEST(DeviceRope, IsTheReference) {
  for (DType dtype : kFloats) {
    for (DType table_dtype : {DType::F32, dtype}) {
      for (int64_t half : {0, 1, 8, 12, 35}) {
        for (int64_t rest : {0, 3, 8}) {
          if (half + rest == 0) continue;
          for (const Layout& layout : layouts()) {
            compare({dtype, table_dtype, 2, 3, 3, 1, half, rest, 0, 0, 0, 8}, layout);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(DeviceRope, EveryAlignment) {
  for (DType dtype : kFloats) {
    for (DType table_dtype : {DType::F32, dtype}) {
      for (const Layout& layout : layouts()) {
        compare({dtype, table_dtype, 2, 3, 3, 1, 16, 8, 1, 0, 0, 8}, layout);
        compare({dtype, table_dtype, 2, 3, 3, 1, 16, 8, 3, 1, 1, 8}, layout);
        compare({dtype, table_dtype, 2, 3, 3, 1, 16, 8, 0, 1, 0, 8}, layout);  // vectors, and one table that has none
        compare({dtype, table_dtype, 2, 3, 3, 1, 16, 8, 0, 0, 1, 8}, layout);
        compare({dtype, table_dtype, 2, 3, 3, 1, 16, 8, 0, 0, 0, 1}, layout);  // strides of what is written that are none
        if (HasFailure()) return;
      }
    }
  }
}

// Four heads at once, of both tensors; either without heads; blocks of up to 16 tokens; more items than a block has threads.
TEST(DeviceRope, EveryNumberOfHeadsAndTokens) {
  const Layout layout{false, false, false, false, true};
  for (auto [q, k] : {std::pair<int64_t, int64_t>{1, 0}, {0, 1}, {0, 0}, {4, 0}, {3, 2}, {4, 4}, {5, 4}, {9, 3}}) {
    for (int64_t seq : {0, 1, 3, 17, 40}) {
      for (int64_t half : {8, 9}) {
        compare({DType::BF16, DType::F32, 2, seq, q, k, half, 0, 0, 0, 0, 0}, layout);
        if (HasFailure()) return;
      }
    }
  }
  compare({DType::F32, DType::F32, 1, 2, 9, 3, 150, 1, 0, 0, 0, 0}, layout);  // 453 items a token
}

// Each stride alone keeps vectors away, and elements that are not turned do where they are not whole vectors.
TEST(DeviceRope, StridesThatAreNotWholeVectors) {
  constexpr int64_t kDim = 32, kSeq = 3, kHeads = 2, kHalf = 16, kElements = 600;
  for (int which = 0; which < 7; ++which) {
    DeviceArray in(DType::BF16, kElements), out(DType::BF16, kElements), want(DType::BF16, kElements), cos(DType::F32, kSeq * kHalf),
        sin(DType::F32, kSeq * kHalf);
    in.fill(1), cos.fill(3, -1, 1), sin.fill(4, -1, 1);
    int64_t strides[] = {288, 88, 40, 288, 88, 40};  // with room for one more element
    if (which < 6) ++strides[which];
    const RopeShape shape{2, kSeq, which < 6 ? kDim : kDim + 3, kDim, false, false};
    const RopeTables tables{cos.data(), sin.data(), DType::F32, kHalf, kSeq, 0, nullptr, 0};
    const auto tensor = [&](DeviceArray& to) {
      return RopeTensor{in.data(), to.data(), kHeads, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5]};
    };
    const RopeTensor got = tensor(out), expected = tensor(want);
    rope(DType::BF16, shape, tables, &got, 1, nullptr);
    rope_ref(DType::BF16, shape, tables, &expected, 1, 0, 2 * kSeq);
    expect_near(out, want);
  }
}

// A token whose position lies outside the tables becomes NaN where it would be turned; the tables are not read there.
TEST(DeviceRope, PositionsOutsideTheTables) {
  constexpr int64_t kDim = 24, kHalf = 8, kSeq = 4;
  for (int64_t apart : {0, 1}) {
    DeviceArray x(DType::BF16, kSeq * kDim, apart), y(DType::BF16, kSeq * kDim, apart), positions(DType::I64, kSeq);
    DeviceArray cos(DType::F32, 2 * kHalf), sin(DType::F32, 2 * kHalf);
    x.fill(1), cos.fill(3, -1, 1), sin.fill(4, -1, 1);
    const int64_t at[] = {1, 2, -1, 0};
    std::memcpy(positions.data(), at, sizeof(at));
    const RopeTables tables{cos.data(), sin.data(), DType::F32, kHalf, 2, 0, positions.as<int64_t>(), 0};
    const RopeTensor t{x.data(), y.data(), 1, kSeq * kDim, kDim, kDim, kSeq * kDim, kDim, kDim};
    for (bool interleaved : {false, true}) {
      rope(DType::BF16, {1, kSeq, kDim, 2 * kHalf, interleaved, false}, tables, &t, 1, nullptr);
      for (int64_t i = 0; i < kSeq * kDim; ++i) {
        const bool outside = (i / kDim == 1 || i / kDim == 2) && i % kDim < 2 * kHalf;
        ASSERT_EQ(std::isnan(y.get(i)), outside) << i;
        if (i % kDim < 2 * kHalf) continue;
        ASSERT_EQ(y.get(i), x.get(i)) << i;
      }
    }
  }
}

TEST(DeviceRope, RefusesBadArguments) {
  float x[8] = {};
  const RopeTensor t{x, x, 1, 8, 8, 8, 8, 8, 8};
  const RopeTables tables{x, x, DType::F32, 4, 1, 0, nullptr, 0};
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 7, false, false}, tables, &t, 1, nullptr), ValueError);
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 10, false, false}, tables, &t, 1, nullptr), ValueError);
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 6, false, false}, tables, &t, 1, nullptr), ValueError);
  EXPECT_THROW(rope(DType::I8, {1, 1, 8, 8, false, false}, tables, &t, 1, nullptr), ValueError);
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 8, false, false}, tables, &t, 3, nullptr), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
