// SPDX-License-Identifier: Apache-2.0
// What the carriers on torch's process groups share: host collectives and the watched wait.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <mutex>

#include "comm/liveness.h"
#include "comm/transport.h"

namespace ds::comm {

// All ranks' bytes through a process group, before there is a transport. `device` is where its backend wants tensors.
void group_all_gather(c10d::ProcessGroup& pg, at::Device device, const void* mine, size_t bytes, void* out);

// A uint8 view of memory that somebody else owns; `keep` is released with the last view.
at::Tensor byte_view(void* data, size_t bytes, at::Device device, std::shared_ptr<SymmetricBuffer> keep);

// Waits for at most a tenth of a second; true when `work` is complete, throws what it failed with. `device`: of its tensors. On the
// CPU this is c10d's own wait(timeout). On CUDA that would abort the communicator when a peer is merely late, so it polls.
bool wait_slice(c10d::Work& work, at::Device device);

class C10dTransport : public Transport {
 public:
  ~C10dTransport() override;
  bool needs_matching_order() const override { return true; }
  void all_reduce(double* values, int n, Op op, const Tag& tag) override;
  void all_gather_host(const void* mine, size_t bytes, void* out, const Tag& tag) override;
  void barrier(const Tag& tag) override;

  // Blocks until `work` is complete; a failure names the collective and, where it can be known, the dead rank.
  void await(c10d::Work& work, int64_t seq);

 protected:
  C10dTransport(c10::intrusive_ptr<c10d::ProcessGroup> pg, at::Device device, at::Device host_device, int64_t id,
                std::vector<Peer> peers, const Options& options);
  void gather_host(const void* mine, size_t bytes, void* out, int64_t seq);
  std::string stall_text(int64_t seq);
  [[noreturn]] void carrier_failed(int64_t seq, const std::string& text);  // names the dead rank, too, if one died

  // Recursive: a sink may call test() on other works.
  std::recursive_mutex mutex_;
  c10::intrusive_ptr<c10d::ProcessGroup> pg_;
  const at::Device torch_device_;
  const at::Device host_device_;  // where host bytes travel: the CPU, or the GPU when the group has no CPU backend
  std::vector<Peer> peers_;
};

std::shared_ptr<Transport> make_gloo_transport(c10::intrusive_ptr<c10d::ProcessGroup> pg, int64_t id, std::vector<Peer> peers,
                                               const Options& options);
std::shared_ptr<Transport> make_nccl_transport(c10::intrusive_ptr<c10d::ProcessGroup> pg, at::Device device,
                                               at::Device host_device, int64_t id, std::vector<Peer> peers,
                                               const Options& options);

}  // namespace ds::comm
