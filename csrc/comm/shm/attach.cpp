// SPDX-License-Identifier: Apache-2.0
#include "comm/shm/attach.h"

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "comm/shm/pass_fd.h"

namespace ds::comm::shm {
namespace {

// Plain bytes: what a rank says about its heap.
struct Invitation {
  int32_t fd;
  uint8_t token[kTokenBytes];
};

// What a rank says after a try. Empty problem: it reached everybody.
struct Verdict {
  char problem[200];
};

std::string agree(const ShmGroup& group, const std::string& problem) {
  Verdict mine{};
  std::snprintf(mine.problem, sizeof(mine.problem), "%s", problem.c_str());
  std::vector<Verdict> all(group.size);
  group.all_gather(&mine, sizeof(mine), all.data());
  for (int r = 0; r < group.size; ++r)
    if (all[r].problem[0] != '\0') return "rank " + std::to_string(r) + ": " + all[r].problem;
  return "";
}

std::string one_host(const ShmGroup& group) {
  for (int r = 1; r < group.size; ++r)  // the boot id only; containers may have process ids of their own
    if (std::strncmp(group.identities[r].host, group.identities[0].host, 36) != 0)
      return "ranks 0 and " + std::to_string(r) + " are on different hosts";
  return "";
}

std::string adopt(Member& member, int fd, const Invitation& invitation) {
  member.file = std::make_shared<File>(fd);
  try {
    member.head = std::make_unique<Mapping>(member.file, 0, sizeof(ControlBlock), /*writable=*/true);
  } catch (const Error& error) {
    return error.what();
  }
  const ControlBlock& control = member.control();
  if (control.magic == kMagic && std::memcmp(control.token, invitation.token, kTokenBytes) == 0) return "";
  member.head.reset();
  member.file.reset();
  return "is not the memory it should be";
}

std::string adopt_by_proc(Member& member, const Identity& identity, const Invitation& invitation) {
  const std::string path = "/proc/" + std::to_string(identity.pid) + "/fd/" + std::to_string(invitation.fd);
  // Look before opening: in another process namespace this may be anything, and opening some things has effects.
  char target[64] = {};
  if (::readlink(path.c_str(), target, sizeof(target) - 1) < 0) return path + ": " + std::strerror(errno);
  if (std::strncmp(target, "/memfd:deepspeed", 16) != 0) return path + " is no memory of ours";
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) return path + ": " + std::strerror(errno);
  const std::string problem = adopt(member, fd, invitation);
  return problem.empty() ? "" : path + " " + problem;
}

std::string by_proc(const ShmGroup& group, const Options& options, const std::vector<Invitation>& invitations,
                    std::vector<Member>& members) {
  std::string problem = options.deny_proc ? "denied by option" : "";
  for (int r = 0; r < group.size && problem.empty(); ++r)
    if (r != group.rank) problem = adopt_by_proc(members[r], group.identities[r], invitations[r]);
  problem = agree(group, problem);
  if (problem.empty())
    for (int r = 0; r < group.size; ++r) members[r].process = Peer(group.identities[r]);
  return problem;
}

// Everybody listens; all agree; everybody connects to all (the backlog takes them), then serves its own visitors, then
// collects what it asked for. No step waits for a step that comes later on the other side.
std::string by_socket(const ShmGroup& group, const Options& options, const std::vector<Invitation>& invitations, int own_fd,
                      std::vector<Member>& members, std::vector<std::shared_ptr<File>>& visitors) {
  std::string problem = options.deny_sockets ? "denied by option" : "";
  std::unique_ptr<FdServer> server;
  try {
    if (problem.empty()) server = std::make_unique<FdServer>(invitations[group.rank].token, group.size);
  } catch (const Error& error) {
    problem = error.what();
  }
  problem = agree(group, problem);
  if (!problem.empty()) return problem;
  try {
    std::vector<std::shared_ptr<File>> sockets(group.size);
    for (int r = 0; r < group.size; ++r)
      if (r != group.rank) sockets[r] = std::make_shared<File>(connect_to(invitations[r].token));
    server->serve(own_fd, group.size - 1);
    for (int r = 0; r < group.size && problem.empty(); ++r) {
      if (r == group.rank) continue;
      problem = adopt(members[r], receive_fd(sockets[r]->fd()), invitations[r]);
      members[r].process = Peer::by_socket(group.identities[r], sockets[r]->release());
    }
    for (int visitor : server->take_visitors()) visitors.push_back(std::make_shared<File>(visitor));
  } catch (const Error& error) {
    problem = error.what();
  }
  return agree(group, problem);
}

}  // namespace

std::unique_ptr<Membership> attach(const ShmGroup& group, const Options& options, std::string* why) {
  *why = one_host(group);
  if (!why->empty()) return nullptr;
  auto out = std::make_unique<Membership>();
  out->members.resize(group.size);
  Member& own = out->members[group.rank];
  Invitation mine{};
  std::string problem;
  try {
    out->heap = std::make_unique<Heap>(sizeof(ControlBlock));
    own.file = out->heap->file();
    own.head = std::make_unique<Mapping>(own.file, 0, sizeof(ControlBlock), /*writable=*/true);
    mine.fd = own.file->fd();
    DS_CHECK(::getrandom(mine.token, kTokenBytes, 0) == static_cast<ssize_t>(kTokenBytes), "getrandom: " << std::strerror(errno));
    std::memcpy(own.control().token, mine.token, kTokenBytes);
    own.control().magic = kMagic;
  } catch (const Error& error) {
    problem = error.what();
  }
  *why = agree(group, problem);
  if (!why->empty()) return nullptr;
  std::vector<Invitation> invitations(group.size);
  group.all_gather(&mine, sizeof(mine), invitations.data());

  const std::string no_proc = by_proc(group, options, invitations, out->members);
  if (no_proc.empty()) return out;
  const std::string no_socket = by_socket(group, options, invitations, mine.fd, out->members, out->visitors);
  if (no_socket.empty()) return out;
  *why = "ranks cannot map each other's memory (" + no_proc + "; over a socket: " + no_socket + ")";
  return nullptr;
}

}  // namespace ds::comm::shm
