// SPDX-License-Identifier: Apache-2.0
// Runs a body in n forked processes that form a ShmGroup. In a child, a failed EXPECT_TRUE_IN_RANK or an exception ends it
// with status 1 and its text on stderr; the parent expects the given statuses, within a time limit.
#pragma once

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "comm/shm_transport.h"

#define RANK_CHECK(condition)                                                                                       \
  do {                                                                                                              \
    if (!(condition)) throw std::runtime_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " #condition); \
  } while (0)

namespace ds::comm::testing {

constexpr size_t kMeetingBytes = size_t{1} << 16;

struct Meeting {
  pthread_barrier_t barrier;
  char data[16][kMeetingBytes];
};

inline Meeting* new_meeting(int n) {
  void* memory = ::mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto* meeting = static_cast<Meeting*>(memory);
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&meeting->barrier, &attributes, static_cast<unsigned>(n));
  return meeting;
}

inline ShmGroup join(Meeting* meeting, int rank, int size, int64_t id = 1) {
  ShmGroup group{rank, size, id, {}, {}};
  group.all_gather = [=](const void* mine, size_t n, void* out) {
    if (n > kMeetingBytes) throw std::runtime_error("too much to gather");
    std::memcpy(meeting->data[rank], mine, n);
    pthread_barrier_wait(&meeting->barrier);
    for (int r = 0; r < size; ++r) std::memcpy(static_cast<char*>(out) + static_cast<size_t>(r) * n, meeting->data[r], n);
    pthread_barrier_wait(&meeting->barrier);
  };
  const Identity mine = Identity::self();
  group.identities.resize(size);
  group.all_gather(&mine, sizeof(mine), group.identities.data());
  return group;
}

using Body = std::function<void(int rank, Meeting* meeting)>;

inline pid_t start_rank(int rank, Meeting* meeting, const Body& body) {
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  int status = 0;
  try {
    body(rank, meeting);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
    status = 1;
  }
  std::fflush(nullptr);
  ::_exit(status);
}

// Waits for the processes; what is left at the limit is killed and fails the test. Returns waitpid statuses.
inline std::vector<int> finish(const std::vector<pid_t>& pids, double limit_s) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(limit_s);
  std::vector<int> statuses(pids.size(), -1);
  std::vector<bool> gone(pids.size(), false);
  size_t left = pids.size();
  while (left > 0) {
    for (size_t r = 0; r < pids.size(); ++r)
      if (!gone[r] && ::waitpid(pids[r], &statuses[r], WNOHANG) == pids[r]) {
        gone[r] = true;
        --left;
      }
    if (std::chrono::steady_clock::now() > end) {
      for (size_t r = 0; r < pids.size(); ++r)
        if (!gone[r]) {
          ADD_FAILURE() << "rank " << r << " did not finish in " << limit_s << " s";
          ::kill(pids[r], SIGKILL);
          ::waitpid(pids[r], &statuses[r], 0);
        }
      break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return statuses;
}

inline void on_ranks(int n, const Body& body, double limit_s = 30) {
  Meeting* meeting = new_meeting(n);
  std::vector<pid_t> pids;
  for (int r = 0; r < n; ++r) pids.push_back(start_rank(r, meeting, body));
  const auto statuses = finish(pids, limit_s);
  for (int r = 0; r < n; ++r) EXPECT_EQ(statuses[r], 0) << "rank " << r;
  ::munmap(meeting, sizeof(Meeting));
}

inline std::shared_ptr<Transport> make(Meeting* meeting, int rank, int size, Options options = {}) {
  std::string why;
  auto transport = make_shm_transport(join(meeting, rank, size), options, &why);
  if (!transport) throw std::runtime_error("no shared memory: " + why);
  return transport;
}

}  // namespace ds::comm::testing
