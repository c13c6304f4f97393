// SPDX-License-Identifier: Apache-2.0
// CUDA twin of rope.h. A thread turns kVec pairs of up to four heads of one token, so that cosines and sines are loaded once for the four and
// eight 16-byte loads are on their way; a block takes a few tokens. Elements beyond rotary_dim are copied by threads of their own.
#include "kernels/rope/rope.h"
#include "kernels/row_tiles.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

constexpr int kHeadsAtOnce = 4;
constexpr int kMostTokens = 16;  // of a block

struct DeviceRope {
  RopeTensor tensors[kRopeTensors];
  RopeTables tables;
  int64_t half, rotary_dim;
  bool inverse, tables_aligned;
  int seq, tokens, tokens_per_block;
  int heads, head_blocks;       // of all tensors
  int chunks, all_chunks;       // of kVec pairs; with those of kVec elements that are copied
};

// out[k] = the table's entry at + k.
template <class Table, int kCount>
__device__ __forceinline__ void load_entries(const void* table, int64_t at, bool is_aligned, float (&out)[kCount]) {
  const auto* p = static_cast<const typename Table::Raw*>(table) + at;
  if (kCount % 4 == 0 && is_aligned) {
#pragma unroll
    for (int k = 0; k + 4 <= kCount; k += 4) {
      float four[4];
      load_vector(Table{}, p + k, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[k + j] = four[j];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) out[k] = to_float(Table{}, p[k]);
  }
}

// Of kVec pairs from pair k on: what multiplies the first and the second element, and the other element of each.
template <int kVec>
struct Turn {
  float factor1[kVec], factor2[kVec], cross1[kVec], cross2[kVec];
};

// first[i], second[i] = the entries of pairs k + i.
template <class Table, int kVec, bool kInterleaved>
__device__ __forceinline__ void load_pairs(const DeviceRope& d, const void* table, int64_t row, int64_t k, float (&first)[kVec],
                                           float (&second)[kVec]) {
  const int64_t base = row * d.tables.width;
  if (d.tables.width != d.rotary_dim) {
    load_entries<Table>(table, base + k, d.tables_aligned, first);
#pragma unroll
    for (int i = 0; i < kVec; ++i) second[i] = first[i];
  } else if (kInterleaved) {
    float both[2 * kVec];
    load_entries<Table>(table, base + 2 * k, d.tables_aligned, both);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      first[i] = both[2 * i];
      second[i] = both[2 * i + 1];
    }
  } else {
    load_entries<Table>(table, base + k, d.tables_aligned, first);
    load_entries<Table>(table, base + d.half + k, d.tables_aligned, second);
  }
}

template <class Table, int kVec, bool kInterleaved>
__device__ __forceinline__ Turn<kVec> load_turn(const DeviceRope& d, int b, int s, int64_t k) {
  Turn<kVec> turn;
  const int64_t row = d.tables.positions != nullptr ? d.tables.positions[b * d.tables.positions_batch + s] : b * d.tables.batch_rows + s;
  if (row < 0 || row >= d.tables.rows) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) turn.factor1[i] = turn.factor2[i] = turn.cross1[i] = turn.cross2[i] = __int_as_float(0x7fc00000);
    return turn;
  }
  load_pairs<Table, kVec, kInterleaved>(d, d.tables.cos, row, k, turn.factor1, turn.factor2);
  float sin1[kVec], sin2[kVec];
  load_pairs<Table, kVec, kInterleaved>(d, d.tables.sin, row, k, sin1, sin2);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    turn.cross1[i] = d.inverse ? sin2[i] : -sin1[i];
    turn.cross2[i] = d.inverse ? -sin1[i] : sin2[i];
  }
  return turn;
}

