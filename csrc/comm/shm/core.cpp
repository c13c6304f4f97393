// SPDX-License-Identifier: Apache-2.0
#include "comm/shm/core.h"

#include <unistd.h>

#include <cstdio>

#include "base/error.h"
#include "comm/shm/futex.h"

namespace ds::comm::shm {

Core::Core(int rank_, int size_, Membership membership)
    : rank(rank_), size(size_), membership_(std::move(membership)), owner_(::getpid()), generations_(kMaxBuffers, 0),
      taken_(kMaxBuffers, false) {
  for (const Member& member : membership_.members) controls_.push_back(&member.control());
}

Core::~Core() {
  if (in_owner()) leave(RankState::Closed, "");
}

bool Core::in_owner() const { return ::getpid() == owner_; }

void Core::notify() const {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (int r = 0; r < size; ++r) {
    ControlBlock& peer = of(r);
    if (r == rank || peer.sleepers.load(std::memory_order_relaxed) == 0) continue;
    peer.bell.fetch_add(1, std::memory_order_acq_rel);
    futex_wake_all(&peer.bell);
  }
}

void Core::leave(RankState state, const std::string& reason) {
  if (own().state.load(std::memory_order_relaxed) != static_cast<uint32_t>(RankState::Open)) return;
  std::snprintf(own().reason, sizeof(own().reason), "%s", reason.c_str());
  own().state.store(static_cast<uint32_t>(state), std::memory_order_release);
  notify();
}

int Core::take_place(uint64_t* generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int place = 0; place < kMaxBuffers; ++place) {
    if (taken_[place]) continue;
    taken_[place] = true;
    *generation = ++generations_[place];
    own().places[place].word.store(place_word(*generation, 0), std::memory_order_release);
    return place;
  }
  DS_FAIL("more than " << kMaxBuffers << " symmetric buffers at a time");
}

void Core::free_place(int place) {
  std::lock_guard<std::mutex> lock(mutex_);
  taken_[place] = false;
}

}  // namespace ds::comm::shm
