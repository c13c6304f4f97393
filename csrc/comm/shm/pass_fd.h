// SPDX-License-Identifier: Apache-2.0
// A file descriptor handed from process to process over an abstract Unix socket named by a secret token.
#pragma once

#include <cstdint>
#include <vector>

namespace ds::comm::shm {

class FdServer {
 public:
  FdServer(const uint8_t* token, int backlog);  // listens; throws ds::Error
  ~FdServer();
  FdServer(const FdServer&) = delete;
  FdServer& operator=(const FdServer&) = delete;
  void serve(int fd, int visitors);  // sends fd to that many visitors of this user; throws after some seconds without one
  std::vector<int> take_visitors();  // their sockets, the caller's from now on: they hang up when this process ends

 private:
  int listener_ = -1;
  std::vector<int> visitors_;
};

int connect_to(const uint8_t* token);  // a connected socket
int receive_fd(int socket);            // the descriptor, close-on-exec

}  // namespace ds::comm::shm
