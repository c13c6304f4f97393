// SPDX-License-Identifier: Apache-2.0
#include "zero/grad_reducer.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/checked.h"
#include "base/error.h"
#include "optim/device_ops.h"
#include "optim/long_lived.h"

namespace ds::zero {
namespace {

int64_t element_bytes(at::ScalarType t) { return static_cast<int64_t>(c10::elementSize(t)); }

// A gradient as a flat run of elements in the order the parameter's memory has; no copy in the usual case.
at::Tensor flat_like(const at::Tensor& grad, const at::Tensor& param) {
  if (grad.is_sparse()) return flat_like(grad.to_dense(), param);
  if (param.is_non_overlapping_and_dense()) {
    if (grad.strides() == param.strides()) return grad.as_strided({grad.numel()}, {1}, grad.storage_offset());
    at::Tensor copy = at::empty_strided(param.sizes(), param.strides(), grad.options());
    copy.copy_(grad);
    return copy.as_strided({copy.numel()}, {1}, 0);
  }
  return grad.contiguous().view({grad.numel()});
}

bool kernel_dtype(at::ScalarType t) { return t == at::kFloat || t == at::kHalf || t == at::kBFloat16; }

}  // namespace

GradReducer::GradReducer(ParamStore& store, ReducerOptions options) : store_(store), options_(std::move(options)) {
  if (options_.rest && options_.rest->apart()) host_sums_ = std::make_unique<HostSums>(store_.device(), options_.rest->pinned());
  flats_.resize(store_.flats().size());
  for (size_t i = flats_.size(); i-- > 0;) {   // backward meets the units in reverse
    const Flat& flat = store_.flats()[i];
    if (!flat.trainable || flat.params.empty()) continue;
    FlatState& s = flats_[i];
    DS_CHECK_VALUE(kernel_dtype(flat.dtype), "parameter '" << store_.params()[flat.params[0]].name << "' is trainable with dtype "
                                                           << c10::toString(flat.dtype)
                                                           << "; float32, float16 and bfloat16 can be trained");
    s.trainable = true;
    s.arrived.assign(flat.params.size(), 0);
    s.awaited.assign(flat.params.size(), 1);
    s.required.assign(flat.params.size(), 0);
    s.order = static_cast<int>(order_.size());
    order_.push_back(static_cast<int>(i));
  }
  set_comm_dtype(options_.comm_dtype);
}

void GradReducer::set_comm_dtype(std::optional<at::ScalarType> dtype) {
  DS_CHECK_VALUE(!dtype || kernel_dtype(*dtype), "gradients cannot travel as " << c10::toString(*dtype) << "; float32, float16 and bfloat16 can");
  DS_CHECK(!in_round_, "the type in which gradients travel cannot change during a backward");
  options_.comm_dtype = dtype;
  int64_t largest = 0;
  for (int f : order_) {
    const Flat& flat = store_.flats()[f];
    flats_[f].comm_dtype = dtype.value_or(flat.dtype);
    largest = std::max(largest, flat.layout.numel() * element_bytes(flats_[f].comm_dtype));
  }
  if (arena_) {
    arena_->wait_drained();
    store_.groups().reduce->barrier(store_.tag("comm_dtype", -1, 0));   // nobody reads the old buckets any more
  }
  if (!order_.empty()) arena_ = std::make_unique<BucketArena>(*store_.groups().reduce, largest);
}

void GradReducer::ensure_accumulators() {
  for (int f : order_) {
    FlatState& s = flats_[f];
    if (s.slice.defined()) continue;
    const Flat& flat = store_.flats()[f];
    const auto options = at::TensorOptions().dtype(at::kFloat).device(store_.device());
    if (options_.replicate_grads && store_.world() > 1) {
      std::tie(s.home, s.home_offset) = store_.allocate_home(flat.layout.numel() * 4);
      s.full = at::from_blob(static_cast<char*>(s.home->data()) + s.home_offset, {flat.layout.numel()}, options);
      s.slice = s.full.narrow(0, store_.rank() * flat.layout.shard_numel, flat.layout.shard_numel);
    } else {
      s.slice = flat.state_rests ? options_.rest->zeros(flat.layout.shard_numel, at::kFloat)
                              : optim::long_lived_zeros(flat.layout.shard_numel, at::kFloat, store_.device());
      s.full = s.slice;
    }
    s.stats = at::zeros({2}, options.dtype(at::kDouble).device(s.slice.device()));
  }
}

void GradReducer::begin_round() {
  DS_CHECK(refusal_.empty(), refusal_);
  ensure_accumulators();
  in_round_ = true;
  unused_.clear();
  next_ = 0;
  round_scale_ = post_scale_;
  note_required();
  for (int f : order_) {
    FlatState& s = flats_[f];
    std::fill(s.arrived.begin(), s.arrived.end(), 0);
    for (size_t slot = 0; slot < s.awaited.size(); ++slot) s.awaited[slot] = store_.requires_grad(store_.flats()[f].params[slot]);
    s.missing = static_cast<int>(std::count(s.awaited.begin(), s.awaited.end(), 1));
    s.issued = s.open = false;
  }
}

void GradReducer::note_required() {
  for (int f : order_) {
    for (size_t slot = 0; slot < flats_[f].required.size(); ++slot) {
      flats_[f].required[slot] |= store_.requires_grad(store_.flats()[f].params[slot]);
    }
  }
}

std::vector<int> GradReducer::frozen() const {
  std::vector<int> found;
  for (int f : order_) {
    for (size_t slot = 0; slot < flats_[f].required.size(); ++slot) {
      if (!flats_[f].required[slot]) found.push_back(store_.flats()[f].params[slot]);
    }
  }
  return found;
}

void GradReducer::on_grad(int param, const at::Tensor& grad) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  at::NoGradGuard no_grad;
  const Param& p = store_.params()[param];
  FlatState& s = flats_[p.flat];
  DS_CHECK(grad.sizes() == at::IntArrayRef(p.sizes), "the gradient of parameter '" << p.name << "' has shape " << grad.sizes()
                                                         << ", but its shape is " << at::IntArrayRef(p.sizes)
                                                         << ", fixed when the engine was built");
  if (deferred_) {
    DS_CHECK(refusal_.empty(), refusal_);
    ensure_accumulators();
    if (!s.required[p.slot]) note_required();
    add_to_carry(p.flat, p.slot, grad);
    return;
  }
  if (!in_round_) begin_round();
  if (s.issued) {
    add_to_carry(p.flat, p.slot, grad);
    return;
  }
  if (!s.open) open_bucket(p.flat);
  write_slot(p.flat, p.slot, grad);
  if (s.missing == 0) issue_ready();
  store_.groups().reduce->progress();
}

