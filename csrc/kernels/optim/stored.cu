// SPDX-License-Identifier: Apache-2.0
// CUDA twins of stored.h. A block of threads takes one chunk of one row, four consecutive elements a thread and turn. The forms are run-time
// values, the same for all threads: loads fetch the bytes of all arrays first, whatever they mean, so that none waits for another's conversion.
#include "kernels/launch.cuh"
#include "kernels/optim/forms.h"
#include "kernels/optim/stored.h"
#include "kernels/philox.h"

namespace ds::kernels {
namespace {

using namespace cuda;

constexpr int kTurn = kThreads * kPerThread;                     // elements a block of threads takes at a time
constexpr int kWarpsPerCode = kCodeBlock / kPerThread / 32;      // warps that share a scale
static_assert(kTurn % kCodeBlock == 0 && kWarpsPerCode == 2, "turns begin at the borders of 8-bit blocks, which two warps share");

struct Forms {
  Form p, states[2];
  int g_size, p_size, state_size[2];
  DType g_dt, low_dt;
  int states_used;
  bool has_low;
};

struct Entry {
  void* p;
  void* p_extra;
  const void* g;
  void* states[2];
  float* scales[2];
  void* low;
  uint64_t seed, draw, first;
  int64_t n;
  int64_t is_aligned;
};

// The bytes of up to four elements of 1, 2 or 4 bytes.
struct Raw {
  uint32_t words[4];
};

__device__ __forceinline__ Raw load_raw(const void* base, int size, const Group& at) {
  Raw raw{};
  if (at.whole) {
    if (size == 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(base) + at.i);
      raw = {{x.x, x.y, x.z, x.w}};
    } else if (size == 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + at.i);
      raw.words[0] = x.x;
      raw.words[1] = x.y;
    } else {
      raw.words[0] = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(base) + at.i);
    }
    return raw;
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (k >= at.count) continue;
    if (size == 4) raw.words[k] = static_cast<const uint32_t*>(base)[at.i + k];
    else if (size == 2) raw.words[k / 2] |= uint32_t{static_cast<const uint16_t*>(base)[at.i + k]} << (16 * (k % 2));
    else raw.words[0] |= uint32_t{static_cast<const uint8_t*>(base)[at.i + k]} << (8 * k);
  }
  return raw;
}

__device__ __forceinline__ void store_raw(const Raw& raw, void* base, int size, const Group& at) {
  if (at.whole) {
    if (size == 4) store_word(reinterpret_cast<uint4*>(static_cast<uint32_t*>(base) + at.i), make_uint4(raw.words[0], raw.words[1], raw.words[2], raw.words[3]));
    else if (size == 2) store_word(reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + at.i), make_uint2(raw.words[0], raw.words[1]));
    else store_word(reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(base) + at.i), raw.words[0]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (k >= at.count) continue;
    if (size == 4) static_cast<uint32_t*>(base)[at.i + k] = raw.words[k];
    else if (size == 2) static_cast<uint16_t*>(base)[at.i + k] = static_cast<uint16_t>(raw.words[k / 2] >> (16 * (k % 2)));
    else static_cast<uint8_t*>(base)[at.i + k] = static_cast<uint8_t>(raw.words[0] >> (8 * k));
  }
}

__device__ __forceinline__ uint16_t half_of(const Raw& raw, int k) { return static_cast<uint16_t>(raw.words[k / 2] >> (16 * (k % 2))); }
__device__ __forceinline__ uint8_t byte_of(const Raw& raw, int k) { return static_cast<uint8_t>(raw.words[0] >> (8 * k)); }
__device__ __forceinline__ void put_half(Raw& raw, int k, uint16_t x) { raw.words[k / 2] |= uint32_t{x} << (16 * (k % 2)); }
__device__ __forceinline__ void put_byte(Raw& raw, int k, uint8_t x) { raw.words[0] |= uint32_t{x} << (8 * k); }

