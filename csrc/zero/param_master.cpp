// SPDX-License-Identifier: Apache-2.0
// Masters: the fp32 values of parameters that are kept in fewer bits, whole or split (optim/split_master.h), and how they follow what users write.
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

#include "optim/long_lived.h"
#include "optim/split_master.h"
#include "zero/param_store.h"

namespace ds::zero {
namespace {

// The fp32 master takes over values somebody has written. Where they still are the rounded master, nobody has, and the master's
// further digits stay.
void follow(const at::Tensor& master, const at::Tensor& written) {
  const at::Tensor values = written.to(master.device());
  master.copy_(at::where(master.to(values.scalar_type()).eq(values), master, values.to(at::kFloat)));
}

}  // namespace

bool ParamStore::is_split(const Flat& flat) const { return options_.split_master && flat.dtype == at::kBFloat16; }

at::Tensor ParamStore::mine_of(const Flat& flat, const at::Tensor& full) const {
  return full.narrow(0, rank() * flat.layout.shard_numel, flat.layout.shard_numel);
}

// Of values that are more exact than the weights, which are in flat.full then, or are the weights.
at::Tensor ParamStore::master_of(const Flat& flat, const at::Tensor& values) {
  const at::ScalarType dtype = is_split(flat) ? at::kShort : at::kFloat;
  if (!flat.state_rests && dtype == at::kFloat) return optim::long_lived_copy(values.to(device_, at::kFloat));
  const at::Tensor master =
      flat.state_rests ? options_.rest->zeros(values.numel(), dtype, /*second_place=*/true) : optim::long_lived_zeros(values.numel(), dtype, device_);
  if (dtype == at::kFloat) {
    master.copy_(values);
  } else if (values.scalar_type() != flat.dtype) {
    optim::write_split(values, options_.full_master ? flat.full : mine_of(flat, flat.full), master);
  }
  if (flat.state_rests) options_.rest->leave(master);
  return master;
}

void ParamStore::make_master(int index) {
  at::NoGradGuard no_grad;
  Flat& flat = flats_.at(index);
  flat.master = master_of(flat, options_.full_master ? flat.full : flat.shard);
  leave_file(flat);
}

// My master and my shard follow the parameter. Low bits beside weights that have been written are cleared: where the parameter is whole its weights
// have been written over, and nobody knows any more which of them are new.
void ParamStore::adopt_values(Flat& flat, Param& p) {
  const plan::Slot& slot = flat.layout.slots[p.slot];
  const plan::Slice mine = plan::slice_of(flat.layout, p.slot, rank());
  const bool whole = options_.full_master;
  const auto values_of_mine = [&] { return mine_of(flat, flat.full).narrow(0, mine.shard_begin, mine.numel); };
  if (flat.master.defined() && (whole ? slot.numel : mine.numel) > 0) {
    const at::Tensor values = whole ? flat.full.narrow(0, slot.offset, slot.numel) : values_of_mine();
    at::Tensor master = whole ? flat.master.narrow(0, slot.offset, slot.numel) : flat.master.narrow(0, mine.shard_begin, mine.numel);
    if (!is_split(flat)) {
      follow(master, values);
    } else if (options_.shard_params) {
      const at::Tensor before = flat.shard.narrow(0, mine.shard_begin, mine.numel).view(at::kShort);
      master.masked_fill_(before.ne(values.to(before.device()).view(at::kShort)).to(master.device()), 0);
    } else {
      master.zero_();
    }
  }
  if (options_.shard_params && mine.numel > 0) flat.shard.narrow(0, mine.shard_begin, mine.numel).copy_(values_of_mine());
}

void ParamStore::forget_written() {
  for (Param& p : params_) {
    if (!p.dropped) p.version = p.tensor._version();
  }
}

void ParamStore::copy_back(Unit& unit) {
  at::NoGradGuard no_grad;
  for (int f : unit.flats) {
    Flat& flat = flats_[f];
    const at::Tensor mine = mine_of(flat, flat.full);
    if (options_.shard_params) flat.shard.copy_(mine);
    if (flat.master.defined() && is_split(flat)) {
      flat.master.zero_();
    } else if (flat.master.defined()) {
      flat.master.copy_(options_.full_master ? flat.full : mine);
    }
    for (int number : flat.params) {
      if (!params_[number].dropped) params_[number].version = params_[number].tensor._version();
    }
  }
}

}  // namespace ds::zero
