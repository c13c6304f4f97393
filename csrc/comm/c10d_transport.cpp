// SPDX-License-Identifier: Apache-2.0
#include "comm/c10d_transport.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <thread>

#include "comm/checks.h"
#include "comm/combine.h"
#include "comm/ledger.h"
#include "comm/stall.h"

namespace ds::comm {
namespace {

constexpr auto kSlice = std::chrono::milliseconds(100);

at::TensorOptions bytes_on(at::Device device) { return at::TensorOptions().dtype(at::kByte).device(device); }

bool poll_slice(c10d::Work& work) {
  constexpr std::chrono::microseconds longest{1000};
  const auto end = std::chrono::steady_clock::now() + kSlice;
  for (std::chrono::microseconds pause{0}; !work.isCompleted(); pause = std::min(2 * pause + std::chrono::microseconds(10), longest)) {
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(pause);
  }
  if (std::exception_ptr error = work.exception()) std::rethrow_exception(error);
  work.wait();  // complete: orders the current stream after it
  return true;
}

}  // namespace

bool wait_slice(c10d::Work& work, at::Device device) {
  if (!device.is_cpu()) return poll_slice(work);
  // wait(timeout) throws both at the end of the slice and on failure. What completes between the end of the slice and our look
  // is waited for once more: that returns at once or throws the true reason.
  try {
    work.wait(kSlice);
    return true;
  } catch (...) {
    if (!work.isCompleted()) return false;
  }
  work.wait();
  return true;
}

at::Tensor byte_view(void* data, size_t bytes, at::Device device, std::shared_ptr<SymmetricBuffer> keep) {
  return at::from_blob(data, {static_cast<int64_t>(bytes)}, {1}, [keep](void*) {}, bytes_on(device), device);
}

void group_all_gather(c10d::ProcessGroup& pg, at::Device device, const void* mine, size_t bytes, void* out) {
  const auto n = static_cast<int64_t>(bytes);
  if (n == 0) return;
  at::Tensor input = at::empty({n}, bytes_on(at::kCPU));
  std::memcpy(input.data_ptr(), mine, bytes);
  input = input.to(device);
  at::Tensor output = at::empty({n * pg.getSize()}, bytes_on(device));
  pg._allgather_base(output, input)->wait();
  output = output.to(at::kCPU);
  std::memcpy(out, output.data_ptr(), bytes * static_cast<size_t>(pg.getSize()));
}

C10dTransport::C10dTransport(c10::intrusive_ptr<c10d::ProcessGroup> pg, at::Device device, at::Device host_device, int64_t id,
                             std::vector<Peer> peers, const Options& options)
    : Transport(pg->getRank(), pg->getSize(), id, device.is_cpu() ? Device::Cpu : Device::Cuda, options),
      pg_(std::move(pg)),
      torch_device_(device),
      host_device_(host_device),
      peers_(std::move(peers)) {}

// We may be the group's last owner, and its destructor joins a thread that takes the GIL to free tensors.
C10dTransport::~C10dTransport() {
  release_guarded([this] { pg_.reset(); });
}

std::string C10dTransport::stall_text(int64_t seq) {
  const std::string dead = first_dead(peers_, rank_);
  return "rank " + std::to_string(rank_) + " of " + std::to_string(size_) + " in " + describe(ledger_->record(seq)) + " over " +
         name() + (dead.empty() ? "" : "; " + dead);
}

void C10dTransport::await(c10d::Work& work, int64_t seq) {
  const Ledger::Blocked blocked(*ledger_, seq);
  StallWatch watch(options_);
  try {
    while (!wait_slice(work, host_device_)) {
      watch.tick([&] { return stall_text(seq); });
      const std::string dead = first_dead(peers_, rank_);
      // Its connection is closed by now; grant the carrier a slice to say so or to finish with what had arrived.
      if (!dead.empty() && !wait_slice(work, host_device_)) DS_FAIL(dead << " during " << stall_text(seq));
    }
  } catch (const ds::Error&) {
    ledger_->end(seq, CollectiveState::Failed);
    throw;
  } catch (const c10::Error& error) {
    carrier_failed(seq, error.what_without_backtrace());
  } catch (const std::runtime_error& error) {
    carrier_failed(seq, error.what());
  }
}

void C10dTransport::carrier_failed(int64_t seq, const std::string& text) {
  ledger_->end(seq, CollectiveState::Failed);
  // A dying process closes its connections before it is seen to be dead.
  std::string dead;
  for (int i = 0; i < 50 && (dead = first_dead(peers_, rank_)).empty(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  DS_FAIL(stall_text(seq) << " failed: " << text);
}

void C10dTransport::gather_host(const void* mine, size_t bytes, void* out, int64_t seq) {
  const auto n = static_cast<int64_t>(bytes);
  at::Tensor input = at::empty({n}, bytes_on(at::kCPU));
  std::memcpy(input.data_ptr(), mine, bytes);
  input = input.to(host_device_);
  at::Tensor output = at::empty({n * size_}, bytes_on(host_device_));
  await(*pg_->_allgather_base(output, input), seq);
  output = output.to(at::kCPU);
  std::memcpy(out, output.data_ptr(), bytes * static_cast<size_t>(size_));
}

void C10dTransport::all_gather_host(const void* mine, size_t bytes, void* out, const Tag& tag) {
  const int64_t seq = ledger_->begin("all_gather_host", tag, static_cast<int64_t>(bytes) * size_);
  if (bytes != 0) gather_host(mine, bytes, out, seq);
  ledger_->end(seq);
}

void C10dTransport::all_reduce(double* values, int n, Op op, const Tag& tag) {
  DS_CHECK_VALUE(n >= 0, "all_reduce: n must not be negative, got " << n);
  const int64_t seq = ledger_->begin("all_reduce", tag, static_cast<int64_t>(sizeof(double)) * n);
  std::vector<double> mine(values, values + n), all(static_cast<size_t>(n) * size_);
  if (n == 0) mine.assign(1, 0), all.resize(size_);  // still a barrier
  gather_host(mine.data(), sizeof(double) * mine.size(), all.data(), seq);
  for (int i = 0; i < n; ++i) {
    double value = all[i];
    for (int r = 1; r < size_; ++r) value = combine(op, value, all[static_cast<size_t>(r) * n + i]);
    values[i] = value;
  }
  ledger_->end(seq);
}

void C10dTransport::barrier(const Tag& tag) {
  const int64_t seq = ledger_->begin("barrier", tag, 0);
  const char one = 1;
  std::vector<char> all(size_);
  gather_host(&one, 1, all.data(), seq);
  ledger_->end(seq);
}

}  // namespace ds::comm
