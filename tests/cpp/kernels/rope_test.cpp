// SPDX-License-Identifier: Apache-2.0
// The SIMD rotation against the reference: both styles and directions, both widths of tables, strides of both layouts, partial, in place.
#include "kernels/rope/rope.h"

#include "base/error.h"
#include "slices.h"

namespace ds::kernels::testing {
namespace {

struct Layout {
  bool heads_first, interleaved, inverse, wide, batched;
};

std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (int bits = 0; bits < 32; ++bits) all.push_back({(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0});
  return all;
}

RopeTensor tensor(Array& in, Array& out, const Layout& layout, int64_t seq, int64_t heads, int64_t dim) {
  const int64_t of_seq = layout.heads_first ? dim : heads * dim, of_head = layout.heads_first ? seq * dim : dim;
  return {in.data(), out.data(), heads, seq * heads * dim, of_seq, of_head, seq * heads * dim, of_seq, of_head};
}

void expect_near(Array& got, Array& want, int64_t n) {
  const double eps = got.dtype() == DType::F32 ? 0x1p-23 : got.dtype() == DType::F16 ? 0x1p-10 : 0x1p-7;
  for (int64_t i = 0; i < n; ++i) ASSERT_NEAR(got.get(i), want.get(i), eps * std::abs(want.get(i)) + 8 * 0x1p-23) << i;
  EXPECT_TRUE(got.guards_intact());
}

TEST(Rope, IsTheReference) {
  const int64_t batch = 2, seq = 3, q_heads = 3, k_heads = 1, table_rows = 7;
  for_every_slice([&](int64_t half, int64_t offset) {
    if (half > 300) return;
    const int64_t rotary = 2 * half, dim = rotary + offset, tokens = batch * seq;
    for (DType dtype : kFloats) {
      for (DType table_dtype : {DType::F32, dtype}) {
        for (const Layout& layout : layouts()) {
          const int64_t width = layout.wide ? rotary : half;
          Array q(dtype, tokens * q_heads * dim, offset), k(dtype, tokens * k_heads * dim, offset);
          Array q_out(dtype, tokens * q_heads * dim, offset), k_out(dtype, tokens * k_heads * dim, offset);
          Array q_want(dtype, tokens * q_heads * dim), k_want(dtype, tokens * k_heads * dim);
          Array cos(table_dtype, table_rows * width, offset), sin(table_dtype, table_rows * width, offset);
          q.fill(1), k.fill(2), cos.fill(3, -1, 1), sin.fill(4, -1, 1);
          const int64_t positions[] = {6, 0, 3, 2, 2, 5};
          const RopeShape shape{batch, seq, dim, rotary, layout.interleaved, layout.inverse};
          RopeTables tables{cos.data(), sin.data(), table_dtype, width, table_rows, layout.batched ? seq : 0, nullptr, 0};
          if (layout.wide) tables.positions = positions, tables.positions_batch = layout.batched ? seq : 0;
          const RopeTensor got[] = {tensor(q, q_out, layout, seq, q_heads, dim), tensor(k, k_out, layout, seq, k_heads, dim)};
          const RopeTensor want[] = {tensor(q, q_want, layout, seq, q_heads, dim), tensor(k, k_want, layout, seq, k_heads, dim)};
          rope(dtype, shape, tables, got, 2, 0, 4);  // splits a batch entry
          rope(dtype, shape, tables, got, 2, 4, tokens);
          rope_ref(dtype, shape, tables, want, 2, 0, tokens);
          expect_near(q_out, q_want, tokens * q_heads * dim);
          expect_near(k_out, k_want, tokens * k_heads * dim);
          const RopeTensor in_place = tensor(q, q, layout, seq, q_heads, dim);
          rope(dtype, shape, tables, &in_place, 1, 0, tokens);
          EXPECT_SAME(q, q_out);
        }
      }
    }
  });
}

TEST(Rope, InverseUndoesARotation) {
  const int64_t dim = 20, half = dim / 2;
  Array x(DType::F32, dim), y(DType::F32, dim), back(DType::F32, dim), cos(DType::F32, half), sin(DType::F32, half);
  x.fill(1);
  for (int64_t i = 0; i < half; ++i) cos.set(i, std::cos(0.3f * i)), sin.set(i, std::sin(0.3f * i));
  for (bool interleaved : {false, true}) {
    const RopeTables tables{cos.data(), sin.data(), DType::F32, half, 1, 0, nullptr, 0};
    const RopeTensor there{x.data(), y.data(), 1, dim, dim, dim, dim, dim, dim}, home{y.data(), back.data(), 1, dim, dim, dim, dim, dim, dim};
    rope(DType::F32, {1, 1, dim, dim, interleaved, false}, tables, &there, 1, 0, 1);
    rope(DType::F32, {1, 1, dim, dim, interleaved, true}, tables, &home, 1, 0, 1);
    for (int64_t i = 0; i < dim; ++i) EXPECT_NEAR(back.get(i), x.get(i), 8 * 2 * 0x1p-23) << i;
  }
}

TEST(Rope, RefusesBadArguments) {
  float x[8] = {};
  const RopeTensor t{x, x, 1, 8, 8, 8, 8, 8, 8};
  const RopeTables tables{x, x, DType::F32, 4, 1, 0, nullptr, 0};
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 7, false, false}, tables, &t, 1, 0, 1), ValueError);
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 10, false, false}, tables, &t, 1, 0, 1), ValueError);
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 6, false, false}, tables, &t, 1, 0, 1), ValueError);
  EXPECT_THROW(rope(DType::I8, {1, 1, 8, 8, false, false}, tables, &t, 1, 0, 1), ValueError);
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 8, false, false}, tables, &t, 1, 0, 2), ValueError);
  EXPECT_THROW(rope(DType::F32, {1, 1, 8, 8, false, false}, tables, &t, 3, 0, 1), ValueError);
}

}  // namespace
}  // namespace ds::kernels::testing
