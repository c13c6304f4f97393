// SPDX-License-Identifier: Apache-2.0
// Masters, optimizer states and gradient slices that rest in the host's memory while the weights are on an accelerator.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "optim/slice_rest.h"

namespace ds::zero {

class HostRest : public optim::SliceRest {
 public:
  // pinned: the staging memory of transfers is page-locked. What rests here never is: the device does not see it.
  // second_places: arrays have them that ask for one.
  HostRest(bool pinned, int64_t tile_bytes, bool second_places = false)
      : pinned_(pinned), tile_bytes_(tile_bytes), second_places_(second_places), ranges_(std::make_shared<Ranges>()) {}

  at::Tensor zeros(int64_t numel, at::ScalarType dtype, bool second_place = false) override;
  bool holds(const at::Tensor& t) const override { return t.defined() && t.device().is_cpu() && find(t.data_ptr()).has_value(); }
  bool has_second_place(const at::Tensor& t) const override { return second_place_of(t).defined(); }
  void exchange(const at::Tensor& whole) override;
  bool apart() const override { return true; }
  bool pinned() const override { return pinned_; }
  void leave(const at::Tensor&) override {}
  void leave_all() override {}
  // Nothing is copied: a tile is a part of the arrays themselves, or of their second places, where the old values are copied first.
  void stream(const std::vector<Job>& jobs, const Work& work, Into into = Into::Place) override;
  int64_t bytes() const;   // second places too

 private:
  struct Range {
    const char* begin;
    int64_t bytes;    // mapped
    char* second;     // null: none
  };
  struct Ranges {
    std::mutex mutex;
    std::map<const char*, Range> by_address;
  };
  std::optional<Range> find(const void* data) const;
  at::Tensor second_place_of(const at::Tensor& t) const;

  const bool pinned_;
  const int64_t tile_bytes_;
  const bool second_places_;
  std::shared_ptr<Ranges> ranges_;
};

}  // namespace ds::zero
