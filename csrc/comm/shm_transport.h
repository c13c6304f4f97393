// SPDX-License-Identifier: Apache-2.0
// Ranks of one host exchange bytes by reading each other's memory. Torch-free.
#pragma once

#include "comm/liveness.h"
#include "comm/transport.h"

namespace ds::comm {

struct ShmGroup {
  int rank;
  int size;
  int64_t id;
  std::vector<Identity> identities;
  // Everybody's n bytes in rank order; used only while the transport is made.
  std::function<void(const void* mine, size_t n, void* out)> all_gather;
};

// Collective. Null on every rank, with the reason in *why, when some rank cannot reach another's memory.
std::shared_ptr<Transport> make_shm_transport(const ShmGroup& group, const Options& options, std::string* why);

}  // namespace ds::comm
