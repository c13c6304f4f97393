// SPDX-License-Identifier: Apache-2.0
// The transports of this process. A wait on one must advance the others, too: two ranks that each block on a different
// transport would otherwise wait for each other's sinks for ever.
#pragma once

#include <memory>
#include <vector>

#include "comm/transport.h"

namespace ds::comm {

inline constexpr int kMaxChannels = 16;

class Registry {
 public:
  static void add(const std::shared_ptr<Transport>& transport);
  static std::vector<std::shared_ptr<Transport>> all();
};

}  // namespace ds::comm
