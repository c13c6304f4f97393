// SPDX-License-Identifier: Apache-2.0
// What a transport has done: counters per phase and the flight record of its last collectives. Torch-free.
#pragma once

#include <array>
#include <mutex>

#include "comm/transport.h"

namespace ds::comm {

class Ledger {
 public:
  static constexpr int kKept = 256;

  int64_t begin(const char* kind, const Tag& tag, int64_t bytes);  // the collective's sequence number
  void end(int64_t seq, CollectiveState state = CollectiveState::Done);

  CollectiveRecord record(int64_t seq) const;  // of the last kKept; an older one has seq 0
  std::vector<CollectiveRecord> recent() const;
  std::map<std::string, Counter> counts() const;
  void reset_counts();

 private:
  struct Phase {
    const char* name;
    Counter counter;
  };
  Counter& counter(const char* phase);

  mutable std::mutex mutex_;
  int64_t last_ = 0;
  std::array<CollectiveRecord, kKept> ring_;
  std::vector<Phase> phases_;  // a dozen at most: searched linearly, by pointer first
};

double wall_clock_s();

// "reduce_scatter #12 (step 3, phase grad, unit 7, 4096 bytes)"
std::string describe(const CollectiveRecord& record);

}  // namespace ds::comm
