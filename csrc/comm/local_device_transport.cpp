// SPDX-License-Identifier: Apache-2.0
#include "comm/checks.h"
#include "comm/local_transport.h"
#include "comm/stream_work.h"

namespace ds::comm {
namespace {

class LocalDeviceTransport : public LocalTransport {
 public:
  LocalDeviceTransport(int64_t id, std::unique_ptr<Memory> memory, c10::Device device, const Options& options)
      : LocalTransport(id, std::move(memory), options),
        torch_device_(device),
        stream_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, /*isHighPriority=*/true)) {}

  std::shared_ptr<ReduceWork> reduce_scatter(SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel, DType dtype, ReduceSink sink,
                                             const Tag& tag) override {
    check_reduce(bucket, offset, part_bytes, channel, options_.max_channels, dtype, 1);
    account("reduce_scatter", tag, part_bytes);
    auto work = std::make_shared<StreamWork>(torch_device_, bucket.shared_from_this());
    after_current_stream(stream_);
    {
      const c10::StreamGuard guard(stream_);
      const void* src = static_cast<const char*>(bucket.data()) + offset;
      sink(&src, 1);
      work->mark_read(stream_);
      work->mark_reached(stream_);
    }
    return work;
  }

 private:
  const c10::Device torch_device_;
  const c10::Stream stream_;
};

}  // namespace

std::shared_ptr<Transport> make_local_device_transport(int64_t id, std::unique_ptr<Memory> memory, c10::Device device, const Options& options) {
  return std::make_shared<LocalDeviceTransport>(id, std::move(memory), device, options);
}

}  // namespace ds::comm
