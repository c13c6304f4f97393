// SPDX-License-Identifier: Apache-2.0
#include "kernels/exact_fp.h"

#include "kernels/optim/stored.h"

#include <algorithm>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/optim/forms.h"
#include "kernels/philox.h"

namespace ds::kernels {

int64_t form_size(Form form) {
  switch (form) {
    case Form::F32: return 4;
    case Form::F16:
    case Form::BF16:
    case Form::Split:
    case Form::Stochastic: return 2;
    case Form::Signed8:
    case Form::Unsigned8: return 1;
  }
  DS_FAIL_VALUE("not a Form: " << static_cast<int>(form));
}

const char* form_name(Form form) {
  switch (form) {
    case Form::F32: return "F32";
    case Form::F16: return "F16";
    case Form::BF16: return "BF16";
    case Form::Split: return "Split";
    case Form::Stochastic: return "Stochastic";
    case Form::Signed8: return "Signed8";
    case Form::Unsigned8: return "Unsigned8";
  }
  DS_FAIL_VALUE("not a Form: " << static_cast<int>(form));
}

namespace {

template <class T>
T* moved(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<Byte*>(pointer) + bytes;
}

}  // namespace

Stored Stored::at(int64_t i) const {
  const int64_t extra_bytes = form == Form::Split ? 2 * i : i / kCodeBlock * static_cast<int64_t>(sizeof(float));
  return {form, moved(data, i * form_size(form)), moved(extra, extra_bytes)};
}

Slice Slice::at(int64_t i) const {
  Slice s = *this;
  s.p = p.at(i);
  s.g = moved(g, i * static_cast<int64_t>(dtype_size(g_dt)));
  s.states[0] = states[0].at(i);
  s.states[1] = states[1].at(i);
  s.low = moved(low, i * static_cast<int64_t>(dtype_size(low_dt)));
  s.dice.first += static_cast<uint64_t>(i);
  return s;
}

int states_of(const Rule& rule) {
  if (std::holds_alternative<AdamConstants>(rule)) return 2;
  if (const auto* sgd = std::get_if<SgdConstants>(&rule)) return sgd->has_momentum ? 1 : 0;
  return 1;
}

namespace {

bool is_code(Form form) { return form == Form::Signed8 || form == Form::Unsigned8; }

void check_part(const Stored& a, const char* name, bool may_be_codes, int64_t n) {
  const bool is_param_form = a.form == Form::Split || a.form == Form::Stochastic;
  DS_CHECK_VALUE(may_be_codes ? !is_param_form : !is_code(a.form), name << " cannot have the form " << form_name(a.form));
  check_stored(a, name, n);
}

}  // namespace

void check_stored(const Stored& a, const char* name, int64_t n) {
  check_arrays(n, {{a.data, name}});
  DS_CHECK_VALUE(n == 0 || a.extra != nullptr || !(is_code(a.form) || a.form == Form::Split), name << " has the form " << form_name(a.form)
                 << " without " << (is_code(a.form) ? "scales" : "low bits"));
}

void check_slice(const Rule& rule, const Slice& a, int64_t n) {
  check_part(a.p, "p", false, n);
  check_arrays(n, {{a.g, "g"}});
  dispatch_float(a.g_dt, "g", [](auto) {});
  for (int k = 0; k < states_of(rule); ++k) check_part(a.states[k], k == 0 ? "states[0]" : "states[1]", true, n);
  dispatch_optional(a.low, a.low_dt, "low", [](auto) {});
  DS_CHECK_VALUE(a.low == nullptr || a.p.form == Form::F32, "low: only a float32 p has a copy beside it, not one in the form " << form_name(a.p.form));
}

// ------------------------------------------------------------------------------------------------------- reference

namespace {

template <class T>
T* as(void* p) { return static_cast<T*>(p); }

uint32_t dice_of(const Dice& dice, int64_t i) {
  const uint64_t element = dice.first + static_cast<uint64_t>(i);
  const uint32_t word = philox_element(dice.seed, 4 * dice.draw, element / 2);
  return element % 2 == 0 ? word & 0xffffu : word >> 16;
}

template <class Code, class Encode>
void encode_blocks(const float* from, const Stored& to, int64_t n, const Encode& encode) {
  for (int64_t begin = 0; begin < n; begin += kCodeBlock) {
    const int64_t end = std::min(n, begin + kCodeBlock);
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, bits_of(from[i]) & 0x7fffffffu);
    const float scale = code_scale(largest), inverse = code_inverse(scale);
    as<float>(to.extra)[begin / kCodeBlock] = scale;
    for (int64_t i = begin; i < end; ++i) as<Code>(to.data)[i] = encode(from[i], inverse);
  }
}

struct RefArrays {
  std::vector<float> p, s0, s1;
};

}  // namespace

