// SPDX-License-Identifier: Apache-2.0
#include "zero/param_store.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>
#include <utility>

#include "base/checked.h"
#include "base/error.h"
#include "optim/split_master.h"

namespace ds::zero {
namespace {

// A view that keeps the memory's owner alive, however long the store itself lives.
template <typename Owner>
at::Tensor view_bytes(Owner owner, void* data, int64_t numel, at::ScalarType dtype, at::Device device) {
  return at::from_blob(data, {numel}, [owner](void*) {}, at::TensorOptions().dtype(dtype).device(device));
}

// A parameter's pointer into memory that `owner` holds.
template <typename Owner>
at::DataPtr pointer_into(const Owner& owner, void* data, at::Device device) {
  return {data, new Owner(owner), [](void* held) { delete static_cast<Owner*>(held); }, device};
}

// The part of a flat where one parameter lies, seen with the parameter's own sizes and strides.
at::Tensor slot_view(const at::Tensor& full, int64_t offset, const at::Tensor& like) {
  at::Tensor flat = full.narrow(0, offset, like.numel());
  if (like.numel() > 0 && like.is_non_overlapping_and_dense()) return flat.as_strided(like.sizes(), like.strides(), offset);
  return flat.view(like.sizes());
}

std::string changed_shape(const Param& p, const at::Tensor& now) {
  std::ostringstream text;
  text << "parameter '" << p.name << "' was given data of shape " << now.sizes() << ", but its shape is " << at::IntArrayRef(p.sizes)
       << ", fixed when the engine was built";
  return text.str();
}

}  // namespace

ParamStore::ParamStore(Groups groups, at::Device device, StoreOptions options)
    : groups_(std::move(groups)), device_(device), options_(options), pool_(device), in_memory_(options.most_in_memory) {
  DS_CHECK(groups_.world && groups_.shard && groups_.reduce, "ParamStore needs a world, a shard and a reduce transport");
}

int ParamStore::add_unit(UnitRequest request) {
  const size_t n = request.params.size();
  DS_CHECK(request.names.size() == n && request.trainable.size() == n && request.dtypes.size() == n,
           "add_unit: names, trainable and dtypes must be as many as params");
  const int index = static_cast<int>(units_.size());
  units_.emplace_back();
  units_.back().name = request.name;
  units_.back().alive_params = static_cast<int>(n);
  units_.back().persistent = request.persistent;

  // One flat for each (dtype, trainable): first the trainable ones, in order of appearance.
  std::map<std::pair<bool, int>, std::vector<int>> groups;
  for (size_t i = 0; i < n; ++i) {
    groups[{!request.trainable[i], static_cast<int>(request.dtypes[i])}].push_back(static_cast<int>(i));
  }
  for (const auto& [key, members] : groups) add_flat(index, request, members);

  Unit& unit = units_.back();
  unit.state = UnitState::Gathered;
  if (options_.shard_params && !unit.persistent) release(index);
  return index;
}

int ParamStore::add_flat(int unit, const UnitRequest& request, const std::vector<int>& members) {
  Flat flat;
  flat.unit = unit;
  flat.dtype = request.dtypes[members.front()];
  flat.trainable = request.trainable[members.front()];
  std::vector<int64_t> numels;
  for (int m : members) numels.push_back(request.params[m].numel());
  flat.layout = plan::plan_flat(numels, world(), options_.align_numel);

  const int64_t es = static_cast<int64_t>(c10::elementSize(flat.dtype));
  const int64_t full_bytes = flat.layout.numel() * es;
  const int64_t shard_bytes = flat.layout.shard_numel * es;
  flat.state_rests = flat.trainable && options_.rest && request.state_rests;
  char* home = nullptr;
  if (!options_.parameter_rest) {
    const bool to_file = !options_.folder.empty() && !in_memory_.take(options_.shard_params ? flat.layout.shard_numel : flat.layout.numel());
    std::tie(flat.home, flat.home_offset_bytes) = allocate_home(options_.shard_params ? shard_bytes : full_bytes, to_file ? options_.folder : "");
    home = static_cast<char*>(flat.home->data()) + flat.home_offset_bytes;
  }
  if (options_.shard_params) {
    flat.shard = home != nullptr ? view_bytes(flat.home, home, flat.layout.shard_numel, flat.dtype, device_)
                                 : options_.parameter_rest->zeros(flat.layout.shard_numel, flat.dtype);
    flat.buffer = pool_.take(full_bytes);
    flat.full = view_bytes(flat.buffer, flat.buffer.data_ptr(), flat.layout.numel(), flat.dtype, device_);
  } else {
    flat.full = view_bytes(flat.home, home, flat.layout.numel(), flat.dtype, device_);
    flat.shard = flat.full.narrow(0, rank() * flat.layout.shard_numel, flat.layout.shard_numel);
  }
  const bool vacant = request.vacant && options_.shard_params;
  if (vacant) {
    clear_padding(flat);
  } else {
    fill_flat(flat, request, members);
  }

  const int index = static_cast<int>(flats_.size());
  for (size_t slot = 0; slot < members.size(); ++slot) {
    const int m = members[slot];
    Param p;
    p.tensor = request.params[m];
    p.name = request.names[m];
    p.flat = index;
    p.slot = static_cast<int>(slot);
    flat.params.push_back(static_cast<int>(params_.size()));
    params_.push_back(std::move(p));
  }
  adopt_params(flat);
  if (options_.shard_params && !vacant) flat.shard.copy_(flat.full.narrow(0, rank() * flat.layout.shard_numel, flat.layout.shard_numel));
  if (flat.home) flat.home->publish();
  leave_file(flat);
  units_[unit].flats.push_back(index);
  flats_.push_back(std::move(flat));
  return index;
}

// Zeroes what of the padding lies in my shard.
void ParamStore::clear_padding(Flat& flat) {
  at::NoGradGuard no_grad;
  const int64_t begin = rank() * flat.layout.shard_numel, end = begin + flat.layout.shard_numel;
  for (const plan::Slot& gap : plan::padding_of(flat.layout)) {
    const int64_t first = std::max(begin, gap.offset), last = std::min(end, gap.offset + gap.numel);
    if (first < last) flat.shard.narrow(0, first - begin, last - first).zero_();
  }
}

// Copies the parameters' values into flat.full, lets rank 0's win, and derives the fp32 master where asked.
void ParamStore::fill_flat(Flat& flat, const UnitRequest& request, const std::vector<int>& members) {
  at::NoGradGuard no_grad;
  const bool wants_master =
      request.keep_master && flat.trainable && flat.dtype != at::kFloat && at::isFloatingType(flat.dtype) &&
      std::any_of(members.begin(), members.end(), [&](int m) { return request.params[m].scalar_type() == at::kFloat; });
  at::Tensor staging = flat.full;
  at::Tensor staging_memory;
  if (wants_master) {
    staging_memory = pool_.take(flat.layout.numel() * 4);
    staging = view_bytes(staging_memory, staging_memory.data_ptr(), flat.layout.numel(), at::kFloat, device_);
  }
  for (const plan::Slot& gap : plan::padding_of(flat.layout)) staging.narrow(0, gap.offset, gap.numel).zero_();
  for (size_t slot = 0; slot < members.size(); ++slot) {
    const at::Tensor& p = request.params[members[slot]];
    if (p.numel() > 0) slot_view(staging, flat.layout.slots[slot].offset, p).copy_(p);
  }
  const int64_t bytes = staging.numel() * static_cast<int64_t>(staging.element_size());
  if (request.broadcast && groups_.world->size() > 1) {
    groups_.world->broadcast(staging.data_ptr(), static_cast<size_t>(bytes), 0, tag("broadcast", flat.unit, bytes));
  }
  if (wants_master) {
    if (is_split(flat)) {
      optim::write_split(staging, flat.full, at::Tensor());
    } else {
      flat.full.copy_(staging);
    }
    flat.master = master_of(flat, options_.full_master ? staging : mine_of(flat, staging));
    staging = at::Tensor();
    pool_.put(std::move(staging_memory));
  }
}

// Gives each parameter a StorageImpl of its own that points into flat.full.
void ParamStore::adopt_params(Flat& flat) {
  for (int index : flat.params) {
    Param& p = params_[index];
    p.sizes = p.tensor.sizes().vec();
    if (p.tensor.is_non_overlapping_and_dense()) p.strides = p.tensor.strides().vec();
    adopt_param(flat, p);
    p.version = p.tensor._version();
  }
}

void ParamStore::adopt_param(Flat& flat, Param& p) {
  char* data =
      static_cast<char*>(flat.full.data_ptr()) + flat.layout.slots[p.slot].offset * static_cast<int64_t>(c10::elementSize(flat.dtype));
  const auto options = at::TensorOptions().dtype(flat.dtype).device(device_);
  const auto keep = [home = flat.home, buffer = flat.buffer](void*) {};
  p.tensor.set_data(p.strides.empty() ? at::from_blob(data, p.sizes, keep, options)
                                      : at::from_blob(data, p.sizes, p.strides, keep, options));
}

bool ParamStore::take_replaced(int index, bool keep) {
  at::NoGradGuard no_grad;
  bool found = false;
  std::string problem;
  for (int f : units_.at(index).flats) {
    Flat& flat = flats_[f];
    if (!flat.full.defined()) continue;
    const int64_t es = static_cast<int64_t>(c10::elementSize(flat.dtype));
    for (int number : flat.params) {
      Param& p = params_[number];
      const plan::Slot& slot = flat.layout.slots[p.slot];
      if (p.dropped || slot.numel == 0 || (p.tensor.scalar_type() == flat.dtype &&
                                           p.tensor.data_ptr() == static_cast<char*>(flat.full.data_ptr()) + slot.offset * es)) continue;
      found = true;
      const at::Tensor theirs = p.tensor.detach();
      adopt_param(flat, p);
      if (theirs.sizes() != at::IntArrayRef(p.sizes)) {
        if (problem.empty()) problem = changed_shape(p, theirs);
      } else if (keep) {
        p.tensor.detach().copy_(theirs);
      }
    }
  }
  DS_CHECK(problem.empty(), problem);
  return found;
}

void ParamStore::bind(Unit& unit, bool available) {
  for (int f : unit.flats) {
    Flat& flat = flats_[f];
    const int64_t es = static_cast<int64_t>(c10::elementSize(flat.dtype));
    char* base = available ? static_cast<char*>(flat.full.data_ptr()) : nullptr;
    for (size_t slot = 0; slot < flat.params.size(); ++slot) {
      Param& p = params_[flat.params[slot]];
      if (p.dropped) continue;
      const plan::Slot& where = flat.layout.slots[slot];
      c10::StorageImpl* storage = p.tensor.storage().unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(available ? pointer_into(flat.buffer, base + where.offset * es, device_)
                                             : at::DataPtr(nullptr, device_));
      storage->set_nbytes(available ? where.numel * es : 0);
    }
  }
  if (on_bind_) on_bind_(static_cast<int>(&unit - units_.data()), available);
}

void ParamStore::gather(int index, const char* phase, bool prefetch) {
  Unit& unit = units_.at(index);
  if (unit.state == UnitState::Gathered) return;
  if (unit.state == UnitState::Sharded) {
    for (int f : unit.flats) {
      Flat& flat = flats_[f];
      BufferPool::Taken taken = pool_.take_since(flat.layout.numel() * static_cast<int64_t>(c10::elementSize(flat.dtype)));
      flat.buffer = std::move(taken.memory);
      flat.full = view_bytes(flat.buffer, flat.buffer.data_ptr(), flat.layout.numel(), flat.dtype, device_);
      start_gather(flat, phase, taken.since);
    }
    unit.state = UnitState::Gathering;
  }
  if (!prefetch) finish_gather(unit);
}

void ParamStore::finish_gather(Unit& unit) {
  for (int f : unit.flats) {
    if (flats_[f].gathering) flats_[f].gathering->wait();
    flats_[f].gathering.reset();
    leave_file(flats_[f]);
  }
  unit.state = UnitState::Gathered;
  bind(unit, true);
}

void ParamStore::part_from_holders(Unit& unit) {
  for (int f : unit.flats) {
    for (int index : flats_[f].params) {
      Param& p = params_[index];
      if (p.dropped || p.tensor.storage().use_count() == 1) continue;
      p.tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(c10::Storage(
          c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, device_), /*allocator=*/nullptr, /*resizable=*/false));
    }
  }
}