// `extra`: the low bits of a split master; `scale`: of 8-bit codes. kSpecial: whether the form may be Stochastic or 8-bit, which cost registers.
template <bool kSpecial>
__device__ __forceinline__ void decode(Form form, const Raw& raw, const Raw& extra, float scale, float (&x)[kPerThread]) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    switch (form) {
      case Form::F32: x[k] = __uint_as_float(raw.words[k]); break;
      case Form::F16: x[k] = to_float(F16{}, half_of(raw, k)); break;
      case Form::Split: x[k] = join_split(half_of(raw, k), half_of(extra, k)); break;
      case Form::Signed8:
        if (kSpecial) x[k] = decode_signed(static_cast<int8_t>(byte_of(raw, k)), scale);
        break;
      case Form::Unsigned8:
        if (kSpecial) x[k] = decode_unsigned(byte_of(raw, k), scale);
        break;
      default: x[k] = to_float(BF16{}, half_of(raw, k));
    }
  }
}

// The largest magnitude in the 256 elements that this thread's two warps hold. All threads of the block call it.
__device__ __forceinline__ uint32_t largest_of_code_block(const float (&x)[kPerThread], int count) {
  __shared__ uint32_t warps[kThreads / 32];
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (k < count) largest = max(largest, __float_as_uint(x[k]) & 0x7fffffffu);
  }
  for (int apart = 16; apart > 0; apart /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
  const int warp = threadIdx.x / 32;
  __syncthreads();  // the array may still be read by the previous call
  if (threadIdx.x % 32 == 0) warps[warp] = largest;
  __syncthreads();
  return max(warps[warp], warps[warp ^ 1]);
}

__device__ __forceinline__ uint32_t dice_of(const Dice& dice, uint64_t element) {
  const UInt32x4 group = philox_group(dice.seed, 4 * dice.draw, element / 8);
  const uint32_t upper = element / 2 % 2 == 0 ? group.word[2] : group.word[3], lower = element / 2 % 2 == 0 ? group.word[0] : group.word[1];
  const uint32_t word = element % 8 < 4 ? lower : upper;  // not group.word[...]: an index known only at run time would put it in memory
  return element % 2 == 0 ? word & 0xffffu : word >> 16;
}

// Stores the float32 values x in a form. All threads of the block call it, those without elements too.
template <bool kSpecial>
__device__ __forceinline__ void encode(Form form, const float (&x)[kPerThread], void* data, void* extra, const Dice& dice, const Group& at) {
  Raw raw{}, rest{};
  if (form == Form::F32) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) raw.words[k] = __float_as_uint(x[k]);
    return store_raw(raw, data, 4, at);
  }
  if (kSpecial && (form == Form::Signed8 || form == Form::Unsigned8)) {
    const float scale = code_scale(largest_of_code_block(x, at.count)), inverse = code_inverse(scale);
    if (at.i % kCodeBlock == 0 && at.count > 0) static_cast<float*>(extra)[at.i / kCodeBlock] = scale;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      put_byte(raw, k, form == Form::Signed8 ? static_cast<uint8_t>(encode_signed(x[k], inverse)) : encode_unsigned(x[k], inverse));
    }
    return store_raw(raw, data, 1, at);
  }
  if (kSpecial && form == Form::Stochastic) {
    const uint64_t element = dice.first + static_cast<uint64_t>(at.i);
    UInt32x4 words{};
    const bool one_group = element % 4 == 0;  // then the four elements share two words of one group
    if (one_group) words = philox_group(dice.seed, 4 * dice.draw, element / 8);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const uint32_t word = element % 8 == 0 ? words.word[k / 2] : words.word[2 + k / 2];
      const uint32_t bits = one_group ? (k % 2 == 0 ? word & 0xffffu : word >> 16) : dice_of(dice, element + static_cast<uint64_t>(k));
      put_half(raw, k, round_stochastically(x[k], bits));
    }
    return store_raw(raw, data, 2, at);
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (form == Form::Split) put_half(rest, k, split_low(x[k]));
    put_half(raw, k, form == Form::Split ? split_weight(x[k]) : form == Form::F16 ? from_float(F16{}, x[k]) : from_float(BF16{}, x[k]));
  }
  store_raw(raw, data, 2, at);
  if (form == Form::Split) store_raw(rest, extra, 2, at);
}

