// SPDX-License-Identifier: Apache-2.0
// Optimizer state over the slices a rank owns, and the fused step over them.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "optim/hyper.h"
#include "optim/slice_rest.h"
#include "optim/speculation.h"
#include "optim/staging_ring.h"

namespace ds::optim {

enum class Kind { Adam, Lion, Adagrad, Sgd, Lamb };
Kind parse_kind(const std::string& name);

// A run of one parameter's elements inside a slice. `param` is any number that is the same on all ranks.
struct Segment {
  int64_t begin = 0;
  int64_t numel = 0;
  int group = 0;
  int64_t param = 0;
  int64_t missed = 0;   // updates that passed it over: its own number of the update is so much smaller
};

// Where a slice and what belongs to it lie, apart from plain memory of one device.
struct SliceHome {
  bool rests = false;             // states are made by the SliceRest
  bool weights_in_file = false;   // low, or else master, is a mapping of a file: unmapped again after each update
  bool weights_apart = false;     // low is not on the master's device
};

// What one step works on: the fp32 master values (which may be the parameter's own memory), and where a low-precision
// copy of the result goes (undefined: nowhere). Or, master being int16, split masters: low bits whose weights are `low`.
struct OwnedSlice {
  at::Tensor master;
  at::Tensor low;
  std::vector<Segment> segments;
  std::vector<at::Tensor> states;   // fp32, as long as master; meaning by kind, see state_names()
  std::vector<Segment> runs;        // neighbouring segments of one group, merged, padding between them included
  SliceHome home;
};

class SliceOptimizer {
 public:
  // Sums `norms` (two doubles a parameter) over all owners of slices; needed by kinds that look at whole parameters.
  using NormReducer = std::function<void(double* norms, int64_t count)>;

  // rest: where the states are made, and where masters may lie that it holds; null: memory. Not for kinds that look at whole parameters.
  SliceOptimizer(Kind kind, int64_t params, NormReducer reduce_norms, std::shared_ptr<SliceRest> rest = nullptr);

  int add_slice(at::Tensor master, at::Tensor low, std::vector<Segment> segments, SliceHome home = {});
  // States exist after this, zero before the first update.
  void ensure_states();
  // One update of every slice from its fp32 gradient times grad_scale. Kinds with two passes overwrite the gradient.
  // Parameters in `frozen` stay as they are, states and their own count of updates too. When a file fails in the middle some elements have been
  // updated and others have not: is_torn() from then on, and every later step throws.
  void step(const std::vector<Hyper>& groups, const std::vector<at::Tensor>& grads, float grad_scale,
            const std::vector<int64_t>& frozen = {});
  // Note [Speculative updates]. foresee(): the next step will probably be this one; speculate(): the slice's gradient is final; revoke(): it has
  // changed all the same; drop_speculation(): something else has. step() sees whether they were right. Only slices whose state has second places
  // are computed in advance, others wait for the step.
  void foresee(const std::vector<Hyper>& groups, float grad_scale);
  void speculate(size_t slice, const at::Tensor& grad);
  void revoke(size_t slice) { speculation_.revoke(slice); }
  void drop_speculation() { speculation_.drop(); }
  void wait_ahead() { speculation_.wait(); }
  int64_t speculated_steps() const { return speculated_; }   // slices that were ready when their step came, so far

  // {param: updates that passed it over}, where there were any.
  std::map<int64_t, int64_t> missed_steps() const;
  void set_missed_steps(const std::map<int64_t, int64_t>& missed);

  std::vector<std::string> state_names() const;
  std::vector<OwnedSlice>& slices() { return slices_; }
  bool is_torn() const { return torn_; }
  // All states and masters have been set anew.
  void set_whole() { torn_ = false; }
  Kind kind() const { return kind_; }
  int64_t state_bytes() const;

 private:
  void step_runs(const OwnedSlice& slice, const std::vector<Segment>& runs, const std::vector<Hyper>& groups, const at::Tensor& grad,
                 float grad_scale);
  void step_run(const OwnedSlice& slice, const Segment& run, const Hyper& h, const at::Tensor& grad, float grad_scale);
  void step_resting(const std::vector<size_t>& slices, const std::vector<Hyper>& groups, const std::vector<at::Tensor>& grads, float grad_scale);
  void leave(const OwnedSlice& slice, const at::Tensor& grad);
  SliceRest::Job job_of(const OwnedSlice& slice) const;
  OwnedSlice tile_of(const OwnedSlice& slice, int64_t begin, const std::vector<at::Tensor>& tile) const;
  void compute_ahead(const std::vector<Speculation::Ready>& slices, const Foreseen& step);
  void take_ahead(size_t slice);
  StagingRing& uploads(at::Device device);
  void step_staged(OwnedSlice& view, const std::vector<Hyper>& groups, const at::Tensor& grad, float grad_scale);
  bool pass_over(const std::vector<int64_t>& frozen);
  void step_lamb(const std::vector<Hyper>& groups, const std::vector<at::Tensor>& grads, float grad_scale);

  Kind kind_;
  int64_t params_;
  NormReducer reduce_norms_;
  std::shared_ptr<SliceRest> rest_;
  std::unique_ptr<StagingRing> uploads_;   // of updated weights, where these lie on another device
  bool torn_ = false;
  std::vector<int64_t> frozen_;   // of the last step, sorted
  std::vector<OwnedSlice> slices_;
  std::vector<at::Tensor> ahead_;   // by slice: what its weights become, while that is speculation
  int64_t speculated_ = 0;
  Speculation speculation_;   // the last member: its thread uses the others
};

}  // namespace ds::optim
