// SPDX-License-Identifier: Apache-2.0
// What a transport has done: counters per phase and the flight record of its last collectives; on request also sums for each kind,
// phase and size, and a trace of everything. Torch-free.
#pragma once

#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "comm/transport.h"

namespace ds::comm {

// All collectives of one kind, phase and size.
struct Tally {
  const char* kind;
  const char* phase;
  int64_t bytes;
  int64_t number;
  double seconds;    // from issue to completion, summed
  double shortest_s;
  double longest_s;
  double waited_s;   // the part of `seconds` during which a thread was blocked
};

// A thread that is blocked in a collective.
struct BlockedIn {
  CollectiveRecord record;
  double since_s;  // seconds since the Unix epoch
};

class Ledger {
 public:
  static constexpr int kKept = 256;

  // The collective's sequence number. `ordered`: all ranks issue it in the same order.
  int64_t begin(const char* kind, const Tag& tag, int64_t bytes, bool ordered = true);
  void end(int64_t seq, CollectiveState state = CollectiveState::Done);

  CollectiveRecord record(int64_t seq) const;  // of the last kKept; an older one has seq 0
  std::vector<CollectiveRecord> recent() const;
  std::map<std::string, Counter> counts() const;
  void reset_counts();

  // While one lives, its thread is blocked in collective `seq`.
  class Blocked {
   public:
    Blocked(Ledger& ledger, int64_t seq);
    ~Blocked();
    Blocked(const Blocked&) = delete;
    Blocked& operator=(const Blocked&) = delete;

   private:
    Ledger& ledger_;
    const int64_t seq_;
    const double since_s_;
  };
  std::vector<BlockedIn> blocked() const;
  int64_t events() const;  // grows with every begin() and end(): two equal answers mean that nothing has happened between them

  void keep_tallies(bool on);  // off, as at first: no sums are kept. Turning it on or off forgets earlier ones
  std::vector<Tally> tallies() const;
  void keep_trace(size_t limit);  // 0, as at first: no trace. Otherwise at most so many finished collectives
  std::vector<CollectiveRecord> take_trace();

 private:
  struct Phase {
    const char* name;
    Counter counter;
  };
  Counter& counter(const char* phase);
  void tally(const CollectiveRecord& record);

  mutable std::mutex mutex_;
  int64_t last_ = 0;
  int64_t last_order_ = 0;
  std::array<CollectiveRecord, kKept> ring_;
  std::vector<Phase> phases_;  // a dozen at most: searched linearly, by pointer first
  std::vector<std::pair<int64_t, double>> blocked_;  // (seq, since), one for each blocked thread
  int64_t ended_ = 0;
  bool tallying_ = false;
  std::map<std::tuple<std::string, std::string, int64_t>, Tally> tallies_;
  size_t trace_limit_ = 0;
  std::vector<CollectiveRecord> trace_;
};

double wall_clock_s();

// "reduce_scatter #12 (step 3, phase grad, unit 7, 4096 bytes)"
std::string describe(const CollectiveRecord& record);

}  // namespace ds::comm
