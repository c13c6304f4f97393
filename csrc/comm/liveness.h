// SPDX-License-Identifier: Apache-2.0
// Is that process still there? Answers for ranks of this host, where pidfd_open or /proc can tell. Torch-free.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ds::comm {

// Who a rank is. Plain bytes: travels through all_gather.
struct Identity {
  char host[64] = {};        // the kernel's boot id and the process-id namespace: equal on ranks that can watch each other
  int32_t pid = 0;
  uint64_t start_ticks = 0;  // field 22 of /proc/<pid>/stat: tells a process from a later one with its id
  static Identity self();
};

class Peer {
 public:
  Peer() = default;                        // unknown: never reported dead
  explicit Peer(const Identity& identity);  // watched if it is on this host
  static Peer by_socket(const Identity& identity, int fd);  // dead when the connected socket hangs up; takes fd
  bool dead() const;                       // a few microseconds
  int pid() const { return identity_.pid; }

 private:
  struct Fd {
    explicit Fd(int fd) : fd(fd) {}
    ~Fd();
    int fd;
  };
  Identity identity_;
  bool watchable_ = false;
  std::shared_ptr<Fd> handle_;  // a pidfd or a socket: readable once the peer is gone
};

// "rank 2 (pid 4711) has died", or "" when all live.
std::string first_dead(const std::vector<Peer>& peers, int self);

}  // namespace ds::comm
