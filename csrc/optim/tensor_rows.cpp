// SPDX-License-Identifier: Apache-2.0
#include "optim/tensor_rows.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "kernels/optim/forms.h"
#include "ops/arguments.h"
#include "optim/long_lived.h"

namespace ds::optim {
namespace {

using kernels::Form;
using kernels::Stored;

constexpr int64_t kWork = int64_t{1} << 15;   // elements of small rows that one thread takes at a time

bool is_code(at::ScalarType t) { return t == at::kChar || t == at::kByte; }

Form float_form(at::ScalarType t) { return t == at::kFloat ? Form::F32 : t == at::kHalf ? Form::F16 : Form::BF16; }

void check_param(const at::Tensor& p, size_t index, const at::Device& device) {
  check_memory(p, "params", index);
  DS_CHECK_VALUE(ops::is_kernel_float(p.scalar_type()),
                 "params[" << index << "]: dtype must be float32, bfloat16 or float16, not " << c10::toString(p.scalar_type()));
  DS_CHECK_VALUE(p.is_non_overlapping_and_dense(), "params[" << index << "] overlaps itself or has gaps: make it contiguous");
  DS_CHECK_VALUE(!p.is_neg(), "params[" << index << "] is a lazily negated view: give its values (resolve_neg)");
  DS_CHECK_VALUE(p.device() == device, "params[" << index << "] lies on " << p.device().str() << ", params[0] on " << device.str());
}

void check_beside(const at::Tensor& t, const char* name, size_t index, const at::Tensor& p) {
  check_memory(t, name, index);
  DS_CHECK_VALUE(t.device() == p.device(),
                 name << "[" << index << "] lies on " << t.device().str() << ", its parameter on " << p.device().str());
}

void check_like(const at::Tensor& t, const char* name, size_t index, const at::Tensor& p) {
  check_beside(t, name, index, p);
  DS_CHECK_VALUE(t.sizes() == p.sizes(), name << "[" << index << "] has shape " << t.sizes() << ", its parameter " << p.sizes());
}

void check_kernel_dtype(const at::Tensor& t, const char* name, size_t index) {
  DS_CHECK_VALUE(ops::is_kernel_float(t.scalar_type()),
                 name << "[" << index << "]: dtype must be float32, bfloat16 or float16, not " << c10::toString(t.scalar_type()));
}

// Whether element by element the two lie in memory in one order; strides of dimensions of one element say nothing.
bool is_laid_out_like(const at::Tensor& t, const at::Tensor& p) {
  if (t.strides() == p.strides()) return true;
  for (int64_t d = 0; d < p.dim(); ++d) {
    if (p.size(d) != 1 && t.stride(d) != p.stride(d)) return false;
  }
  return true;
}

// A parameter may have taken another memory format since its states were made (p.data = p.to(memory_format=...)): they follow it, once. The tensor
// stays the caller's; its memory is new.
void follow_layout(const at::Tensor& t, const at::Tensor& p) {
  if (is_laid_out_like(t, p)) return;
  const at::Tensor moved = long_lived_zeros(t.numel(), t.scalar_type(), t.device()).as_strided(p.sizes(), p.strides());
  moved.copy_(t.detach());
  t.set_data(moved);
}

Stored stored_param(const at::Tensor& p, size_t index, const Storage& storage) {
  Stored stored{float_form(p.scalar_type()), p.data_ptr(), nullptr};
  if (!storage.low_bits.empty()) {
    const at::Tensor& low = storage.low_bits[index];
    DS_CHECK_VALUE(p.scalar_type() == at::kBFloat16, "params[" << index << "]: only bfloat16 has low_bits, not " << c10::toString(p.scalar_type()));
    check_like(low, "low_bits", index, p);
    DS_CHECK_VALUE(low.scalar_type() == at::kShort, "low_bits[" << index << "]: dtype must be int16, not " << c10::toString(low.scalar_type()));
    follow_layout(low, p);
    stored.form = Form::Split;
    stored.extra = low.data_ptr();
  } else if (storage.rounding && p.scalar_type() == at::kBFloat16) {
    stored.form = Form::Stochastic;
  }
  return stored;
}

Stored stored_state(const at::Tensor& t, const char* name, size_t index, const at::Tensor& p, const Tensors* scales) {
  check_like(t, name, index, p);
  if (!is_code(t.scalar_type())) {
    check_kernel_dtype(t, name, index);
    follow_layout(t, p);
    return {float_form(t.scalar_type()), t.data_ptr(), nullptr};
  }
  DS_CHECK_VALUE(scales != nullptr && !scales->empty(), name << "[" << index << "] holds 8-bit codes but there are no scales for " << name);
  DS_CHECK_VALUE(is_laid_out_like(t, p), name << "[" << index << "] holds 8-bit codes, whose blocks share scales in the order of memory, with strides "
                 << t.strides() << ", its parameter has " << p.strides() << " now: give the parameter its memory format before its first step");
  const at::Tensor& scale = (*scales)[index];
  check_beside(scale, "scales", index, p);
  const int64_t blocks = kernels::code_blocks(p.numel());
  DS_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.dim() == 1 && scale.size(0) == blocks && scale.is_contiguous(),
                 "scales of " << name << "[" << index << "] must be a contiguous float32 tensor of " << blocks << " elements, not "
                 << c10::toString(scale.scalar_type()) << " " << scale.sizes());
  return {t.scalar_type() == at::kChar ? Form::Signed8 : Form::Unsigned8, t.data_ptr(), scale.data_ptr()};
}

// The gradient as it is, or a copy laid out like the parameter.
const at::Tensor& laid_out_gradient(const at::Tensor& g, size_t index, const at::Tensor& p, Tensors& held) {
  check_beside(g, "grads", index, p);
  check_kernel_dtype(g, "grads", index);
  DS_CHECK_VALUE(g.sizes() == p.sizes(), "grads[" << index << "] has shape " << g.sizes() << ", its parameter " << p.sizes());
  if (is_laid_out_like(g, p) && !g.is_neg()) return g;
  at::Tensor copy = at::empty_strided(p.sizes(), p.strides(), g.options());
  copy.copy_(g.detach());
  held.push_back(std::move(copy));
  return held.back();
}

// Memory that one array of a row writes is no other array's; a gradient that is the parameter itself is read before it is written.
void check_apart(const Row& row, const at::Tensor& p, const at::Tensor& g, const std::vector<NamedStates>& states, size_t index) {
  struct Place {
    const char* name;
    uintptr_t begin, end;
  };
  const auto place = [&](const char* name, const at::Tensor& t) {
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return Place{name, begin, begin + static_cast<uintptr_t>(row.numel) * t.element_size()};
  };
  std::array<Place, 4> places{place("params", p), place("grads", g)};
  size_t count = 2;
  for (const NamedStates& s : states) places.at(count++) = place(s.name, (*s.tensors)[index]);
  for (size_t a = 0; a < count; ++a) {
    for (size_t b = a + 1; b < count; ++b) {
      const Place &x = places[a], &y = places[b];
      const bool same = a == 0 && b == 1 && x.begin == y.begin && x.end == y.end;
      DS_CHECK_VALUE(same || x.end <= y.begin || y.end <= x.begin,
                     y.name << "[" << index << "] shares memory with " << x.name << "[" << index << "]: give it memory of its own");
    }
  }
}

void check_length(size_t have, const char* name, size_t params) {
  DS_CHECK_VALUE(have == params, name << " has " << have << " tensors, params " << params);
}

void check_lengths(const Tensors& params, const Tensors& grads, const std::vector<NamedStates>& states, const Storage& storage) {
  check_length(grads.size(), "grads", params.size());
  for (const NamedStates& s : states) check_length(s.tensors->size(), s.name, params.size());
  if (!storage.low_bits.empty()) check_length(storage.low_bits.size(), "low_bits", params.size());
  for (const Tensors& scales : storage.scales) {
    if (!scales.empty()) check_length(scales.size(), "scales", params.size());
  }
  if (!storage.rounding) return;
  DS_CHECK_VALUE(storage.low_bits.empty(), "low_bits and stochastic rounding exclude each other: a split master is exact");
  check_length(storage.rounding->numbers.size(), "numbers", params.size());
  for (int64_t number : storage.rounding->numbers) DS_CHECK_VALUE(number >= 0 && number < (1 << 24), "numbers: " << number << " is not below 2^24");
}

}  // namespace

