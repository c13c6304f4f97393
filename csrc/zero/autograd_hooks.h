// SPDX-License-Identifier: Apache-2.0
// What runs inside backward: hooks on gradient accumulators and on the graph nodes at unit borders, all in C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "zero/grad_reducer.h"
#include "zero/unit_scheduler.h"

namespace ds::zero {

// Shared by all hooks. Graphs may outlive the engine; `closed` turns their hooks into no-ops.
struct BackwardContext : std::enable_shared_from_this<BackwardContext> {
  ParamStore* store = nullptr;
  GradReducer* reducer = nullptr;      // null: nothing is trained
  UnitScheduler* scheduler = nullptr;
  bool closed = false;
  bool manual_end = false;             // somebody calls end() after the backward returns
  bool end_queued = false;
  bool failed = false;                 // a hook of ours has thrown in this backward

  // The backward is over: reduce what is left, free what is gathered.
  // force: also when this rank has had no gradient.
  void end(bool force = false);
  // Called at the start of a backward: makes sure that end() will run when the outermost one finishes.
  void arrange_end();
  template <class Hook>
  void guarded(const Hook& hook) {
    try {
      hook();
    } catch (...) {
      failed = true;
      throw;
    }
  }
};

class AutogradHooks {
 public:
  AutogradHooks(ParamStore& store, GradReducer* reducer, UnitScheduler& scheduler);
  ~AutogradHooks();
  AutogradHooks(const AutogradHooks&) = delete;

  // On every trainable parameter's gradient accumulator; again before a forward, since torch makes a new accumulator for a
  // parameter whose data changed its dtype or device, even if it has changed back.
  void watch_parameters();
  // Outputs of a module that uses `units`: their backward needs these units gathered.
  void watch_outputs(const std::vector<int>& units, const std::vector<at::Tensor>& outputs);
  // Inputs of the module: when the gradient reaches their producer, the units' backward is over.
  void watch_inputs(const std::vector<int>& units, const std::vector<at::Tensor>& inputs);
  // Outputs of the outermost module: the backward starts there.
  void watch_root(const std::vector<at::Tensor>& outputs);

  // Between begin_manual() and end_backward() the caller promises the latter, so no callback is queued.
  void begin_manual();
  void end_backward();
  // A backward has thrown midway; never throws. With `finish` the round ends as it would have, zeros standing for gradients that did not come: the other
  // ranks, whose backward may go on, get what they wait for. Not so before the first of our hooks has run, nor when one of them failed, or the end
  // does: then this rank forgets the round.
  void abort_backward(bool finish);
  void close();

 private:
  struct Accumulator {
    int param;
    std::shared_ptr<void> node;
    uintptr_t key = 0;
  };
  std::shared_ptr<BackwardContext> context_;
  std::vector<Accumulator> accumulators_;
};

}  // namespace ds::zero