__device__ __forceinline__ void decode_dtype(DType dt, const Raw& raw, float (&x)[kPerThread]) {
  decode<false>(dt == DType::F32 ? Form::F32 : dt == DType::F16 ? Form::F16 : Form::BF16, raw, raw, 0.0f, x);
}

__device__ __forceinline__ void apply(const AdamConstants& c, float g, float& p, float& s0, float& s1) { c(g, p, s0, s1); }
template <class Constants>
__device__ __forceinline__ void apply(const Constants& c, float g, float& p, float& s0, float&) { c(g, p, s0); }

template <bool kSpecial, class Constants>
__global__ void __launch_bounds__(kThreads, kSpecial ? 3 : 4)
    step_many_kernel(const __grid_constant__ Constants constants, float grad_scale, const __grid_constant__ Forms forms, const Entry* entries,
                     const ManyChunk* chunks, int64_t chunk_numel) {
  const ManyChunk chunk = chunks[blockIdx.x];
  const Entry e = entries[chunk.row];
  const int64_t begin = chunk.index * chunk_numel, end = min(e.n, begin + chunk_numel);
  const Dice dice{e.seed, e.draw, e.first};
  for (int64_t turn = begin; turn < end; turn += kTurn) {  // the same turns for all threads of the block
    const int64_t i = turn + int64_t{threadIdx.x} * kPerThread, left = end - i;
    const int count = left >= kPerThread ? kPerThread : left > 0 ? static_cast<int>(left) : 0;
    const Group at{i, count, e.is_aligned != 0 && count == kPerThread};
    const Raw g = load_raw(e.g, forms.g_size, at);
    const Raw p = load_raw(e.p, forms.p_size, at);
    Raw low{}, s0{}, s1{};
    if (forms.p == Form::Split) low = load_raw(e.p_extra, 2, at);
    if (forms.states_used > 0) s0 = load_raw(e.states[0], forms.state_size[0], at);
    if (forms.states_used > 1) s1 = load_raw(e.states[1], forms.state_size[1], at);
    const float scale0 = kSpecial && count > 0 && forms.states_used > 0 && forms.state_size[0] == 1 ? e.scales[0][i / kCodeBlock] : 0.0f;
    const float scale1 = kSpecial && count > 0 && forms.states_used > 1 && forms.state_size[1] == 1 ? e.scales[1][i / kCodeBlock] : 0.0f;
    float grad[kPerThread], param[kPerThread], first[kPerThread], second[kPerThread];
    decode_dtype(forms.g_dt, g, grad);
    decode<kSpecial>(forms.p, p, low, 0.0f, param);
    decode<kSpecial>(forms.states[0], s0, s0, scale0, first);
    decode<kSpecial>(forms.states[1], s1, s1, scale1, second);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) apply(constants, mul(grad[k], grad_scale), param[k], first[k], second[k]);
    encode<kSpecial>(forms.p, param, e.p, e.p_extra, dice, at);
    if (forms.states_used > 0) encode<kSpecial>(forms.states[0], first, e.states[0], e.scales[0], dice, at);
    if (forms.states_used > 1) encode<kSpecial>(forms.states[1], second, e.states[1], e.scales[1], dice, at);
    if (forms.has_low) encode<false>(forms.low_dt == DType::F32 ? Form::F32 : forms.low_dt == DType::F16 ? Form::F16 : Form::BF16, param, e.low, nullptr, dice, at);
  }
}

__global__ void __launch_bounds__(kThreads) widen_kernel(Form form, int size, const void* data, const void* extra, float* to, int64_t n, bool is_aligned) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  if (i >= n) return;
  const Group at = group_at(i, n, is_aligned);
  const Raw raw = load_raw(data, size, at);
  Raw low{};
  if (form == Form::Split) low = load_raw(extra, 2, at);
  float x[kPerThread];
  decode<true>(form, raw, low, size == 1 ? static_cast<const float*>(extra)[i / kCodeBlock] : 0.0f, x);
  store(F32{}, x, to, at);
}

