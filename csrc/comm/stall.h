// SPDX-License-Identifier: Apache-2.0
// Patience of a blocked wait: reports a stall, lets Ctrl-C through, gives up at the time limit. Torch-free.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "comm/transport.h"

namespace ds::comm {

class StallWatch {
 public:
  explicit StallWatch(const Options& options);
  double elapsed_s() const;
  // Call at every time slice of a wait, holding no lock. `describe` is called only to compose a message.
  // Throws ds::Error at the time limit, or what the interrupt check throws.
  void tick(const std::function<std::string()>& describe);

 private:
  const double timeout_s_;
  double next_warning_s_;
  double next_check_s_;
  const std::chrono::steady_clock::time_point start_;
};

// Runs `release` under the release guard.
void release_guarded(const std::function<void()>& release);

}  // namespace ds::comm
