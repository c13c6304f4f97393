// SPDX-License-Identifier: Apache-2.0
// Masters, optimizer states and gradient slices that rest in a file of this rank.
#pragma once

#include <memory>

#include "offload/tier_file.h"
#include "offload/tile_stream.h"
#include "optim/slice_rest.h"
#include "plan/resting.h"
#include "zero/host_rest.h"

namespace ds::zero {

class FileRest : public optim::SliceRest {
 public:
  // apart: the weights are on an accelerator.
  // second_places: arrays have them that ask for one. most_in_memory: elements that lie in memory all the same, as long as they fit; these have none and
  // cannot be streamed.
  FileRest(std::shared_ptr<offload::TierFile> file, const offload::StreamOptions& options, bool apart, bool pinned, bool second_places,
           int64_t most_in_memory = 0)
      : file_(std::move(file)), options_(options), stream_(file_->engine(), options), apart_(apart), pinned_(pinned), second_places_(second_places),
        in_memory_(most_in_memory), memory_(pinned, options.tile_bytes) {}

  at::Tensor zeros(int64_t numel, at::ScalarType dtype, bool second_place = false) override;
  bool has_second_place(const at::Tensor& t) const override { return file_->second_place_of(t.data_ptr()).has_value(); }
  void exchange(const at::Tensor& whole) override { file_->exchange(whole.data_ptr()); }
  bool holds(const at::Tensor& t) const override { return in_file(t) || memory_.holds(t); }
  bool in_file(const at::Tensor& t) const override { return t.defined() && t.device().is_cpu() && file_->offset_of(t.data_ptr()).has_value(); }
  bool apart() const override { return apart_; }
  bool pinned() const override { return pinned_; }
  void expect(const at::Tensor& t) override;
  void leave(const at::Tensor& t) override;
  void leave_all() override { file_->leave_all(); }
  void stream(const std::vector<Job>& jobs, const Work& work, Into into = Into::Place) override;

  void set_aside(int64_t bytes) { file_->set_aside(bytes); }
  const offload::TierFile& file() const { return *file_; }
  int64_t buffer_bytes() const { return stream_.buffer_bytes(); }   // now
  int64_t stream_bytes() const { return kMostArrays * options_.buffers * options_.tile_bytes; }   // at most

 private:
  static constexpr int64_t kMostArrays = 3;   // a master and two states

  std::shared_ptr<offload::TierFile> file_;
  const offload::StreamOptions options_;
  offload::TileStream stream_;
  const bool apart_, pinned_, second_places_;
  plan::MemoryQuota in_memory_;
  HostRest memory_;
};

}  // namespace ds::zero
