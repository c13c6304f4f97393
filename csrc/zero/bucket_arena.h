// SPDX-License-Identifier: Apache-2.0
// Memory for gradients on their way to the reduction.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "comm/transport.h"

namespace ds::zero {

struct Region {
  int64_t offset = -1;
  int64_t bytes = 0;
  bool valid() const { return offset >= 0; }
};

// Note [No deadlock over buckets]
// Reductions are issued in one static order on all ranks, so the issued but unfinished ones of any two ranks are
// prefixes of one list, and the shorter prefix always completes. The flat that is next in that order may wait for
// issued ones to drain and finds room at last in the reserve, which only it may use. Flats that are opened before their
// turn never wait: they take what is free outside the reserve, or the caller keeps their gradients in private memory.
class BucketArena {
 public:
  // Collective. `largest_bytes` is the largest region that will ever be asked for.
  BucketArena(comm::Transport& transport, int64_t largest_bytes);

  // Never blocks; an invalid region when nothing is free.
  Region try_acquire(int64_t bytes);
  // For the flat whose turn it is: blocks until earlier reductions have drained; without `wait`, invalid when they have not.
  Region acquire(int64_t bytes, bool wait = true);
  // A region that was not issued.
  void release(Region region);
  // The region belongs to the reduction until that has drained.
  void issued(Region region, std::shared_ptr<comm::ReduceWork> work);
  void wait_drained();

  comm::SymmetricBuffer& buffer() { return *buffer_; }
  int64_t bytes() const { return total_bytes_; }
  char* data(Region region) { return static_cast<char*>(buffer_->data()) + region.offset; }

 private:
  struct Busy {
    Region region;
    std::shared_ptr<comm::ReduceWork> work;   // null while the region is being filled
  };
  Region first_fit(int64_t begin, int64_t end, int64_t bytes) const;
  Region take(Region region);
  void reclaim();

  std::shared_ptr<comm::SymmetricBuffer> buffer_;
  int64_t general_bytes_ = 0;   // [0, general) for anyone, [general, end) the reserve
  int64_t total_bytes_ = 0;
  std::vector<Busy> busy_;      // ascending offsets
};

}  // namespace ds::zero
