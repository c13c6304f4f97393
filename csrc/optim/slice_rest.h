// SPDX-License-Identifier: Apache-2.0
// Where slices of optimizer state rest between steps when that is not plain memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace ds::optim {

class SliceRest {
 public:
  // Contiguous one-dimensional tensors of equal length; those with `write` come back changed.
  struct Job {
    std::vector<at::Tensor> arrays;
    std::vector<bool> write;
  };
  // tile[i]: the elements [begin, begin + tile[i].numel()) of the job's array i, in memory, for as long as the call lasts.
  using Work = std::function<void(size_t job, int64_t begin, const std::vector<at::Tensor>& tile)>;

  virtual ~SliceRest() = default;
  // Zero-filled, one-dimensional. It can be read and written as any other tensor; leave() ends that.
  virtual at::Tensor zeros(int64_t numel, at::ScalarType dtype) = 0;
  virtual bool holds(const at::Tensor& t) const = 0;
  // It lies in the host's memory and the weights do not: what passes between them goes through a StagingRing, pinned or not.
  virtual bool apart() const { return false; }
  virtual bool pinned() const { return false; }
  // It will be read through the tensor soon.
  virtual void expect(const at::Tensor&) {}
  // What was touched through such a tensor takes no memory of this process any more. Its values stay.
  virtual void leave(const at::Tensor& t) = 0;
  virtual void leave_all() = 0;
  // Takes every job's arrays, which it holds, through memory in order. When it throws, some tiles are as they were and others changed.
  virtual void stream(const std::vector<Job>& jobs, const Work& work) = 0;
};

}  // namespace ds::optim