void GradReducer::open_bucket(int f) {
  FlatState& s = flats_[f];
  const Flat& flat = store_.flats()[f];
  const int64_t bytes = flat.layout.numel() * element_bytes(s.comm_dtype);
  const auto options = at::TensorOptions().dtype(s.comm_dtype).device(store_.device());
  const bool my_turn = next_ < order_.size() && order_[next_] == f;
  s.region = my_turn ? arena_->acquire(bytes, may_wait()) : arena_->try_acquire(bytes);
  s.bucket = s.region.valid() ? at::from_blob(arena_->data(s.region), {flat.layout.numel()}, options)
                              : at::empty({flat.layout.numel()}, options);
  for (const plan::Slot& gap : plan::padding_of(flat.layout)) s.bucket.narrow(0, gap.offset, gap.numel).zero_();
  s.open = true;
}

// Note [Waiting in the middle of backward]
// A reduction that I wait for may be one that a peer reaches only at the end of its backward, because its graph does not use
// the unit. Where the carrier wants all ranks to gather in one order, that peer may in turn wait for a gather that I
// have not started. So there nobody waits for reductions before its own backward is over: a full bucket stays in private memory.
bool GradReducer::may_wait() const {
  const bool one_order = store_.options().shard_params && store_.world() > 1 && store_.groups().shard->needs_matching_order();
  return flushing_ || !one_order;
}

// A bucket that was filled in private memory moves into the arena when its turn comes; false when there is no room yet.
bool GradReducer::to_region(int f) {
  FlatState& s = flats_[f];
  if (s.region.valid()) return true;
  s.region = arena_->acquire(s.bucket.numel() * element_bytes(s.comm_dtype), may_wait());
  if (!s.region.valid()) return false;
  at::Tensor target = at::from_blob(arena_->data(s.region), {s.bucket.numel()}, s.bucket.options());
  target.copy_(s.bucket);
  s.bucket = target;
  return true;
}