void widen_ref(const Stored& from, float* to, int64_t n) {
  check_stored(from, "from", n);
  for (int64_t i = 0; i < n; ++i) {
    switch (from.form) {
      case Form::F32: to[i] = as<float>(from.data)[i]; break;
      case Form::F16: to[i] = F16::load(as<uint16_t>(from.data)[i]); break;
      case Form::BF16:
      case Form::Stochastic: to[i] = BF16::load(as<uint16_t>(from.data)[i]); break;
      case Form::Split: to[i] = join_split(as<uint16_t>(from.data)[i], as<uint16_t>(from.extra)[i]); break;
      case Form::Signed8: to[i] = decode_signed(as<int8_t>(from.data)[i], as<float>(from.extra)[i / kCodeBlock]); break;
      case Form::Unsigned8: to[i] = decode_unsigned(as<uint8_t>(from.data)[i], as<float>(from.extra)[i / kCodeBlock]); break;
    }
  }
}

void narrow_ref(const float* from, const Stored& to, const Dice& dice, int64_t n) {
  check_stored(to, "to", n);
  if (to.form == Form::Signed8) return encode_blocks<int8_t>(from, to, n, encode_signed);
  if (to.form == Form::Unsigned8) return encode_blocks<uint8_t>(from, to, n, encode_unsigned);
  for (int64_t i = 0; i < n; ++i) {
    switch (to.form) {
      case Form::F32: as<float>(to.data)[i] = from[i]; break;
      case Form::F16: as<uint16_t>(to.data)[i] = F16::store(from[i]); break;
      case Form::BF16: as<uint16_t>(to.data)[i] = BF16::store(from[i]); break;
      case Form::Stochastic: as<uint16_t>(to.data)[i] = round_stochastically(from[i], dice_of(dice, i)); break;
      default:
        as<uint16_t>(to.data)[i] = split_weight(from[i]);
        as<uint16_t>(to.extra)[i] = split_low(from[i]);
    }
  }
}

void step_ref(const Rule& rule, float grad_scale, const Slice& a, int64_t n) {
  std::vector<float> p(static_cast<size_t>(n)), s0(p.size()), s1(p.size());
  const int states = states_of(rule);
  widen_ref(a.p, p.data(), n);
  if (states > 0) widen_ref(a.states[0], s0.data(), n);
  if (states > 1) widen_ref(a.states[1], s1.data(), n);
  dispatch_float(a.g_dt, "g", [&](auto in) {
    const auto* g = static_cast<const typename decltype(in)::Raw*>(a.g);
    std::visit([&](const auto& update) {
      for (int64_t i = 0; i < n; ++i) {
        const float x = in.load(g[i]) * grad_scale;
        if constexpr (std::is_same_v<std::decay_t<decltype(update)>, AdamConstants>) update(x, p[i], s0[i], s1[i]);
        else update(x, p[i], s0[i]);
      }
    }, rule);
  });
  narrow_ref(p.data(), a.p, a.dice, n);
  if (states > 0) narrow_ref(s0.data(), a.states[0], a.dice, n);
  if (states > 1) narrow_ref(s1.data(), a.states[1], a.dice, n);
  if (a.low == nullptr) return;
  dispatch_float(a.low_dt, "low", [&](auto out) {
    auto* low = static_cast<typename decltype(out)::Raw*>(a.low);
    for (int64_t i = 0; i < n; ++i) low[i] = out.store(p[i]);
  });
}

}  // namespace ds::kernels
