// SPDX-License-Identifier: Apache-2.0
// The factory: the only place that decides which carrier a group uses.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "comm/transport.h"

namespace ds::comm {

// Collective over pg. Auto: shm iff the device is the CPU and every rank of pg can map every other's memory (verified by a
// token), else c10d; all ranks agree. Shm where that is impossible: an error on every rank. A null pg or one rank: local.
std::shared_ptr<Transport> make_transport(c10::intrusive_ptr<c10d::ProcessGroup> pg, at::Device device, Options options = {});

}  // namespace ds::comm