void GradReducer::write_slot(int f, int slot, const at::Tensor& grad) {
  FlatState& s = flats_[f];
  const Flat& flat = store_.flats()[f];
  const plan::Slot& where = flat.layout.slots[slot];
  at::Tensor target = s.bucket.narrow(0, where.offset, where.numel);
  const at::Tensor source = flat_like(grad, store_.params()[flat.params[slot]].tensor);
  if (s.arrived[slot]) {
    target.add_(source, options_.pre_scale);
    return;
  }
  if (kernel_dtype(source.scalar_type())) {
    optim::copy_scale(target, source, static_cast<float>(options_.pre_scale));
  } else {
    target.copy_(source.mul(options_.pre_scale));
  }
  s.arrived[slot] = 1;
  if (s.awaited[slot]) --s.missing;   // else the graph is older than requires_grad=False
}

void GradReducer::add_to_carry(int f, int slot, const at::Tensor& grad) {
  FlatState& s = flats_[f];
  const Flat& flat = store_.flats()[f];
  if (!s.carry.defined()) {
    s.carry = optim::long_lived_zeros(flat.layout.numel(), at::kFloat, store_.device());
    s.carry_scale = post_scale_;
  }
  const double scale = options_.pre_scale * (post_scale_ / s.carry_scale);
  const plan::Slot& where = flat.layout.slots[slot];
  at::Tensor target = s.carry.narrow(0, where.offset, where.numel);
  const at::Tensor source = flat_like(grad, store_.params()[flat.params[slot]].tensor);
  if (kernel_dtype(source.scalar_type())) {
    optim::accumulate(target, source, static_cast<float>(scale));
  } else {
    target.add_(source, scale);
  }
}

void GradReducer::fill_missing(int f) {
  FlatState& s = flats_[f];
  if (!s.open) open_bucket(f);
  const Flat& flat = store_.flats()[f];
  for (size_t slot = 0; slot < s.arrived.size(); ++slot) {
    if (s.arrived[slot]) continue;
    s.bucket.narrow(0, flat.layout.slots[slot].offset, flat.layout.slots[slot].numel).zero_();
    s.arrived[slot] = 1;
    if (s.awaited[slot]) unused_.push_back(flat.params[slot]);
  }
  s.missing = 0;
}

void GradReducer::issue_ready() {
  while (next_ < order_.size() && flats_[order_[next_]].missing == 0) {
    fill_missing(order_[next_]);   // what requires no gradient now
    if (!issue(order_[next_])) return;
  }
}

bool GradReducer::issue(int f) {
  FlatState& s = flats_[f];
  const Flat& flat = store_.flats()[f];
  ++next_;   // before acquire(): from here on it is this flat's turn whatever happens
  if (!to_region(f)) {
    --next_;
    return false;
  }
  if (s.carry.defined()) {
    s.bucket.add_(s.carry, s.carry_scale / round_scale_);
    s.carry = at::Tensor();
  }
  const int64_t part_bytes = flat.layout.shard_numel * element_bytes(s.comm_dtype);
  s.issued = true;
  s.work = store_.groups().reduce->reduce_scatter(
      arena_->buffer(), static_cast<size_t>(s.region.offset), static_cast<size_t>(part_bytes), 0, optim::to_dtype(s.comm_dtype),
      [this, f, round = round_.load()](const void* const* srcs, int nsrc) {
        if (round == round_) sink(f, srcs, nsrc);
      },
      store_.tag("reduce", flat.unit, part_bytes * store_.world()));
  arena_->issued(s.region, s.work);
  s.bucket = at::Tensor();
  s.region = Region{};
  return true;
}

void GradReducer::sink(int f, const void* const* srcs, int nsrc) {
  if (host_sums_ && store_.flats()[f].state_rests) {
    const int64_t bytes = flats_[f].slice.numel() * element_bytes(flats_[f].comm_dtype);
    host_sums_->send(srcs, nsrc, bytes, may_wait(),
                     [this, f, scale = round_scale_](const void* const* here, int n) { add(f, here, n, scale); });
  } else {
    add(f, srcs, nsrc, round_scale_);
  }
}

