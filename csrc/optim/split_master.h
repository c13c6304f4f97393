// SPDX-License-Identifier: Apache-2.0
// Float32 values that lie in memory in another form, above all split masters (Note [split master] in kernels/optim/forms.h).
//
// Where the engine keeps split masters, "the master" of some weights is their low bits: an int16 tensor as long as they are, which may lie on another
// device than the bfloat16 weights. Neither says anything without the other.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/optim/stored.h"

namespace ds::optim {

// To and from a contiguous float32 tensor on the array's device.
void widen(const kernels::Stored& from, const at::Tensor& to);
void narrow(const at::Tensor& from, const kernels::Stored& to, const kernels::Dice& dice);

inline bool is_split(const at::Tensor& master) { return master.defined() && master.scalar_type() == at::kShort; }

// All are one-dimensional and equally long, weights bfloat16, low bits int16. Tile by tile: no copy of everything is made.
// values: float32, overwritten.
void read_split(const at::Tensor& weights, const at::Tensor& low_bits, const at::Tensor& values);
// values: any floating-point dtype. low_bits undefined: the weights alone are wanted.
void write_split(const at::Tensor& values, const at::Tensor& weights, const at::Tensor& low_bits);

}  // namespace ds::optim