void ParamStore::release(int index, bool part) {
  Unit& unit = units_.at(index);
  unit.held_for_backward = false;
  if (!options_.shard_params || unit.persistent || unit.pins > 0 || unit.state == UnitState::Sharded) return;
  for (int f : unit.flats) {
    if (flats_[f].gathering) flats_[f].gathering->wait();
    flats_[f].gathering.reset();
  }
  const bool was_bound = unit.state == UnitState::Gathered;
  if (was_bound) take_replaced(index, /*keep=*/false);
  unit.state = UnitState::Sharded;
  if (was_bound && part) part_from_holders(unit);
  if (was_bound) bind(unit, false);
  for (int f : unit.flats) {
    flats_[f].full = at::Tensor();
    // Memory that somebody else still looks at goes when they go.
    if (flats_[f].buffer.defined() && flats_[f].buffer.use_count() == 1) pool_.put(std::move(flats_[f].buffer));
    flats_[f].buffer = at::Tensor();
  }
}

void ParamStore::release_all() {
  for (size_t i = 0; i < units_.size(); ++i) release(static_cast<int>(i));
}

void ParamStore::unpin(int index) {
  Unit& unit = units_.at(index);
  DS_CHECK(unit.pins > 0, "unit '" << unit.name << "' is not pinned");
  --unit.pins;
}

