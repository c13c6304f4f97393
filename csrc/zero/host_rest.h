// SPDX-License-Identifier: Apache-2.0
// Masters, optimizer states and gradient slices that rest in the host's memory while the weights are on an accelerator.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "optim/slice_rest.h"

namespace ds::zero {

class HostRest : public optim::SliceRest {
 public:
  // pinned: the staging memory of transfers is page-locked. What rests here never is: the device does not see it.
  HostRest(bool pinned, int64_t tile_bytes) : pinned_(pinned), tile_bytes_(tile_bytes), ranges_(std::make_shared<Ranges>()) {}

  at::Tensor zeros(int64_t numel, at::ScalarType dtype) override;
  bool holds(const at::Tensor& t) const override;
  bool apart() const override { return true; }
  bool pinned() const override { return pinned_; }
  void leave(const at::Tensor&) override {}
  void leave_all() override {}
  // Nothing is copied: a tile is a part of the arrays themselves.
  void stream(const std::vector<Job>& jobs, const Work& work) override;
  int64_t bytes() const;

 private:
  struct Ranges {
    std::mutex mutex;
    std::map<const char*, int64_t> bytes;   // by address
  };
  const bool pinned_;
  const int64_t tile_bytes_;
  std::shared_ptr<Ranges> ranges_;
};

}  // namespace ds::zero
