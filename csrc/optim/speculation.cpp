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
  begun_.clear();
  step_.reset();
}

void Speculation::begin(size_t slice, std::vector<at::Tensor> sources, std::function<void(const Foreseen&)> work) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<uint32_t> versions = versions_of(sources);
    begun_[slice] = {std::move(sources), std::move(versions)};
  }
  worker_.submit([this, work = std::move(work)] { work(*step_); });
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
  worker_.drain();
  for (const auto& [slice, begun] : begun_) {
    if (versions_of(begun.sources) == begun.versions) holding.push_back(slice);
  }
  drop();
  return holding;
}

}  // namespace ds::optim