void ParamStore::broadcast_full(int index, int src) {
  Unit& unit = units_.at(index);
  DS_CHECK(unit.state == UnitState::Gathered, "unit '" << unit.name << "' must be gathered before its values are broadcast");
  take_replaced(index, /*keep=*/true);
  if (groups_.world->size() == 1) return;
  for (int f : unit.flats) {
    const int64_t bytes = flats_[f].full.numel() * static_cast<int64_t>(flats_[f].full.element_size());
    groups_.world->broadcast(flats_[f].full.data_ptr(), static_cast<size_t>(bytes), src, tag("broadcast", index, bytes));
  }
}

void ParamStore::check_params() const {
  const bool training = at::GradMode::is_enabled();
  for (const Param& p : params_) {
    if (p.dropped) continue;
    DS_CHECK(p.tensor.sizes() == at::IntArrayRef(p.sizes), changed_shape(p, p.tensor));
    DS_CHECK_VALUE(p.tensor.scalar_type() == flats_[p.flat].dtype && p.tensor.device().type() == device_.type(),
                   "parameter '" << p.name << "' is now " << p.tensor.scalar_type() << " on " << p.tensor.device() << ", but was "
                                 << flats_[p.flat].dtype << " on " << device_
                                 << " when the engine was built: the configuration decides the precision (bf16.enabled, fp16.enabled) and the "
                                    "engine the device; undo the conversion of the module");
    DS_CHECK_VALUE(!(p.stays_frozen && training && p.tensor.requires_grad()),
                   "parameter '" << p.name << "' requires a gradient now, but was frozen when deepspeed.initialize() laid out what is "
                                 << "trained, so it would not be updated: let it require a gradient when initialize() is called and freeze "
                                 << "it afterwards (requires_grad_(False)) until it is to be trained, or build a new engine");
  }
}