__global__ void __launch_bounds__(kThreads) narrow_kernel(const float* from, Form form, void* data, void* extra, Dice dice, int64_t n, bool is_aligned) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread, left = n - i;
  const int count = left >= kPerThread ? kPerThread : left > 0 ? static_cast<int>(left) : 0;  // threads without elements stay for the scale
  const Group at{i, count, is_aligned && count == kPerThread};
  float x[kPerThread];
  load(F32{}, from, at, x);
  encode<true>(form, x, data, extra, dice, at);
}

Forms forms_of(const Slice& like, int states) {
  const auto size = [](Form form) { return static_cast<int>(form_size(form)); };
  return {like.p.form, {like.states[0].form, like.states[1].form}, static_cast<int>(dtype_size(like.g_dt)), size(like.p.form),
          {size(like.states[0].form), size(like.states[1].form)}, like.g_dt, like.low_dt, states, like.low != nullptr};
}

bool is_special(const Forms& forms) {
  bool special = forms.p == Form::Stochastic;
  for (int k = 0; k < forms.states_used; ++k) special |= forms.state_size[k] == 1;
  return special;
}

}  // namespace

ManyPlan many_step_plan(const std::vector<int64_t>& numels) { return plan_many(numels, sizeof(Entry)); }

void write_step_table(const ManyPlan& plan, const std::vector<Slice>& slices, const std::vector<int64_t>& numels, void* table) {
  DS_CHECK_VALUE(slices.size() == numels.size() && static_cast<int64_t>(numels.size()) == plan.rows, "slices and numels must be those of the plan");
  auto* entry = static_cast<Entry*>(table);
  for (size_t r = 0; r < slices.size(); ++r) {
    const Slice& s = slices[r];
    *entry++ = {s.p.data, s.p.extra, s.g, {s.states[0].data, s.states[1].data}, {static_cast<float*>(s.states[0].extra), static_cast<float*>(s.states[1].extra)},
                s.low, s.dice.seed, s.dice.draw, s.dice.first, numels[r],
                aligned({s.p.data, s.p.form == Form::Split ? s.p.extra : nullptr, s.g, s.states[0].data, s.states[1].data, s.low})};
  }
  write_chunks(plan, numels, table);
}

void step_many(const Rule& rule, float grad_scale, const Slice& like, const ManyPlan& plan, const void* device_table, cudaStream_t stream) {
  check_slice(rule, like, 0);
  if (plan.chunks == 0) return;
  const Forms forms = forms_of(like, states_of(rule));
  const auto* entries = static_cast<const Entry*>(device_table);
  const auto* chunks = reinterpret_cast<const ManyChunk*>(static_cast<const char*>(device_table) + plan.chunks_offset);
  std::visit([&](const auto& constants) {
    using Constants = std::decay_t<decltype(constants)>;
    const auto kernel = is_special(forms) ? step_many_kernel<true, Constants> : step_many_kernel<false, Constants>;
    launch("step_many", kernel, plan.chunks, stream, constants, grad_scale, forms, entries, chunks, plan.chunk_numel);
  }, rule);
}

void widen(const Stored& from, float* to, int64_t n, cudaStream_t stream) {
  check_stored(from, "from", n);
  check_arrays(n, {{to, "to"}});
  if (n == 0) return;
  launch("widen", widen_kernel, blocks_for(n), stream, from.form, static_cast<int>(form_size(from.form)), from.data, from.extra, to, n,
         aligned({from.data, from.form == Form::Split ? from.extra : nullptr, to}));
}

void narrow(const float* from, const Stored& to, const Dice& dice, int64_t n, cudaStream_t stream) {
  check_arrays(n, {{from, "from"}});
  check_stored(to, "to", n);
  if (n == 0) return;
  launch("narrow", narrow_kernel, blocks_for(n), stream, from, to.form, to.data, to.extra, dice, n,
         aligned({from, to.data, to.form == Form::Split ? to.extra : nullptr}));
}

}  // namespace ds::kernels
