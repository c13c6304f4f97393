// SPDX-License-Identifier: Apache-2.0
// Blocking: spin a little, then sleep on the bell, look at the peers' health at every slice.
#include <sched.h>

#include <chrono>
#include <thread>

#include "base/error.h"
#include "comm/shm/futex.h"
#include "comm/shm/transport.h"
#include "comm/stall.h"

namespace ds::comm::shm {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(30);
constexpr auto kYield = std::chrono::microseconds(150);
constexpr auto kHealthEvery = std::chrono::milliseconds(50);
constexpr int64_t kSlice_ns = 50'000'000;
constexpr int64_t kSliceBesideOthers_ns = 500'000;  // their peers do not ring this transport's bell

class Asleep {
 public:
  explicit Asleep(ControlBlock& own) : own_(own) { own_.sleepers.fetch_add(1, std::memory_order_seq_cst); }
  ~Asleep() { own_.sleepers.fetch_sub(1, std::memory_order_seq_cst); }

 private:
  ControlBlock& own_;
};

std::string list(const std::vector<int>& ranks) {
  std::string out;
  for (int r : ranks) out += (out.empty() ? "" : ", ") + std::to_string(r);
  return out.empty() ? "none" : out;
}

}  // namespace

void ShmTransport::wait_until(Condition& condition, int64_t seq) {
  try {
    advance();
    if (condition.ready() || spin(condition)) return;
    sleep(condition, seq);
  } catch (const std::exception& error) {
    if (failure_.empty()) {
      failure_ = error.what();
      core_->leave(RankState::Failed, failure_);
    }
    ledger_->end(seq, CollectiveState::Failed);
    throw;
  }
}

bool ShmTransport::spin(Condition& condition) {
  const auto start = Clock::now();
  for (;;) {
    for (int i = 0; i < 16; ++i) cpu_pause();
    progress();
    if (condition.ready()) return true;
    const auto spent = Clock::now() - start;
    if (spent > kYield) return false;
    if (!spins_ || spent > kSpin) ::sched_yield();
  }
}

void ShmTransport::sleep(Condition& condition, int64_t seq) {
  ControlBlock& own = core_->own();
  show_activity(own, ledger_->record(seq), true);
  Asleep asleep(own);
  const Ledger::Blocked blocked(*ledger_, seq);
  StallWatch watch(options_);
  auto next_health = Clock::now() + kHealthEvery;
  for (;;) {
    const uint32_t bell = own.bell.load(std::memory_order_acquire);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    advance();
    if (condition.ready()) break;
    const bool look = Clock::now() >= next_health;
    check_peers(condition, seq, look);
    if (look) {
      watch.tick([&] { return stall_text(condition, seq); });
      next_health = Clock::now() + kHealthEvery;
    }
    const bool others = progress_others();
    futex_wait(&own.bell, bell, others ? kSliceBesideOthers_ns : kSlice_ns);
  }
  own.activity.blocked.store(0, std::memory_order_relaxed);
}

// A wait on this transport must not keep the process's other transports from serving their peers.
bool ShmTransport::progress_others() const {
  bool any = false;
  for (const auto& other : Registry::all()) {
    if (other.get() == this || !other->busy()) continue;
    any = true;
    other->progress();
  }
  return any;
}

void ShmTransport::check_peers(Condition& condition, int64_t seq, bool look_at_processes) {
  for (int r = 0; r < size_; ++r) {
    if (r == rank_ || !condition.waits_for(r)) continue;
    const ControlBlock& peer = core_->of(r);
    const auto state = static_cast<RankState>(peer.state.load(std::memory_order_acquire));
    std::string problem;
    if (state == RankState::Failed)
      problem = "gave up: " + std::string(peer.reason);
    else if (state == RankState::Closed)
      problem = "has left the group (its transport was destroyed)";
    else if (look_at_processes && core_->member(r).process.dead())
      problem = "has died";
    if (problem.empty() || !condition.waits_for(r)) continue;  // its last deed may have been what we wait for
    fail(seq, "rank " + std::to_string(r) + " (pid " + std::to_string(core_->member(r).process.pid()) + ") " + problem +
                  "; noticed by " + stall_text(condition, seq));
  }
}

std::string ShmTransport::stall_text(Condition& condition, int64_t seq) const {
  std::vector<int> here, missing;
  for (int r = 0; r < size_; ++r) (condition.waits_for(r) ? missing : here).push_back(r);
  std::string text = "rank " + std::to_string(rank_) + " of " + std::to_string(size_) + " in " + describe(ledger_->record(seq)) +
                     " over shm: arrived " + list(here) + "; missing " + list(missing);
  for (int r : missing)
    text += "; rank " + std::to_string(r) + " (pid " + std::to_string(core_->member(r).process.pid()) + ") " +
            read_activity(core_->of(r));
  return text;
}

void ShmTransport::fail(int64_t seq, const std::string& reason) {
  if (failure_.empty()) failure_ = reason;
  ledger_->end(seq, CollectiveState::Failed);
  core_->leave(RankState::Failed, reason);
  DS_FAIL(reason);
}

void ShmTransport::check_usable() const {
  if (!failure_.empty()) DS_FAIL("this transport failed earlier: " << failure_);
}

}  // namespace ds::comm::shm
