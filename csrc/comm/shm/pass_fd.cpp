// SPDX-License-Identifier: Apache-2.0
#include "comm/shm/pass_fd.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "comm/shm/control.h"

namespace ds::comm::shm {
namespace {

constexpr int kPatience_ms = 10000;

socklen_t name_of(const uint8_t* token, sockaddr_un* address) {
  std::memset(address, 0, sizeof(*address));
  address->sun_family = AF_UNIX;
  char* text = address->sun_path + 1;  // a leading zero byte: no file
  int n = std::snprintf(text, sizeof(address->sun_path) - 1, "deepspeed-");
  for (size_t i = 0; i < kTokenBytes; ++i) n += std::snprintf(text + n, 3, "%02x", token[i]);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + n);
}

int new_socket() {
  const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  DS_CHECK(fd >= 0, "socket: " << std::strerror(errno));
  return fd;
}

bool same_user(int socket) {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) == 0 && credentials.uid == ::geteuid();
}

void send_fd(int socket, int fd) {
  char byte = 'f';
  iovec data{&byte, 1};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof(space);
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  DS_CHECK(::sendmsg(socket, &message, MSG_NOSIGNAL) == 1, "sendmsg: " << std::strerror(errno));
}

}  // namespace

FdServer::FdServer(const uint8_t* token, int backlog) : listener_(new_socket()) {
  sockaddr_un address;
  const socklen_t size = name_of(token, &address);
  if (::bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(listener_, backlog) != 0) {
    const int problem = errno;
    ::close(listener_);
    DS_FAIL("bind and listen: " << std::strerror(problem));
  }
}

FdServer::~FdServer() {
  ::close(listener_);
  for (int fd : visitors_) ::close(fd);
}

void FdServer::serve(int fd, int visitors) {
  while (visitors > 0) {
    pollfd p{listener_, POLLIN, 0};
    DS_CHECK(::poll(&p, 1, kPatience_ms) == 1, "a rank did not come to fetch the memory's descriptor");
    const int visitor = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    DS_CHECK(visitor >= 0, "accept: " << std::strerror(errno));
    visitors_.push_back(visitor);
    if (!same_user(visitor)) continue;
    send_fd(visitor, fd);
    --visitors;
  }
}

std::vector<int> FdServer::take_visitors() { return std::move(visitors_); }

int connect_to(const uint8_t* token) {
  const int fd = new_socket();
  const timeval patience{kPatience_ms / 1000, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  sockaddr_un address;
  const socklen_t size = name_of(token, &address);
  if (::connect(fd, reinterpret_cast<sockaddr*>(&address), size) != 0) {
    const int problem = errno;
    ::close(fd);
    DS_FAIL("connect: " << std::strerror(problem));
  }
  return fd;
}

int receive_fd(int socket) {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof(space);
  DS_CHECK(::recvmsg(socket, &message, MSG_CMSG_CLOEXEC) == 1, "recvmsg: " << std::strerror(errno));
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  DS_CHECK(header != nullptr && header->cmsg_type == SCM_RIGHTS, "no descriptor came");
  int fd;
  std::memcpy(&fd, CMSG_DATA(header), sizeof(int));
  return fd;
}

}  // namespace ds::comm::shm
