// SPDX-License-Identifier: Apache-2.0
// One rank's end of the shared memory: lives as long as the transport or any of its buffers.
#pragma once

#include <sys/types.h>

#include <memory>
#include <mutex>
#include <string>

#include "comm/shm/attach.h"

namespace ds::comm::shm {

class Core {
 public:
  Core(int rank, int size, Membership membership);
  ~Core();

  const int rank;
  const int size;

  ControlBlock& own() const { return of(rank); }
  ControlBlock& of(int r) const { return *controls_[r]; }
  const Member& member(int r) const { return membership_.members[r]; }
  Heap& heap() const { return *membership_.heap; }

  // After a change of my words: wakes those who sleep.
  void notify() const;
  // Closed or failed; `reason` is for the others' messages.
  void leave(RankState state, const std::string& reason);
  // A forked child holds copies of these objects; it must not touch the parent's words and memory when it destroys them.
  bool in_owner() const;

  int take_place(uint64_t* generation);  // for a new buffer's epoch; throws when all are taken
  void free_place(int place);
  uint64_t next_buffer_id() { return ++buffers_; }

 private:
  Membership membership_;
  std::vector<ControlBlock*> controls_;
  const pid_t owner_;
  std::mutex mutex_;  // of places
  std::vector<uint64_t> generations_;
  std::vector<bool> taken_;
  uint64_t buffers_ = 0;
};

}  // namespace ds::comm::shm
