// SPDX-License-Identifier: Apache-2.0
// How ranks get hold of each other's heaps: /proc/<pid>/fd/<n>, else descriptors passed over an abstract Unix socket.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/shm/control.h"
#include "comm/shm/heap.h"
#include "comm/shm_transport.h"

namespace ds::comm::shm {

struct Member {
  std::shared_ptr<File> file;
  std::unique_ptr<Mapping> head;  // the control block, writable (for the bell)
  Peer process;
  ControlBlock& control() const { return *reinterpret_cast<ControlBlock*>(head->data()); }
};

struct Membership {
  std::unique_ptr<Heap> heap;
  std::vector<Member> members;  // by rank, my own included
  std::vector<std::shared_ptr<File>> visitors;  // sockets by which peers notice that I am gone (where /proc did not serve)
};

// Collective. Without a value on all ranks, *why set, when some rank cannot reach another.
std::unique_ptr<Membership> attach(const ShmGroup& group, const Options& options, std::string* why);

}  // namespace ds::comm::shm