void GradReducer::add(int f, const void* const* srcs, int nsrc, double scale) {
  FlatState& s = flats_[f];
  optim::reduce_sum(s.slice, srcs, nsrc, optim::to_dtype(s.comm_dtype), static_cast<float>(scale), s.has_grad, s.stats);
  s.has_grad = true;
  const bool bad = s.stats.is_cpu() && s.stats.data_ptr<double>()[1] > 0;
  if (bad) note_bad(f, srcs, nsrc);
  leave(s);
  note_changed(f);
  if (final_ && on_ready_ && !bad) {
    s.told = true;
    on_ready_(f);
  }
}

void GradReducer::note_changed(int f) {
  if (std::exchange(flats_.at(f).told, false)) on_changed_(f);
}

void GradReducer::mark_edited(int f) {
  flats_.at(f).edited = true;
  note_changed(f);
}

void GradReducer::set_listeners(Listener ready, Listener changed) {
  on_ready_ = std::move(ready);
  on_changed_ = std::move(changed);
}

// An accumulator in a file takes memory only while it is worked on.
void GradReducer::leave(FlatState& s) {
  if (options_.rest && options_.rest->holds(s.slice)) options_.rest->leave(s.slice);
}

// Rare: looks again at the contributions to say which parameter and whose.
void GradReducer::note_bad(int f, const void* const* srcs, int nsrc) {
  const Flat& flat = store_.flats()[f];
  const int64_t n = flat.layout.shard_numel;
  int64_t index = -1;
  int rank = -1;
  for (int r = 0; r < nsrc; ++r) {
    const int64_t i = optim::first_nonfinite(srcs[r], optim::to_dtype(flats_[f].comm_dtype), n, flats_[f].slice.device());
    if (i >= 0 && (index < 0 || i < index)) {
      index = i;
      rank = nsrc > 1 ? r : (store_.world() == 1 ? 0 : -1);
    }
  }
  if (index < 0) index = optim::first_nonfinite(flats_[f].slice.data_ptr(), DType::F32, n, flats_[f].slice.device());
  if (index < 0) return;
  index += n * store_.rank();
  for (size_t slot = 0; slot < flat.params.size(); ++slot) {
    const plan::Slot& where = flat.layout.slots[slot];
    if (index < where.offset || index >= where.offset + where.numel) continue;
    const int param = flat.params[slot];
    if (bad_.param < 0 || param < bad_.param) bad_ = {param, rank};
  }
}

void GradReducer::flush(bool force) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (!in_round_ && !force) return;
  if (order_.empty()) {
    in_round_ = false;
    return;
  }
  at::NoGradGuard no_grad;
  if (!in_round_) begin_round();
  struct Flushing {
    bool& flag;
    explicit Flushing(bool& f) : flag(f) { flag = true; }
    ~Flushing() { flag = false; }
  } flushing(flushing_);
  while (next_ < order_.size()) {
    const int f = order_[next_];
    fill_missing(f);
    issue(f);
  }
  finish_round();
}

void GradReducer::finish_round() {
  for (int f : order_) {
    if (flats_[f].work) flats_[f].work->wait();
    flats_[f].work.reset();
  }
  if (host_sums_) host_sums_->drain();
  in_round_ = false;
}

void GradReducer::abandon() {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (!in_round_) return;
  ++round_;
  if (host_sums_) host_sums_->drop();
  for (FlatState& s : flats_) {
    if (s.open && !s.issued && s.region.valid()) arena_->release(s.region);
    s.region = Region{};
    s.bucket = at::Tensor();
    s.work.reset();
    s.open = false;
  }
  in_round_ = false;
}

bool GradReducer::has_carry() const {
  return std::any_of(flats_.begin(), flats_.end(), [](const FlatState& s) { return s.carry.defined(); });
}

void GradReducer::flush_carry() { flush(/*force=*/true); }