// Where head h of all tensors has token (b, s); null beyond the last head.
template <class Raw>
__device__ __forceinline__ const Raw* head_in(const DeviceRope& d, int h, int b, int s) {
  if (h >= d.heads) return nullptr;
  const bool second = h >= d.tensors[0].heads;
  const RopeTensor& x = d.tensors[second];
  if (second) h -= static_cast<int>(d.tensors[0].heads);
  return static_cast<const Raw*>(x.in) + b * x.in_batch + s * x.in_seq + h * x.in_head;
}
template <class Raw>
__device__ __forceinline__ Raw* head_out(const DeviceRope& d, int h, int b, int s) {
  const bool second = h >= d.tensors[0].heads;
  const RopeTensor& x = d.tensors[second];
  if (second) h -= static_cast<int>(d.tensors[0].heads);
  return static_cast<Raw*>(x.out) + b * x.out_batch + s * x.out_seq + h * x.out_head;
}

template <class T, int kVec, bool kInterleaved>
__device__ __forceinline__ void rotate(const Packed<kVec, T>& a, const Packed<kVec, T>& b, const Turn<kVec>& turn, float (&y1)[kVec],
                                       float (&y2)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {  // interleaved: a and b together are x1 x2 x1 x2 ..
    const float x1 = !kInterleaved ? a[i] : 2 * i < kVec ? a[2 * i % kVec] : b[2 * i % kVec];
    const float x2 = !kInterleaved ? b[i] : 2 * i + 1 < kVec ? a[(2 * i + 1) % kVec] : b[(2 * i + 1) % kVec];
    y1[i] = fmaf(x1, turn.factor1[i], x2 * turn.cross1[i]);
    y2[i] = fmaf(x2, turn.factor2[i], x1 * turn.cross2[i]);
  }
}

template <class T, class Table, int kVec, bool kInterleaved>
__device__ __forceinline__ void rotate_heads(const DeviceRope& d, int first_head, int b, int s, int64_t k) {
  using Raw = typename T::Raw;
  const int64_t at1 = kInterleaved ? 2 * k : k, at2 = kInterleaved ? 2 * k + kVec : k + d.half;
  Packed<kVec, T> x1[kHeadsAtOnce], x2[kHeadsAtOnce];
#pragma unroll
  for (int j = 0; j < kHeadsAtOnce; ++j) {
    const Raw* in = head_in<Raw>(d, first_head + j, b, s);
    if (in == nullptr) continue;
    x1[j].load(in + at1);
    x2[j].load(in + at2);
  }
  const Turn<kVec> turn = load_turn<Table, kVec, kInterleaved>(d, b, s, k);
#pragma unroll
  for (int j = 0; j < kHeadsAtOnce; ++j) {
    if (first_head + j >= d.heads) continue;
    float y1[kVec], y2[kVec];
    rotate<T, kVec, kInterleaved>(x1[j], x2[j], turn, y1, y2);
    Raw* out = head_out<Raw>(d, first_head + j, b, s);
    if (kInterleaved) {
      float low[kVec], high[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        low[i] = i % 2 == 0 ? y1[i / 2] : y2[i / 2];
        high[i] = (kVec + i) % 2 == 0 ? y1[(kVec + i) / 2] : y2[(kVec + i) / 2];
      }
      store_vector(T{}, low, out + at1);
      store_vector(T{}, high, out + at2);
    } else {
      store_vector(T{}, y1, out + at1);
      store_vector(T{}, y2, out + at2);
    }
  }
}

template <class T, int kVec>
__device__ __forceinline__ void copy_heads(const DeviceRope& d, int first_head, int b, int s, int64_t at) {
  using Raw = typename T::Raw;
  for (int h = first_head; h < d.heads && h < first_head + kHeadsAtOnce; ++h) {
    Packed<kVec, T> x;
    x.load(head_in<Raw>(d, h, b, s) + at);
    x.store(head_out<Raw>(d, h, b, s) + at);
  }
}

template <class T, class Table, int kVec, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rope_kernel(const DeviceRope d) {
  const int first = blockIdx.x * d.tokens_per_block;
  const int tokens = min(d.tokens_per_block, d.tokens - first);
  const int per_token = d.head_blocks * d.all_chunks;
  for (int item = threadIdx.x; item < tokens * per_token; item += kThreads) {
    const int token = first + item / per_token, within = item % per_token;
    const int head = within / d.all_chunks * kHeadsAtOnce, chunk = within % d.all_chunks;
    const int b = token / d.seq, s = token % d.seq;
    if (chunk < d.chunks) {
      rotate_heads<T, Table, kVec, kInterleaved>(d, head, b, s, int64_t{chunk} * kVec);
    } else {
      copy_heads<T, kVec>(d, head, b, s, d.rotary_dim + int64_t{chunk - d.chunks} * kVec);
    }
  }
}

