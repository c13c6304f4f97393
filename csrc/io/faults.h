// SPDX-License-Identifier: Apache-2.0
// Faults on purpose, for tests: what a failing or full disk, a signal or a crash in the middle of a write does to a chunk. They come at random
// from a seed; which chunk gets which depends on the number of its request and its place alone, not on timing.
#pragma once

#include <cstdint>
#include <string>

namespace ds::io {

struct Chunk;

struct FaultOptions {
  uint64_t seed = 0;
  // Probabilities that one transfer of a chunk
  double error = 0;  // fails with EIO, a write now and then with ENOSPC; memory and file hold anything then
  double torn = 0;   // stops somewhere and fails with EIO
  double cut = 0;    // stops somewhere and says where
  double again = 0;  // is reported as interrupted
  double delay = 0;  // is reported up to delay_us later
  int64_t delay_us = 200;

  // "seed=7,error=0.01,torn=0.01,cut=0.1,again=0.1,delay=0.1,delay_us=200"; what is left out stays as above.
  static FaultOptions parse(const std::string& text);
  void check() const;
};

enum class Fault : uint8_t { None, Error, Torn, Cut, Again };

class Faults {
 public:
  explicit Faults(const FaultOptions& options) : options_(options) { options_.check(); }

  // Before the system gets a chunk: how many of its bytes it shall get, at least one of a chunk that has any.
  int64_t issue(Chunk& chunk) const;
  // After that: what the engine shall believe the system returned. May sleep.
  int64_t answer(Chunk& chunk, int64_t result) const;

 private:
  FaultOptions options_;
};

}  // namespace ds::io
