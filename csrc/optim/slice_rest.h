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

  // Where stream() puts what the work has changed.
  enum class Into { Place, Second };

  virtual ~SliceRest() = default;
  // Zero-filled, one-dimensional. It can be read and written as any other tensor; leave() ends that.
  // second_place: stream() can write elsewhere than into its values, if there is room for that (see has_second_place()).
  virtual at::Tensor zeros(int64_t numel, at::ScalarType dtype, bool second_place = false) = 0;
  virtual bool has_second_place(const at::Tensor&) const { return false; }
  // What stream() has put into the second place becomes the array's values. No byte moves. `whole`: an array as zeros() gave it.
  virtual void exchange(const at::Tensor& whole) = 0;
  virtual bool holds(const at::Tensor& t) const = 0;
  // It is a mapping of a file.
  virtual bool in_file(const at::Tensor&) const { return false; }
  // It lies in the host's memory and the weights do not: what passes between them goes through a StagingRing, pinned or not.
  virtual bool apart() const { return false; }
  virtual bool pinned() const { return false; }
  // It will be read through the tensor soon.
  virtual void expect(const at::Tensor&) {}
  // What was touched through such a tensor takes no memory of this process any more. Its values stay.
  virtual void leave(const at::Tensor& t) = 0;
  virtual void leave_all() = 0;
  // Takes every job's arrays, which it holds, through memory in order. When it throws, some tiles are as they were and others changed.
  // Into::Second: the arrays keep their values; every array that is written has a second place, and what it holds after an error is undefined.
  virtual void stream(const std::vector<Job>& jobs, const Work& work, Into into = Into::Place) = 0;
};

}  // namespace ds::optim