bool fits(const RopeTensor& x, int64_t vec) {
  return aligned({x.in, x.out}) && x.in_batch % vec == 0 && x.in_seq % vec == 0 && x.in_head % vec == 0 && x.out_batch % vec == 0 &&
         x.out_seq % vec == 0 && x.out_head % vec == 0;
}

// As many tokens a block as leave the fewest threads idle.
int choose_tokens(int64_t per_token) {
  int best = 1;
  double most = 0.0;
  for (int tokens = 1; tokens <= kMostTokens; ++tokens) {
    const int64_t items = tokens * per_token, slots = (items + kThreads - 1) / kThreads * kThreads;
    const double busy = static_cast<double>(items) / static_cast<double>(slots);
    if (busy > most + 0.01) most = busy, best = tokens;
  }
  return best;
}

template <class T, class Table, int kVec>
void launch_rope(DeviceRope d, int64_t dim, bool interleaved, cudaStream_t stream) {
  d.chunks = static_cast<int>(d.half / kVec);
  d.all_chunks = d.chunks + static_cast<int>((dim - d.rotary_dim) / kVec);
  const int64_t per_token = int64_t{d.head_blocks} * d.all_chunks;
  DS_CHECK_VALUE(per_token * kMostTokens < std::numeric_limits<int>::max(), "in: heads * dim is too large");
  if (per_token == 0) return;
  d.tokens_per_block = choose_tokens(per_token);
  const int64_t blocks = (int64_t{d.tokens} + d.tokens_per_block - 1) / d.tokens_per_block;
  interleaved ? launch("rope", rope_kernel<T, Table, kVec, true>, blocks, stream, d)
              : launch("rope", rope_kernel<T, Table, kVec, false>, blocks, stream, d);
}

}  // namespace

void rope(DType dtype, const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count, cudaStream_t stream) {
  check_rope(shape, tables, tensors, count);
  const int64_t tokens = shape.batch * shape.seq;
  if (tokens == 0 || count == 0) return;
  DS_CHECK_VALUE(tokens <= std::numeric_limits<int>::max() - kMostTokens, "batch * seq must be below 2^31, got " << tokens);
  DeviceRope d{};
  int64_t heads = 0;
  for (int t = 0; t < count; ++t) {
    d.tensors[t] = tensors[t];
    heads += tensors[t].heads;
  }
  if (heads == 0) return;
  DS_CHECK_VALUE(heads < (int64_t{1} << 24), "in: too many heads: " << heads);
  d.tables = tables;
  d.rotary_dim = shape.rotary_dim;
  d.half = shape.rotary_dim / 2;
  d.inverse = shape.inverse;
  d.seq = static_cast<int>(shape.seq);
  d.tokens = static_cast<int>(tokens);
  d.heads = static_cast<int>(heads);
  d.head_blocks = (d.heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  d.tables_aligned = aligned({tables.cos, tables.sin}) && tables.width % 4 == 0;
  dispatch_float(dtype, "in", [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t kVec = kVecOf<T>;
    bool whole = d.half % kVec == 0 && (shape.dim - shape.rotary_dim) % kVec == 0;
    for (int t = 0; t < count; ++t) whole = whole && (tensors[t].heads == 0 || fits(tensors[t], kVec));
    const auto run = [&](auto table) {
      using Table = decltype(table);
      whole ? launch_rope<T, Table, kVec>(d, shape.dim, shape.interleaved, stream)
            : launch_rope<T, Table, 1>(d, shape.dim, shape.interleaved, stream);
    };
    tables.dtype == DType::F32 ? run(F32{}) : run(tag);
  });
}

}  // namespace ds::kernels
