// SPDX-License-Identifier: Apache-2.0
#include "optim/speculation.h"

#include <utility>

namespace ds::optim {
namespace {

std::vector<uint32_t> versions_of(const std::vector<at::Tensor>& tensors) {
  std::vector<uint32_t> versions;
  for (const at::Tensor& t : tensors) versions.push_back(t.defined() ? t._version() : 0);
  return versions;
}

}  // namespace

void Speculation::foresee(Foreseen step) {
  drop();
  const std::lock_guard<std::mutex> lock(mutex_);
  step_ = std::make_shared<const Foreseen>(std::move(step));
}

// First nothing more can begin, whoever still announces slices of a backward that was broken off.
void Speculation::drop() {
  std::vector<Ready> ready;   // destroyed without the lock, as what has begun
  std::map<size_t, Begun> begun;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    step_.reset();
    ready.swap(ready_);
    begun.swap(begun_);
  }
  worker_.drop();
}

bool Speculation::active() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return step_ != nullptr;
}

void Speculation::begin(const Ready& ready, std::vector<at::Tensor> sources) {
  sources.push_back(ready.grad);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (step_ == nullptr) return;
    std::vector<uint32_t> versions = versions_of(sources);
    begun_[ready.slice] = {std::move(sources), std::move(versions)};
    ready_.push_back(ready);
  }
  worker_.submit([this] { work(); });
}

void Speculation::work() {
  std::vector<Ready> ready;
  std::shared_ptr<const Foreseen> step;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ready.swap(ready_);
    step = step_;
  }
  if (!ready.empty()) work_(ready, *step);   // else an earlier task has taken it along
}

void Speculation::revoke(size_t slice) {
  const std::lock_guard<std::mutex> lock(mutex_);
  begun_.erase(slice);
}

std::vector<size_t> Speculation::settle(const std::vector<Hyper>& groups, float grad_scale) {
  std::vector<size_t> holding;
  if (!active()) return holding;
  if (step_->grad_scale == grad_scale && step_->groups == groups) {
    wait();
    for (const auto& [slice, begun] : begun_) {
      if (versions_of(begun.sources) == begun.versions) holding.push_back(slice);
    }
  }
  drop();
  return holding;
}

}  // namespace ds::optim