void check_memory(const at::Tensor& t, const char* name, size_t index) {
  DS_CHECK_VALUE(t.defined(), name << "[" << index << "] is undefined");
  DS_CHECK_VALUE(t.layout() == at::kStrided, name << "[" << index << "]: sparse tensors are not supported");
  DS_CHECK_VALUE(!t.is_nested(), name << "[" << index << "]: nested tensors are not supported");
  DS_CHECK_VALUE(!t.unsafeGetTensorImpl()->is_python_dispatch(),
                 name << "[" << index << "] is a tensor subclass (a DTensor?), which has no memory of its own: give the plain tensor that it holds (to_local)");
}

Rows checked_rows(const Tensors& params, const Tensors& grads, const std::vector<NamedStates>& states, const Storage& storage, bool keep_empty) {
  check_lengths(params, grads, states, storage);
  Rows result;
  result.rows.reserve(params.size());
  if (!params.empty() && params[0].defined()) result.device = params[0].device();
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& p = params[i];
    check_param(p, i, result.device);
    Row row;
    row.numel = p.numel();
    row.slice.p = stored_param(p, i, storage);
    const at::Tensor& g = laid_out_gradient(grads[i], i, p, result.held);
    row.slice.g = g.data_ptr();
    row.slice.g_dt = ops::to_dtype(g.scalar_type());
    for (size_t k = 0; k < states.size(); ++k) {
      const Tensors* scales = k < storage.scales.size() ? &storage.scales[k] : nullptr;
      row.slice.states[k] = stored_state((*states[k].tensors)[i], states[k].name, i, p, scales);
    }
    if (storage.rounding) {
      row.slice.dice = {storage.rounding->seed, storage.rounding->draw, static_cast<uint64_t>(storage.rounding->numbers[i]) << 40};
    }
    if (row.numel > 0) check_apart(row, p, g, states, i);
    ops::mark_written(p);
    settle_if_it_stays(g);
    if (row.numel > 0 || keep_empty) result.rows.push_back(row);
  }
  return result;
}

void for_row_pieces(const std::vector<int64_t>& numels, const std::function<void(size_t row, int64_t begin, int64_t end)>& body) {
  struct Piece {
    size_t row;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  std::vector<size_t> works = {0};  // works[w] .. works[w + 1]: the pieces of one piece of work
  int64_t filled = 0;
  for (size_t r = 0; r < numels.size(); ++r) {
    for (int64_t begin = 0; begin < numels[r]; begin += kRowPiece) {
      const int64_t end = std::min(numels[r], begin + kRowPiece);
      if (filled > 0 && filled + end - begin > kWork) {
        works.push_back(pieces.size());
        filled = 0;
      }
      pieces.push_back({r, begin, end});
      filled += end - begin;
    }
  }
  if (pieces.empty()) return;
  works.push_back(pieces.size());
  ops::for_chunks(static_cast<int64_t>(works.size()) - 1, 1, [&](int64_t, int64_t w, int64_t) {
    for (size_t i = works[static_cast<size_t>(w)]; i < works[static_cast<size_t>(w) + 1]; ++i) body(pieces[i].row, pieces[i].begin, pieces[i].end);
  });
}

}  // namespace ds::optim