bool ParamStore::adopt_written() {
  at::NoGradGuard no_grad;
  bool any = false;
  for (size_t u = 0; u < units_.size(); ++u) {
    if (units_[u].state != UnitState::Gathered) continue;
    take_replaced(static_cast<int>(u), /*keep=*/true);   // writes what it finds, which counts as written in place
    for (int f : units_[u].flats) {
      if (!flats_[f].trainable) continue;
      for (int number : flats_[f].params) {
        Param& p = params_[number];
        if (p.dropped || p.tensor._version() == p.version) continue;
        adopt_values(flats_[f], p);
        p.version = p.tensor._version();
        any = true;
      }
    }
  }
  return any;
}

void ParamStore::write_back(int index) {
  Unit& unit = units_.at(index);
  DS_CHECK(unit.state == UnitState::Gathered, "unit '" << unit.name << "' must be gathered before its values are taken over");
  take_replaced(index, /*keep=*/true);
  // A peer may still be gathering what my slices hold now.
  if (groups_.world->size() > 1) groups_.world->barrier(tag("write_back", index, 0));
  copy_back(unit);
  for (int f : unit.flats) {
    if (flats_[f].home) flats_[f].home->publish();
    leave_file(flats_[f]);
  }
}

void ParamStore::publish_all() {
  std::vector<comm::SymmetricBuffer*> done;
  for (Flat& flat : flats_) {
    if (!flat.home || std::find(done.begin(), done.end(), flat.home.get()) != done.end()) continue;
    done.push_back(flat.home.get());
    flat.home->publish();
  }
}

