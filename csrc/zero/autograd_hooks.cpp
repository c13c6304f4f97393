// SPDX-License-Identifier: Apache-2.0
#include "zero/autograd_hooks.h"

#include <algorithm>
#include <utility>

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include "base/error.h"

namespace ds::zero {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

// Runs after a parameter's gradient has been accumulated. The gradient is moved out at once: `.grad` never holds a
// full-size tensor longer than this call.
class GradientDone : public torch::autograd::FunctionPostHook {
 public:
  GradientDone(std::shared_ptr<BackwardContext> context, int param, at::Tensor tensor)
      : context_(std::move(context)), param_(param), tensor_(std::move(tensor)) {}

  variable_list operator()(const variable_list& outputs, const variable_list&) override {
    if (context_->closed || !tensor_.mutable_grad().defined()) return outputs;
    // Also when what follows throws: a gradient that stays would be added to the next one.
    const at::Tensor grad = std::exchange(tensor_.mutable_grad(), at::Tensor());
    context_->guarded([&] {
      context_->arrange_end();
      context_->reducer->on_grad(param_, grad);
    });
    return outputs;
  }

 private:
  std::shared_ptr<BackwardContext> context_;
  int param_;
  at::Tensor tensor_;
};

class BorderHook : public torch::autograd::FunctionPreHook {
 public:
  enum Kind { UnitOutput, UnitInput, Root };
  BorderHook(std::shared_ptr<BackwardContext> context, Kind kind, std::vector<int> units)
      : context_(std::move(context)), kind_(kind), units_(std::move(units)) {}

  bool same(const std::shared_ptr<BackwardContext>& context, Kind kind, const std::vector<int>& units) const {
    return context == context_ && kind == kind_ && units == units_;
  }

  variable_list operator()(const variable_list& grads) override {
    if (context_->closed) return grads;
    context_->guarded([&] { cross(); });
    return grads;
  }

 private:
  void cross() {
    switch (kind_) {
      case Root:
        context_->arrange_end();
        break;
      case UnitOutput:
        context_->arrange_end();
        // create_graph: the gradient's own graph saves weights too, and no module's outputs lead to it.
        if (at::GradMode::is_enabled()) context_->scheduler->keep();
        for (int u : units_) context_->scheduler->enter_backward(u);
        break;
      case UnitInput:
        for (int u : units_) context_->scheduler->leave_backward(u);
        break;
    }
  }

  std::shared_ptr<BackwardContext> context_;
  Kind kind_;
  std::vector<int> units_;
};

void hook_nodes(const std::shared_ptr<BackwardContext>& context, BorderHook::Kind kind, const std::vector<int>& units,
                const std::vector<at::Tensor>& tensors) {
  std::vector<Node*> seen;
  for (const at::Tensor& t : tensors) {
    std::shared_ptr<Node> node = t.grad_fn();
    // The input of a recomputed segment is a leaf: its accumulator runs when the segment's backward is over.
    if (!node && kind == BorderHook::UnitInput && t.requires_grad()) node = torch::autograd::impl::grad_accumulator(t);
    if (!node || std::find(seen.begin(), seen.end(), node.get()) != seen.end()) continue;
    seen.push_back(node.get());
    const auto& hooks = node->pre_hooks();  // a tensor that a module keeps is met again at its next forward
    if (std::any_of(hooks.begin(), hooks.end(), [&](const auto& hook) {
          const auto* ours = dynamic_cast<const BorderHook*>(hook.get());
          return ours != nullptr && ours->same(context, kind, units);
        }))
      continue;
    auto hook = std::make_unique<BorderHook>(context, kind, units);
    if (kind == BorderHook::UnitInput) {
      // One module's input is often another's output, maybe of the same unit: leave first, then enter.
      node->pre_hooks().insert(node->pre_hooks().begin(), std::move(hook));
    } else {
      node->add_pre_hook(std::move(hook));
    }
  }
}

}  // namespace

