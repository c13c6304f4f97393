// SPDX-License-Identifier: Apache-2.0
// Small collectives through the control blocks, one round (at most 256 KB a rank) after the other.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>
#include <utility>

#include "base/error.h"
#include "comm/checks.h"
#include "comm/combine.h"
#include "comm/shm/transport.h"
#include "platform/file.h"

namespace ds::comm::shm {
namespace {

enum RoundKind : uint64_t { kReduceRound = 1, kGatherRound = 16, kBroadcastRound = 32, kBarrierRound = 48, kAllocateRound = 49 };

const char* kind_name(uint64_t kind) {
  if (kind >= kReduceRound && kind < kGatherRound) return "all_reduce";
  if (kind == kGatherRound) return "all_gather_host";
  if (kind == kBarrierRound) return "barrier";
  if (kind == kAllocateRound) return "allocate";
  return "broadcast";
}

class Entered : public Condition {
 public:
  Entered(const Core& core, uint64_t round) : Condition(core.size), core_(core), round_(round) {}
  bool waits_for(int r) const override { return core_.of(r).round.load(std::memory_order_acquire) < round_; }

 private:
  const Core& core_;
  const uint64_t round_;
};

}  // namespace

// `filled` bytes of mine go in; `bytes` describes the collective and must be the same on all ranks.
uint64_t ShmTransport::enter_round(uint64_t kind, const void* mine, size_t filled, size_t bytes) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  check_usable();
  ControlBlock& own = core_->own();
  const uint64_t round = own.round.load(std::memory_order_relaxed) + 1;
  own.rounds[round % 2] = {kind, bytes};
  if (filled != 0) std::memcpy(own.round_data[round % 2], mine, filled);
  own.round.store(round, std::memory_order_release);
  core_->notify();
  return round;
}

void ShmTransport::finish_round(uint64_t round, uint64_t kind, size_t bytes, int64_t seq) {
  Entered entered(*core_, round);
  if (!entered.ready()) wait_until(entered, seq);
  for (int r = 0; r < size_; ++r) {
    const Round& theirs = core_->of(r).rounds[round % 2];
    if (theirs.kind == kind && theirs.bytes == bytes) continue;
    fail(seq, "ranks disagree: rank " + std::to_string(rank_) + " is in " + kind_name(kind) + " of " + std::to_string(bytes) +
                  " bytes, " + describe(ledger_->record(seq)) + ", rank " + std::to_string(r) + " in " + kind_name(theirs.kind) +
                  " of " + std::to_string(theirs.bytes) + " bytes");
  }
}

const char* ShmTransport::round_data(uint64_t round, int r) const { return core_->of(r).round_data[round % 2]; }

void ShmTransport::all_reduce(double* values, int n, Op op, const Tag& tag) {
  DS_CHECK_VALUE(n >= 0, "all_reduce: n must not be negative, got " << n);
  constexpr int kAtOnce = kRoundBytes / sizeof(double);
  const uint64_t kind = kReduceRound + static_cast<uint64_t>(op);
  const int64_t seq = ledger_->begin("all_reduce", tag, static_cast<int64_t>(sizeof(double)) * n);
  int begin = 0;
  do {
    const int count = std::min(n - begin, kAtOnce);
    const size_t bytes = sizeof(double) * static_cast<size_t>(count);
    const uint64_t round = enter_round(kind, values + begin, bytes, bytes);
    finish_round(round, kind, bytes, seq);
    for (int r = 0; r < size_; ++r) {
      const auto* theirs = reinterpret_cast<const double*>(round_data(round, r));
      for (int i = 0; i < count; ++i) values[begin + i] = r == 0 ? theirs[i] : combine(op, values[begin + i], theirs[i]);
    }
    begin += count;
  } while (begin < n);
  ledger_->end(seq);
}

void ShmTransport::all_gather_host(const void* mine, size_t bytes, void* out, const Tag& tag) {
  const int64_t seq = ledger_->begin("all_gather_host", tag, static_cast<int64_t>(bytes) * size_);
  size_t begin = 0;
  do {
    const size_t count = std::min(bytes - begin, kRoundBytes);
    const uint64_t round = enter_round(kGatherRound, static_cast<const char*>(mine) + begin, count, count);
    finish_round(round, kGatherRound, count, seq);
    for (int r = 0; r < size_; ++r)
      if (count != 0) std::memcpy(static_cast<char*>(out) + static_cast<size_t>(r) * bytes + begin, round_data(round, r), count);
    begin += count;
  } while (begin < bytes);
  ledger_->end(seq);
}

