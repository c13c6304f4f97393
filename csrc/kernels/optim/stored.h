// SPDX-License-Identifier: Apache-2.0
// Optimizer updates of slices in any form: narrow or split masters, stochastic rounding, narrow or 8-bit states. What forms mean is in forms.h.
//
// Conventions of optim.h; in addition an 8-bit array and the slice begin at a border of 256 elements, and the element number `dice.first` says which
// random bits the first element gets. A value is widened to float32, updated as optim.h says and stored: so a split master has the bits of a float32
// one. LAMB, which looks at whole parameters, has no rule here: callers `widen` its arrays, update, and `narrow` them.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "kernels/many.h"
#include "kernels/optim/element.h"

namespace ds::kernels {

enum class Form : uint8_t {
  F32, F16, BF16,
  Split,       // data: bfloat16 weights, extra: int16 low bits
  Stochastic,  // data: bfloat16, rounded with dice
  Signed8,     // data: int8 codes, extra: float32 scales, one a block
  Unsigned8,   // data: uint8 codes, extra: float32 scales
};
int64_t form_size(Form form);  // bytes of `data` an element
const char* form_name(Form form);

struct Stored {
  Form form = Form::F32;
  void* data = nullptr;
  void* extra = nullptr;
  Stored at(int64_t i) const;  // the array from element i on
};

// Random bits of element first + i of update number `draw`.
struct Dice {
  uint64_t seed = 0, draw = 0, first = 0;
};

struct Slice {
  Stored p;                   // F32, F16, BF16, Split or Stochastic
  const void* g = nullptr;
  DType g_dt = DType::F32;
  Stored states[2];           // F32, F16, BF16, Signed8 or Unsigned8; as many as the rule has
  void* low = nullptr;        // only beside p in F32
  DType low_dt = DType::F32;
  Dice dice;
  Slice at(int64_t i) const;
};

using Rule = std::variant<AdamConstants, LionConstants, AdagradConstants, SgdConstants>;
int states_of(const Rule& rule);
// Throws a ValueError that names what `step` cannot do with the slice.
void check_slice(const Rule& rule, const Slice& slice, int64_t n);
// Throws a ValueError that names what an array's form needs and it has not: data, scales, low bits.
void check_stored(const Stored& array, const char* name, int64_t n);

void step(const Rule& rule, float grad_scale, const Slice& slice, int64_t n);
void step_ref(const Rule& rule, float grad_scale, const Slice& slice, int64_t n);

// Float32 values of an array in another form, and back.
void widen(const Stored& from, float* to, int64_t n);
void narrow(const float* from, const Stored& to, const Dice& dice, int64_t n);
void widen_ref(const Stored& from, float* to, int64_t n);
void narrow_ref(const float* from, const Stored& to, const Dice& dice, int64_t n);

// CUDA twins (built with DS_CUDA). `step_many` updates all rows in one launch; they agree in their forms and dtypes, those of `like`. The table, of
// many_step_plan(numels).bytes, is written on the host by write_step_table and copied to the device by the caller before the launch.
ManyPlan many_step_plan(const std::vector<int64_t>& numels);
void write_step_table(const ManyPlan& plan, const std::vector<Slice>& slices, const std::vector<int64_t>& numels, void* table);
void step_many(const Rule& rule, float grad_scale, const Slice& like, const ManyPlan& plan, const void* device_table, cudaStream_t stream);
void widen(const Stored& from, float* to, int64_t n, cudaStream_t stream);
void narrow(const float* from, const Stored& to, const Dice& dice, int64_t n, cudaStream_t stream);

}  // namespace ds::kernels
