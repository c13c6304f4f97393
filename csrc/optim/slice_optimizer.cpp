// SPDX-License-Identifier: Apache-2.0
#include "optim/slice_optimizer.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "base/error.h"
#include "kernels/optim/element.h"
#include "optim/device_ops.h"
#include "optim/long_lived.h"
#include "optim/split_master.h"
#include "plan/reserve.h"
#include "platform/memory.h"

namespace ds::optim {
namespace {

at::Tensor part(const at::Tensor& t, const Segment& s) { return t.defined() ? t.narrow(0, s.begin, s.numel) : t; }

bool contains(const std::vector<int64_t>& sorted, int64_t value) { return std::binary_search(sorted.begin(), sorted.end(), value); }

// Elementwise kinds do not care where a parameter ends; padding holds zeros and stays zero under each of them.
std::vector<Segment> merge_runs(const std::vector<Segment>& segments, const std::vector<int64_t>& frozen) {
  std::vector<Segment> runs;
  bool joined = false;   // the last run ends right before this segment
  for (const Segment& s : segments) {
    if (contains(frozen, s.param)) {
      joined = false;
      continue;
    }
    if (joined && runs.back().group == s.group && runs.back().missed == s.missed) {
      runs.back().numel = s.begin + s.numel - runs.back().begin;
    } else {
      runs.push_back(s);
    }
    joined = true;
  }
  return runs;
}

// What of a run lies in [begin, begin + numel), counted from there.
Segment within(const Segment& run, int64_t begin, int64_t numel) {
  Segment s = run;
  s.begin = std::max(run.begin, begin) - begin;
  s.numel = std::min(run.begin + run.numel, begin + numel) - begin - s.begin;
  return s;
}

Hyper counted_for(Hyper h, const Segment& s) {
  h.step -= s.missed;
  return h;
}

}  // namespace

Kind parse_kind(const std::string& name) {
  if (name == "adam") return Kind::Adam;
  if (name == "lion") return Kind::Lion;
  if (name == "adagrad") return Kind::Adagrad;
  if (name == "sgd") return Kind::Sgd;
  if (name == "lamb") return Kind::Lamb;
  DS_FAIL_VALUE("no fused step for optimizer '" << name << "'; known: adam, lion, adagrad, sgd, lamb");
}

SliceOptimizer::SliceOptimizer(Kind kind, int64_t params, NormReducer reduce_norms, std::shared_ptr<SliceRest> rest)
    : kind_(kind), params_(params), reduce_norms_(std::move(reduce_norms)), rest_(std::move(rest)),
      speculation_([this](const auto& slices, const Foreseen& step) { compute_ahead(slices, step); }) {
  DS_CHECK_VALUE(!(rest_ && kind_ == Kind::Lamb), "LAMB looks at whole parameters: its state cannot rest in a file");
}

std::vector<std::string> SliceOptimizer::state_names() const {
  switch (kind_) {
    case Kind::Adam:
    case Kind::Lamb: return {"exp_avg", "exp_avg_sq"};
    case Kind::Lion: return {"exp_avg"};
    case Kind::Adagrad: return {"exp_avg_sq"};
    case Kind::Sgd: return {"momentum_buffer"};
  }
  DS_FAIL("not an optimizer kind");
}

int SliceOptimizer::add_slice(at::Tensor master, at::Tensor low, std::vector<Segment> segments, SliceHome home) {
  if (is_split(master)) {
    DS_CHECK_VALUE(kind_ != Kind::Lamb, "LAMB looks at whole parameters: its masters cannot be split");
    DS_CHECK(low.defined() && low.scalar_type() == at::kBFloat16 && low.sizes() == master.sizes(), "the low bits of a slice lie beside bfloat16 weights");
  }
  DS_CHECK((is_split(master) || master.scalar_type() == at::kFloat) && master.dim() == 1, "a master slice must be one-dimensional float32 or int16");
  for (const Segment& s : segments) {
    DS_CHECK(s.begin >= 0 && s.begin + s.numel <= master.numel(),
             "segment [" << s.begin << ", +" << s.numel << ") outside a slice of " << master.numel());
    DS_CHECK(s.param >= 0 && s.param < params_, "segment of parameter " << s.param << " but there are " << params_);
  }
  OwnedSlice slice;
  slice.master = std::move(master);
  slice.low = std::move(low);
  slice.runs = merge_runs(segments, frozen_);
  slice.segments = std::move(segments);
  DS_CHECK(!home.rests || rest_, "a slice is to rest where there is no rest");
  slice.home = home;
  slices_.push_back(std::move(slice));
  return static_cast<int>(slices_.size()) - 1;
}

void SliceOptimizer::ensure_states() {
  for (OwnedSlice& slice : slices_) {
    if (!slice.states.empty()) continue;
    std::vector<at::Tensor> states;
    for (size_t i = 0; i < state_names().size(); ++i) {
      states.push_back(slice.home.rests ? rest_->zeros(slice.master.numel(), at::kFloat, /*second_place=*/true)
                             : long_lived_zeros(slice.master.numel(), at::kFloat, slice.master.device()));
    }
    slice.states = std::move(states);
  }
}

// Runs are made anew only when another set of parameters is frozen; else true.
bool SliceOptimizer::pass_over(const std::vector<int64_t>& frozen) {
  std::vector<int64_t> now = frozen;
  std::sort(now.begin(), now.end());
  const bool changed = now != frozen_;
  frozen_ = std::move(now);
  for (OwnedSlice& slice : slices_) {
    if (changed) slice.runs = merge_runs(slice.segments, frozen_);
    if (frozen_.empty()) continue;
    for (Segment& s : slice.segments) s.missed += contains(frozen_, s.param);
  }
  return !changed;
}

std::map<int64_t, int64_t> SliceOptimizer::missed_steps() const {
  std::map<int64_t, int64_t> result;
  for (const OwnedSlice& slice : slices_) {
    for (const Segment& s : slice.segments) {
      if (s.missed > 0) result[s.param] = s.missed;
    }
  }
  return result;
}

void SliceOptimizer::set_missed_steps(const std::map<int64_t, int64_t>& missed) {
  speculation_.drop();
  for (OwnedSlice& slice : slices_) {
    for (Segment& s : slice.segments) {
      const auto found = missed.find(s.param);
      s.missed = found == missed.end() ? 0 : found->second;
    }
    slice.runs = merge_runs(slice.segments, frozen_);
  }
}

void SliceOptimizer::step(const std::vector<Hyper>& groups, const std::vector<at::Tensor>& grads, float grad_scale,
                          const std::vector<int64_t>& frozen) {
  DS_CHECK(grads.size() == slices_.size(), "step: " << grads.size() << " gradients for " << slices_.size() << " slices");
  DS_CHECK(!torn_, "an earlier update failed in the middle: load a checkpoint before the next one");
  at::NoGradGuard no_grad;
  ensure_states();
  const std::vector<size_t> ahead = speculation_.settle(groups, grad_scale);
  const bool same_runs = pass_over(frozen);
  if (kind_ == Kind::Lamb) {
    step_lamb(groups, grads, grad_scale);
    return;
  }
  std::vector<size_t> resting;
  for (size_t i = 0; i < slices_.size(); ++i) {
    const OwnedSlice& slice = slices_[i];
    if (same_runs && std::binary_search(ahead.begin(), ahead.end(), i)) {
      take_ahead(i);
      continue;
    }
    if (slice.home.rests) {
      resting.push_back(i);
      continue;
    }
    step_runs(slice, slice.runs, groups, grads[i], grad_scale);
    leave(slice, grads[i]);
  }
  if (!resting.empty()) step_resting(resting, groups, grads, grad_scale);
}

void SliceOptimizer::step_runs(const OwnedSlice& slice, const std::vector<Segment>& runs, const std::vector<Hyper>& groups, const at::Tensor& grad,
                               float grad_scale) {
  for (const Segment& run : runs) step_run(slice, run, counted_for(groups.at(run.group), run), grad, grad_scale);
}

// The same update, tile by tile: an element's result does not depend on where a tile ends.
void SliceOptimizer::step_resting(const std::vector<size_t>& slices, const std::vector<Hyper>& groups, const std::vector<at::Tensor>& grads,
                                  float grad_scale) {
  std::vector<SliceRest::Job> jobs;
  for (size_t i : slices) jobs.push_back(job_of(slices_[i]));
  torn_ = true;   // until all is done
  rest_->stream(jobs, [&](size_t number, int64_t begin, const std::vector<at::Tensor>& tile) {
    const size_t i = slices[number];
    const OwnedSlice& slice = slices_[i];
    OwnedSlice view = tile_of(slice, begin, tile);
    const at::Tensor grad = grads[i].narrow(0, begin, view.master.numel());
    if (slice.home.weights_apart) {
      step_staged(view, groups, grad, grad_scale);
    } else {
      step_runs(view, view.runs, groups, grad, grad_scale);
    }
    leave(view, grad);
  });
  torn_ = false;
}

SliceRest::Job SliceOptimizer::job_of(const OwnedSlice& slice) const {
  SliceRest::Job job;
  if (rest_->holds(slice.master)) job.arrays.push_back(slice.master);
  job.arrays.insert(job.arrays.end(), slice.states.begin(), slice.states.end());
  job.write.assign(job.arrays.size(), true);
  return job;
}

// What of the slice lies in a tile of its job, counted from there.
OwnedSlice SliceOptimizer::tile_of(const OwnedSlice& slice, int64_t begin, const std::vector<at::Tensor>& tile) const {
  const int64_t numel = tile.front().numel();
  const auto cut = [&](const at::Tensor& t) { return t.defined() ? t.narrow(0, begin, numel) : t; };
  const bool has_master = tile.size() > slice.states.size();
  OwnedSlice view;
  view.master = has_master ? tile.front() : cut(slice.master);
  view.low = cut(slice.low);
  view.home = slice.home;
  view.states.assign(tile.begin() + (has_master ? 1 : 0), tile.end());
  for (const Segment& run : slice.runs) {
    const Segment part = within(run, begin, numel);
    if (part.numel > 0) view.runs.push_back(part);
  }
  return view;
}

void SliceOptimizer::foresee(const std::vector<Hyper>& groups, float grad_scale) {
  if (!rest_ || torn_) return;
  ahead_.resize(slices_.size());
  speculation_.foresee({groups, grad_scale});
}

void SliceOptimizer::speculate(size_t i, const at::Tensor& grad) {
  const OwnedSlice& slice = slices_.at(i);
  if (!speculation_.active() || !slice.home.rests || slice.states.empty() || slice.master.numel() == 0) return;
  const SliceRest::Job job = job_of(slice);
  if (!std::all_of(job.arrays.begin(), job.arrays.end(), [this](const at::Tensor& t) { return rest_->has_second_place(t); })) return;
  if (!ahead_[i].defined()) ahead_[i] = rest_->zeros(slice.master.numel(), (slice.low.defined() ? slice.low : slice.master).scalar_type());
  std::vector<at::Tensor> sources = slice.states;
  sources.insert(sources.end(), {slice.master, slice.low});
  speculation_.begin({i, grad}, std::move(sources));
}

void SliceOptimizer::compute_ahead(const std::vector<Speculation::Ready>& slices, const Foreseen& step) {
  at::NoGradGuard no_grad;
  std::vector<SliceRest::Job> jobs;
  for (const Speculation::Ready& ready : slices) jobs.push_back(job_of(slices_[ready.slice]));
  rest_->stream(jobs, [&](size_t number, int64_t begin, const std::vector<at::Tensor>& tile) {
    const auto& [i, grad] = slices[number];
    OwnedSlice view = tile_of(slices_[i], begin, tile);
    const at::Tensor weights = ahead_[i].narrow(0, begin, view.master.numel()), part_grad = grad.narrow(0, begin, view.master.numel());
    const at::Tensor old = !view.low.defined() ? view.master : is_split(view.master) ? view.low : at::Tensor();   // where the update begins from weights
    if (old.defined()) weights.copy_(old);
    (view.low.defined() ? view.low : view.master) = weights;
    step_runs(view, view.runs, step.groups, part_grad, step.grad_scale);
    rest_->leave(weights);
    if (old.defined() && view.home.weights_in_file) platform::unmap_pages(old.data_ptr(), old.nbytes());
    if (rest_->holds(part_grad)) rest_->leave(part_grad);
  }, SliceRest::Into::Second);
}

// The slice becomes what was computed.
void SliceOptimizer::take_ahead(size_t i) {
  const OwnedSlice& slice = slices_[i];
  const at::Tensor& weights = slice.low.defined() ? slice.low : slice.master;
  torn_ = true;   // until all is done
  for (const at::Tensor& array : job_of(slice).arrays) rest_->exchange(array);
  if (slice.home.weights_apart) {
    for (const Segment& run : slice.runs) uploads(slice.low.device()).send(part(slice.low, run), part(ahead_[i], run));
  } else {
    for (const Segment& run : slice.runs) part(weights, run).copy_(part(ahead_[i], run));
  }
  rest_->leave(ahead_[i]);
  leave(slice, at::Tensor());
  torn_ = false;
  ++speculated_;
}

// The weights are elsewhere: they are made in staging memory, and sent while the next tile is worked on.
void SliceOptimizer::step_staged(OwnedSlice& view, const std::vector<Hyper>& groups, const at::Tensor& grad, float grad_scale) {
  const at::Tensor remote = view.low;
  StagingBuffer& buffer = uploads(remote.device()).take();
  view.low = buffer.memory(static_cast<int64_t>(remote.nbytes())).view(remote.scalar_type());
  if (is_split(view.master)) {   // half of the values is there
    for (const Segment& run : view.runs) part(view.low, run).copy_(part(remote, run));
  }
  step_runs(view, view.runs, groups, grad, grad_scale);
  for (const Segment& run : view.runs) part(remote, run).copy_(part(view.low, run), /*non_blocking=*/true);
  buffer.mark();
}

StagingRing& SliceOptimizer::uploads(at::Device device) {
  if (!uploads_) uploads_ = std::make_unique<StagingRing>(device, rest_->pinned(), plan::kWeightBuffers);
  return *uploads_;
}

// What the update touched of files that are mapped leaves memory.
void SliceOptimizer::leave(const OwnedSlice& slice, const at::Tensor& grad) {
  const at::Tensor& weights = slice.low.defined() ? slice.low : slice.master;
  if (slice.home.weights_in_file) platform::unmap_pages(weights.data_ptr(), weights.nbytes());
  if (rest_ && rest_->holds(grad)) rest_->leave(grad);
}

void SliceOptimizer::step_run(const OwnedSlice& slice, const Segment& run, const Hyper& h, const at::Tensor& grad, float grad_scale) {
  const at::Tensor p = part(slice.master, run), g = part(grad, run), low = part(slice.low, run);
  const at::Tensor s0 = part(slice.states[0], run);
  switch (kind_) {
    case Kind::Adam:
      adam({h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, h.decoupled, h.bias_correction, h.step}, grad_scale, p, g, s0,
           part(slice.states[1], run), low);
      return;
    case Kind::Lion: lion({h.lr, h.beta1, h.beta2, h.weight_decay}, grad_scale, p, g, s0, low); return;
    case Kind::Adagrad: adagrad({h.lr, h.eps, h.weight_decay}, grad_scale, p, g, s0, low); return;
    case Kind::Sgd:
      sgd({h.lr, h.momentum, h.dampening, h.weight_decay, h.nesterov, h.step == 1}, grad_scale, p, g, s0, low);
      return;
    case Kind::Lamb: break;
  }
  DS_FAIL("LAMB steps whole parameters");
}

// The trust ratio needs the norms of whole parameters, which may lie on several ranks: directions first, then one
// reduction of all norms, then the update. The direction overwrites the gradient, which nobody reads after the step.
void SliceOptimizer::step_lamb(const std::vector<Hyper>& groups, const std::vector<at::Tensor>& grads, float grad_scale) {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  at::Tensor norms = at::zeros({params_, 2}, slices_.empty() ? options : options.device(slices_[0].master.device()));
  for (size_t i = 0; i < slices_.size(); ++i) {
    OwnedSlice& slice = slices_[i];
    for (const Segment& s : slice.segments) {
      if (contains(frozen_, s.param)) continue;
      const Hyper h = counted_for(groups.at(s.group), s);
      const at::Tensor g = part(grads[i], s);
      lamb_direction({h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, h.bias_correction, h.step, h.eps_inside_sqrt}, grad_scale,
                     part(slice.master, s), g, part(slice.states[0], s), part(slice.states[1], s), g, norms[s.param]);
    }
  }
  at::Tensor host = norms.cpu().contiguous();
  reduce_norms_(host.data_ptr<double>(), host.numel());
  const double* values = host.data_ptr<double>();
  for (size_t i = 0; i < slices_.size(); ++i) {
    OwnedSlice& slice = slices_[i];
    for (const Segment& s : slice.segments) {
      if (contains(frozen_, s.param)) continue;
      const Hyper h = counted_for(groups.at(s.group), s);
      const double ratio = kernels::trust_ratio(values + 2 * s.param, {h.lr, h.min_coeff, h.max_coeff});
      lamb_apply(static_cast<float>(h.lr * ratio), part(slice.master, s), part(grads[i], s), part(slice.low, s));
    }
  }
}

int64_t SliceOptimizer::state_bytes() const {
  int64_t total = 0;
  for (const OwnedSlice& slice : slices_) {
    for (const at::Tensor& t : slice.states) total += t.numel() * static_cast<int64_t>(t.element_size());
  }
  return total;
}

}  // namespace ds::optim