void GradReducer::ensure_grads() {
  ensure_accumulators();
  const bool none = std::none_of(order_.begin(), order_.end(), [this](int f) { return flats_[f].has_grad; });
  if (none) note_required();   // a step without a backward
  const bool zeroes = std::any_of(order_.begin(), order_.end(), [this](int f) { return !flats_[f].has_grad; });
  if (zeroes && options_.replicate_grads && store_.world() > 1) {
    // Nothing has been reduced since the last step, so nothing says yet that the peers are done reading my slice.
    store_.groups().shard->barrier(store_.tag("zero_grads", -1, 0));
  }
  for (int f : order_) {
    FlatState& s = flats_[f];
    if (s.has_grad) continue;
    s.slice.zero_();
    s.stats.zero_();
    s.has_grad = true;
    leave(s);
  }
}

void GradReducer::add_replicas() {
  comm::Transport* replicas = store_.groups().replicate.get();
  if (replicas == nullptr) return;
  at::NoGradGuard no_grad;
  ensure_grads();
  for (int f : order_) {
    FlatState& s = flats_[f];
    const int64_t bytes = s.slice.numel() * 4;
    const at::Tensor mine = s.slice.cpu();
    at::Tensor all = at::empty({replicas->size(), s.slice.numel()}, mine.options());
    const comm::Tag t = store_.tag("reduce_replicas", store_.flats()[f].unit, bytes);
    replicas->all_gather_host(mine.data_ptr(), static_cast<size_t>(bytes), all.data_ptr(), t);
    all = all.to(s.slice.device());
    std::vector<const void*> srcs;
    for (int r = 0; r < replicas->size(); ++r) srcs.push_back(all[r].data_ptr());
    optim::reduce_sum(s.slice, srcs.data(), replicas->size(), DType::F32, 1.0f, false, s.stats);
    leave(s);
    note_changed(f);
  }
}

std::vector<double> GradReducer::reduce_stats() {
  at::NoGradGuard no_grad;
  ensure_grads();
  for (int f : order_) {
    FlatState& s = flats_[f];
    if (!std::exchange(s.edited, false)) continue;
    optim::sum_squares(s.slice, s.stats);
    leave(s);
  }
  at::Tensor host = at::zeros({3}, at::kDouble), device = at::zeros({2}, host.options().device(store_.device()));
  for (int f : order_) (flats_[f].stats.is_cpu() ? host.narrow(0, 0, 2) : device).add_(flats_[f].stats);
  host.narrow(0, 0, 2).add_(device.cpu());
  std::vector<double> values(host.data_ptr<double>(), host.data_ptr<double>() + 3);
  values[2] = has_carry() ? 1.0 : 0.0;
  if (values[1] > 0 && bad_.param < 0) {
    for (int f : order_) note_bad(f, nullptr, 0);
  }
  store_.groups().reduce->all_reduce(values.data(), 3, comm::Op::Sum, store_.tag("norm", -1, 24));
  return values;
}

void GradReducer::gather_grads() {
  if (!options_.replicate_grads || store_.world() == 1) return;
  std::vector<comm::SymmetricBuffer*> done;
  for (int f : order_) {
    comm::SymmetricBuffer* home = flats_[f].home.get();
    if (std::find(done.begin(), done.end(), home) != done.end()) continue;
    done.push_back(home);
    home->publish();
  }
  std::vector<std::shared_ptr<comm::Work>> works;
  for (int f : order_) {
    FlatState& s = flats_[f];
    const size_t part = static_cast<size_t>(s.slice.numel() * 4);
    works.push_back(store_.groups().shard->all_gather(s.full.data_ptr(), *s.home, static_cast<size_t>(s.home_offset), part, part,
                                                      store_.tag("gather_grads", store_.flats()[f].unit, static_cast<int64_t>(part))));
  }
  for (auto& w : works) w->wait();
}

void GradReducer::zero() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (host_sums_) host_sums_->drop();   // of a round that was broken off
  final_ = false;
  for (size_t f = 0; f < flats_.size(); ++f) {
    FlatState& s = flats_[f];
    note_changed(static_cast<int>(f));
    s.has_grad = s.edited = false;
    s.carry = at::Tensor();
    std::fill(s.required.begin(), s.required.end(), 0);
  }
  bad_ = {};
}

at::Tensor GradReducer::grad(int flat) { return flats_.at(flat).full; }

int64_t GradReducer::accumulator_bytes() const {
  int64_t total = 0;
  for (const FlatState& s : flats_) {
    if (s.full.defined()) total += s.full.numel() * 4;
  }
  return total;
}

}  // namespace ds::zero
