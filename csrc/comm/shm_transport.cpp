// SPDX-License-Identifier: Apache-2.0
#include "comm/shm_transport.h"

#include <thread>

#include "base/error.h"
#include "comm/shm/transport.h"

namespace ds::comm {
namespace shm {

ShmTransport::ShmTransport(std::shared_ptr<Core> core, int64_t id, const Options& options)
    : Transport(core->rank, core->size, id, Device::Cpu, options), core_(std::move(core)), queues_(options.max_channels),
      spins_(std::thread::hardware_concurrency() >= static_cast<unsigned>(size_)) {}

ShmTransport::~ShmTransport() {
  if (core_->in_owner()) core_->leave(RankState::Closed, "");
}

std::shared_ptr<ShmBuffer> ShmTransport::own_buffer(SymmetricBuffer& buffer, const char* what) const {
  auto* mine = dynamic_cast<ShmBuffer*>(&buffer);
  DS_CHECK_VALUE(mine != nullptr && mine->core() == core_.get(), what << ": the buffer was allocated by another transport");
  return std::static_pointer_cast<ShmBuffer>(mine->shared_from_this());
}

}  // namespace shm

std::shared_ptr<Transport> make_shm_transport(const ShmGroup& group, const Options& options, std::string* why) {
  auto membership = shm::attach(group, options, why);
  if (!membership) return nullptr;
  auto core = std::make_shared<shm::Core>(group.rank, group.size, std::move(*membership));
  return std::make_shared<shm::ShmTransport>(std::move(core), group.id, options);
}

}  // namespace ds::comm
