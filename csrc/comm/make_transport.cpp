// SPDX-License-Identifier: Apache-2.0
#include "comm/make_transport.h"

#include <atomic>

#include "base/error.h"
#include "comm/c10d_transport.h"
#include "comm/device_memory.h"
#include "comm/local_transport.h"
#include "comm/registry.h"
#include "comm/shm_transport.h"

namespace ds::comm {
namespace {

std::atomic<int64_t> last_id{0};

// What every rank tells the others first. Plain bytes.
struct Hello {
  Identity identity;
  int64_t last_id;
  int32_t choice;
  int32_t max_channels;
  int32_t cuda;
};

// Backends that take CPU tensors are preferred for host bytes: a device round trip would synchronise the GPU.
at::Device host_device_of(c10d::ProcessGroup& pg, at::Device device) {
  if (device.is_cpu()) return device;
  try {
    pg.getBackend(c10::DeviceType::CPU);
    return at::kCPU;
  } catch (const c10::Error&) {
    return device;
  }
}

std::vector<Hello> exchange(c10d::ProcessGroup& pg, at::Device host_device, const Hello& mine) {
  std::vector<Hello> all(pg.getSize());
  group_all_gather(pg, host_device, &mine, sizeof(Hello), all.data());
  for (int r = 0; r < pg.getSize(); ++r) {
    DS_CHECK_VALUE(all[r].choice == mine.choice && all[r].max_channels == mine.max_channels && all[r].cuda == mine.cuda,
                   "make_transport: rank " << r << " asks for choice " << all[r].choice << ", " << all[r].max_channels
                                           << " channels, cuda " << all[r].cuda << "; rank " << pg.getRank() << " for choice "
                                           << mine.choice << ", " << mine.max_channels << " channels, cuda " << mine.cuda);
  }
  return all;
}

std::shared_ptr<Transport> make_local(at::Device device, const Options& options) {
  if (device.is_cpu()) return std::make_shared<LocalTransport>(++last_id, std::make_unique<HostMemory>(), options);
  return make_local_device_transport(++last_id, std::make_unique<DeviceMemory>(device), device, options);
}

}  // namespace

std::shared_ptr<Transport> make_transport(c10::intrusive_ptr<c10d::ProcessGroup> pg, at::Device device, Options options) {
  DS_CHECK_VALUE(device.is_cpu() || device.is_cuda(), "make_transport: device " << device.str() << " is neither cpu nor cuda");
  if (!pg || pg->getSize() == 1) {
    auto local = make_local(device, options);
    Registry::add(local);
    return local;
  }
  const at::Device host_device = host_device_of(*pg, device);
  const Hello mine{Identity::self(), last_id.load(), options.choice, options.max_channels, device.is_cuda() ? 1 : 0};
  const std::vector<Hello> all = exchange(*pg, host_device, mine);
  int64_t id = 0;
  std::vector<Identity> identities;
  for (const Hello& hello : all) {
    id = std::max(id, hello.last_id + 1);
    identities.push_back(hello.identity);
  }
  last_id = id;

  std::shared_ptr<Transport> made;
  if (device.is_cpu() && options.choice != Options::C10d) {
    const auto all_gather = [&](const void* bytes, size_t n, void* out) { group_all_gather(*pg, host_device, bytes, n, out); };
    std::string why;
    made = make_shm_transport({pg->getRank(), pg->getSize(), id, identities, all_gather}, options, &why);
    DS_CHECK(made || options.choice != Options::Shm, "make_transport: shared memory was asked for, but " << why);
  }
  DS_CHECK_VALUE(device.is_cpu() || options.choice != Options::Shm, "make_transport: shared memory is for CPU ranks only");
  if (!made) {
    std::vector<Peer> peers;
    for (const Identity& identity : identities) peers.emplace_back(identity);
    made = device.is_cpu() ? make_gloo_transport(pg, id, std::move(peers), options)
                           : make_nccl_transport(pg, device, host_device, id, std::move(peers), options);
  }
  Registry::add(made);
  return made;
}

}  // namespace ds::comm
