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
  step_ = std::move(step);
}

void Speculation::drop() {
  worker_.drop();
  const std::lock_guard<std::mutex> lock(mutex_);
  ready_.clear();
  begun_.clear();
  step_.reset();
}

void Speculation::begin(const Ready& ready, std::vector<at::Tensor> sources) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<uint32_t> versions = versions_of(sources);
    begun_[ready.slice] = {std::move(sources), std::move(versions)};
    ready_.push_back(ready);
  }
  worker_.submit([this] { work(); });
}

void Speculation::work() {
  std::vector<Ready> ready;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ready.swap(ready_);
  }
  if (!ready.empty()) work_(ready, *step_);   // else an earlier task has taken it along
}

void Speculation::revoke(size_t slice) {
  const std::lock_guard<std::mutex> lock(mutex_);
  begun_.erase(slice);
}

std::vector<size_t> Speculation::settle(const std::vector<Hyper>& groups, float grad_scale) {
  std::vector<size_t> holding;
  if (!step_) return holding;
  if (step_->grad_scale != grad_scale || step_->groups != groups) {
    drop();
    return holding;
  }
  wait();
  for (const auto& [slice, begun] : begun_) {
    if (versions_of(begun.sources) == begun.versions) holding.push_back(slice);
  }
  drop();
  return holding;
}

}  // namespace ds::optim