void ParamStore::refresh_full() {
  std::vector<std::shared_ptr<comm::Work>> works;
  for (Flat& flat : flats_) {
    if (!flat.trainable || !flat.full.defined()) continue;
    if (!flat.home) {
      start_gather(flat, "gather_updated", event_now(device_));
      if (flat.gathering) works.push_back(std::exchange(flat.gathering, nullptr));
      continue;
    }
    if (world() == 1) continue;
    const int64_t shard_bytes = flat.layout.shard_numel * static_cast<int64_t>(c10::elementSize(flat.dtype));
    const int64_t stride = options_.shard_params ? 0 : shard_bytes;
    works.push_back(groups_.shard->all_gather(flat.full.data_ptr(), *flat.home, static_cast<size_t>(flat.home_offset_bytes),
                                              static_cast<size_t>(stride), static_cast<size_t>(shard_bytes),
                                              tag("gather_updated", flat.unit, shard_bytes)));
  }
  for (auto& work : works) work->wait();
  if (world() > 1 || !options_.shard_params) return;
  at::NoGradGuard no_grad;
  for (Flat& flat : flats_) {
    if (flat.trainable && flat.full.defined() && flat.home) flat.full.copy_(flat.shard);   // one rank: the shard is the whole
  }
}

at::Tensor ParamStore::gather_slices(int index, const at::Tensor& mine) {
  at::NoGradGuard no_grad;
  const Param& p = params_.at(index);
  const plan::FlatLayout& layout = flats_[p.flat].layout;
  int64_t longest = 0;
  for (int r = 0; r < world(); ++r) longest = std::max(longest, plan::slice_of(layout, p.slot, r).numel);
  const plan::Slice own = plan::slice_of(layout, p.slot, rank());
  DS_CHECK(mine.dim() == 1 && mine.numel() == own.numel, "gather_slices: parameter '" << p.name << "' has a slice of " << own.numel
                                                            << " elements on this rank, got " << mine.sizes());
  at::Tensor padded = at::zeros({longest}, mine.options().device(at::kCPU));
  padded.narrow(0, 0, own.numel).copy_(mine);
  at::Tensor all = at::empty({world(), longest}, padded.options());
  const int64_t bytes = longest * static_cast<int64_t>(padded.element_size());
  groups_.shard->all_gather_host(padded.data_ptr(), static_cast<size_t>(bytes), all.data_ptr(),
                                 tag("gather_state", flats_[p.flat].unit, bytes));
  at::Tensor full = at::empty({layout.slots[p.slot].numel}, padded.options());
  for (int r = 0; r < world(); ++r) {
    const plan::Slice slice = plan::slice_of(layout, p.slot, r);
    full.narrow(0, slice.param_begin, slice.numel).copy_(all[r].narrow(0, 0, slice.numel));
  }
  return full.to(mine.device());
}

void ParamStore::drop_param(int index) {
  Param& p = params_.at(index);
  if (p.dropped) return;
  p.dropped = true;
  p.tensor = at::Tensor();
  Unit& unit = units_[flats_[p.flat].unit];
  if (--unit.alive_params > 0) return;
  unit.pins = 0;
  release(flats_[p.flat].unit);
  for (int f : unit.flats) {
    flats_[f].shard = flats_[f].full = flats_[f].master = at::Tensor();
    flats_[f].home.reset();
    flats_[f].layout.slots.clear();
  }
  unit.flats.clear();
  // The chunk the next unit would be cut from must not keep a dropped store's memory alive.
  if (std::all_of(units_.begin(), units_.end(), [](const Unit& u) { return u.alive_params == 0; })) {
    memory_chunk_ = file_chunk_ = {};
    pool_.trim();
  }
}

StoreBytes ParamStore::bytes() const {
  StoreBytes held;
  for (const Flat& flat : flats_) {
    const at::Tensor& resting = options_.shard_params ? flat.shard : flat.full;
    const int64_t bytes = resting.defined() ? resting.numel() * static_cast<int64_t>(resting.element_size()) : 0;
    held.parameters += bytes;
    if (in_file(flat)) held.parameters_in_files += bytes;
    if (flat.master.defined()) held.master_weights += flat.master.numel() * static_cast<int64_t>(flat.master.element_size());
    if (flat.buffer.defined()) held.gathered_units += flat.buffer.numel();
  }
  held.gathered_units += pool_.free_bytes();
  return held;
}

int64_t ParamStore::gathered_bytes() const {
  int64_t total = 0;
  for (const Flat& flat : flats_) {
    if (options_.shard_params && flat.full.defined()) total += flat.full.numel() * static_cast<int64_t>(flat.full.element_size());
  }
  return total;
}

}  // namespace ds::zero