void ShmTransport::broadcast(void* data, size_t bytes, int src, const Tag& tag) {
  DS_CHECK_VALUE(src >= 0 && src < size_, "broadcast: source rank " << src << " of " << size_);
  const int64_t seq = ledger_->begin("broadcast", tag, static_cast<int64_t>(bytes));
  const uint64_t kind = kBroadcastRound + (static_cast<uint64_t>(src) << 8);
  for (size_t begin = 0; begin < bytes; begin += kRoundBytes) {
    const size_t count = std::min(bytes - begin, kRoundBytes);
    const uint64_t round = enter_round(kind, static_cast<char*>(data) + begin, rank_ == src ? count : 0, bytes - begin);
    finish_round(round, kind, bytes - begin, seq);
    if (rank_ != src) std::memcpy(static_cast<char*>(data) + begin, round_data(round, src), count);
  }
  ledger_->end(seq);
}

void ShmTransport::barrier(const Tag& tag) {
  const int64_t seq = ledger_->begin("barrier", tag, 0);
  finish_round(enter_round(kBarrierRound, nullptr, 0, 0), kBarrierRound, 0, seq);
  ledger_->end(seq);
}

std::vector<std::shared_ptr<File>> ShmTransport::exchange_files(size_t bytes, const std::string& folder) {
  // What each rank says: the path of its part, or why there is none.
  struct Card {
    bool failed;
    char text[2047];
  };
  Tag tag;
  tag.phase = "allocate_files";
  Card card{};
  std::vector<std::shared_ptr<File>> files(size_);
  const auto say = [&](const std::string& text, bool failed) {
    card.failed = failed;
    std::snprintf(card.text, sizeof(card.text), "%s", text.c_str());
    std::vector<Card> all(size_);
    all_gather_host(&card, sizeof(card), all.data(), tag);
    for (int r = 0; r < size_; ++r) DS_CHECK(!all[r].failed, "rank " << r << ": " << all[r].text);
    return all;
  };
  std::optional<platform::File> mine;
  std::string problem;
  try {
    mine = platform::File::unique(folder, ".deepspeed-");
  } catch (const Error& error) {
    problem = error.what();
  }
  // The name is there for the peers only, and goes whatever happens.
  struct Name {
    std::string path;
    void remove() {
      if (!path.empty()) ::unlink(std::exchange(path, "").c_str());
    }
    ~Name() { remove(); }
  } name{mine ? mine->path() : ""};
  const std::vector<Card> paths = say(problem.empty() ? name.path : problem, !problem.empty());
  for (int r = 0; r < size_ && problem.empty(); ++r) {
    const int fd = r == rank_ ? ::fcntl(mine->fd(), F_DUPFD_CLOEXEC, 0) : ::open(paths[r].text, O_RDONLY | O_CLOEXEC);
    if (fd < 0) problem = std::string("cannot open ") + paths[r].text + " of rank " + std::to_string(r) + ": " + std::strerror(errno);
    if (fd >= 0) files[r] = std::make_shared<File>(fd);
  }
  say(problem, !problem.empty());
  name.remove();   // before space is set aside: a process that is killed up to here leaves an empty file
  try {
    mine->reserve(0, static_cast<int64_t>(extent(bytes)));
  } catch (const Error& error) {
    problem = error.what();
  }
  say(problem, !problem.empty());
  return files;
}

std::shared_ptr<SymmetricBuffer> ShmTransport::make_buffer(size_t bytes, const std::string& folder) {
  std::vector<std::shared_ptr<File>> files;
  if (!folder.empty()) files = exchange_files(bytes, folder);
  Tag tag;
  tag.phase = "allocate";
  const int64_t seq = ledger_->begin("allocate", tag, static_cast<int64_t>(bytes));
  const BufferSite mine = ShmBuffer::reserve(*core_, bytes, /*in_heap=*/files.empty());
  const uint64_t round = enter_round(kAllocateRound, &mine, sizeof(mine), bytes);
  finish_round(round, kAllocateRound, bytes, seq);
  std::vector<BufferSite> sites(size_);
  for (int r = 0; r < size_; ++r) std::memcpy(&sites[r], round_data(round, r), sizeof(BufferSite));
  auto buffer = std::make_shared<ShmBuffer>(core_, core_->next_buffer_id(), sites, std::move(files));
  {
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    for (auto it = buffers_.begin(); it != buffers_.end();) it = it->second.expired() ? buffers_.erase(it) : std::next(it);
    buffers_[buffer->id()] = buffer;
  }
  ledger_->end(seq);
  return buffer;
}

}  // namespace ds::comm::shm
