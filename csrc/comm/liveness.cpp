// SPDX-License-Identifier: Apache-2.0
#include "comm/liveness.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>

namespace ds::comm {
namespace {

struct Stat {
  char state = 0;  // 0: no such process
  uint64_t start_ticks = 0;
};

Stat read_stat(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  if (!std::getline(file, text)) return {};
  const size_t name_end = text.rfind(')');  // the name may hold blanks and brackets
  if (name_end == std::string::npos) return {};
  std::istringstream fields(text.substr(name_end + 1));
  Stat out;
  fields >> out.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  fields >> out.start_ticks;
  return out;
}

}  // namespace

Identity Identity::self() {
  Identity me;
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  char ns[24] = {};
  [[maybe_unused]] const ssize_t n = ::readlink("/proc/self/ns/pid", ns, sizeof(ns) - 1);  // "pid:[4026531836]"
  std::snprintf(me.host, sizeof(me.host), "%.36s %.23s", boot.c_str(), ns);
  me.pid = ::getpid();
  me.start_ticks = read_stat(me.pid).start_ticks;
  return me;
}

Peer::Fd::~Fd() { ::close(fd); }

Peer::Peer(const Identity& identity) : identity_(identity) {
  if (std::strcmp(identity.host, Identity::self().host) != 0) return;
  watchable_ = true;
#ifdef SYS_pidfd_open
  const int fd = static_cast<int>(::syscall(SYS_pidfd_open, identity.pid, 0));  // close-on-exec by definition
  if (fd >= 0) {
    if (read_stat(identity.pid).start_ticks == identity.start_ticks)
      handle_ = std::make_shared<Fd>(fd);
    else
      ::close(fd);
  }
#endif
}

Peer Peer::by_socket(const Identity& identity, int fd) {
  Peer peer;
  peer.identity_ = identity;
  peer.watchable_ = true;
  peer.handle_ = std::make_shared<Fd>(fd);
  return peer;
}

bool Peer::dead() const {
  if (!watchable_) return false;
  if (handle_) {
    pollfd p{handle_->fd, POLLIN, 0};
    return ::poll(&p, 1, 0) == 1;
  }
  const Stat stat = read_stat(identity_.pid);
  return stat.state == 0 || stat.state == 'Z' || stat.state == 'X' || stat.start_ticks != identity_.start_ticks;
}

std::string first_dead(const std::vector<Peer>& peers, int self) {
  for (size_t r = 0; r < peers.size(); ++r)
    if (static_cast<int>(r) != self && peers[r].dead())
      return "rank " + std::to_string(r) + " (pid " + std::to_string(peers[r].pid()) + ") has died";
  return "";
}

}  // namespace ds::comm