void BackwardContext::arrange_end() {
  if (end_queued) return;
  end_queued = true;
  scheduler->begin_backward();
  if (manual_end) return;
  // A nested backward (reentrant checkpointing) ends before the outer one does. Usually the hook on the root's output
  // gets here first, in the outermost backward. Otherwise the round ends with the nested one and what follows starts
  // another round: slower, the same sum.
  torch::autograd::Engine::get_default_engine().queue_callback([self = shared_from_this()] { self->end(); });
}

void BackwardContext::end(bool force) {
  end_queued = false;
  manual_end = false;
  if (closed) return;
  if (reducer != nullptr && !reducer->deferred()) {
    scheduler->start_rest();
    reducer->flush(force && store->world() > 1);
  }
  scheduler->end_backward();
}

AutogradHooks::AutogradHooks(ParamStore& store, GradReducer* reducer, UnitScheduler& scheduler)
    : context_(std::make_shared<BackwardContext>()) {
  context_->store = &store;
  context_->reducer = reducer;
  context_->scheduler = &scheduler;
}

AutogradHooks::~AutogradHooks() { close(); }

void AutogradHooks::watch_parameters() {
  DS_CHECK(context_->reducer != nullptr, "watch_parameters needs a reducer");
  if (accumulators_.empty()) {
    for (size_t i = 0; i < context_->store->params().size(); ++i) {
      const Param& p = context_->store->params()[i];
      if (p.dropped || !context_->store->flats()[p.flat].trainable) continue;
      DS_CHECK(p.tensor.requires_grad(), "parameter '" << p.name << "' does not require a gradient");
      accumulators_.push_back({static_cast<int>(i), nullptr, 0});
    }
  }
  for (Accumulator& a : accumulators_) {
    const Param& p = context_->store->params()[a.param];
    if (p.dropped) continue;
    std::shared_ptr<Node> node = torch::autograd::impl::grad_accumulator(p.tensor);
    if (node == nullptr || node == a.node) continue;  // null: frozen by now
    if (a.node != nullptr) static_cast<Node*>(a.node.get())->del_post_hook(a.key);
    a.key = node->add_post_hook(std::make_unique<GradientDone>(context_, a.param, p.tensor));
    a.node = std::move(node);
  }
}

void AutogradHooks::watch_outputs(const std::vector<int>& units, const std::vector<at::Tensor>& outputs) {
  hook_nodes(context_, BorderHook::UnitOutput, units, outputs);
}

void AutogradHooks::watch_inputs(const std::vector<int>& units, const std::vector<at::Tensor>& inputs) {
  hook_nodes(context_, BorderHook::UnitInput, units, inputs);
}

void AutogradHooks::watch_root(const std::vector<at::Tensor>& outputs) { hook_nodes(context_, BorderHook::Root, {}, outputs); }

void AutogradHooks::begin_manual() {
  context_->failed = false;
  context_->manual_end = true;
  context_->end_queued = false;
}

void AutogradHooks::end_backward() {
  context_->guarded([this] { context_->end(); });
}

void AutogradHooks::abort_backward(bool finish) {
  const bool begun = std::exchange(context_->end_queued, false);
  context_->manual_end = false;
  if (context_->closed) return;
  for (const Accumulator& a : accumulators_) {   // what somebody else's hook has kept ours from taking
    const Param& p = context_->store->params()[a.param];
    if (!p.dropped) p.tensor.mutable_grad().reset();
  }
  if (finish && begun && !context_->failed) {
    try {
      context_->end(/*force=*/true);
      return;
    } catch (const std::exception&) {   // the first error is on its way to the caller already
    }
  }
  if (context_->reducer != nullptr) context_->reducer->abandon();
}

void AutogradHooks::close() {
  if (context_->closed) return;
  context_->closed = true;
  for (Accumulator& a : accumulators_)
    if (a.node != nullptr) static_cast<Node*>(a.node.get())->del_post_hook(a.key);
  accumulators_.clear();
}

}  // namespace ds::zero
