// SPDX-License-Identifier: Apache-2.0
// One rank: everything completes at issue.
#pragma once

#include <c10/core/Device.h>

#include "comm/memory.h"
#include "comm/transport.h"

namespace ds::comm {

class LocalTransport : public Transport {
 public:
  LocalTransport(int64_t id, std::unique_ptr<Memory> memory, const Options& options);

  const char* name() const override { return "local"; }
  bool needs_matching_order() const override { return false; }
  std::shared_ptr<SymmetricBuffer> make_buffer(size_t bytes, const std::string& folder) override;
  std::shared_ptr<Work> all_gather(void* out, SymmetricBuffer& src, size_t src_offset, size_t src_stride, size_t bytes,
                                   const Tag& tag) override;
  std::shared_ptr<Work> all_gather_pieces(std::vector<GatherPiece> pieces, SymmetricBuffer& src, size_t src_offset,
                                          size_t src_stride, size_t bytes, const Tag& tag) override;
  std::shared_ptr<ReduceWork> reduce_scatter(SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel, DType dtype,
                                             ReduceSink sink, const Tag& tag) override;
  void all_reduce(double* values, int n, Op op, const Tag& tag) override;
  void all_gather_host(const void* mine, size_t bytes, void* out, const Tag& tag) override;
  void broadcast(void* data, size_t bytes, int src, const Tag& tag) override;
  void barrier(const Tag& tag) override;

 protected:
  void account(const char* kind, const Tag& tag, size_t bytes);

 private:
  std::unique_ptr<Memory> memory_;
  std::shared_ptr<ReduceWork> done_;
};

// On an accelerator sinks run on a stream of their own, beside what the caller computes: they may copy to the host.
std::shared_ptr<Transport> make_local_device_transport(int64_t id, std::unique_ptr<Memory> memory, c10::Device device, const Options& options);

}  // namespace ds::comm
