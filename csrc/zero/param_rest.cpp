// SPDX-License-Identifier: Apache-2.0
// Where parameters lie that are not in use: memory that peers gather from, mapped files, or the host of an accelerator.
#include "zero/param_store.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <future>

#include "base/checked.h"
#include "comm/memory.h"
#include "plan/reserve.h"
#include "platform/memory.h"

namespace ds::zero {
namespace {

// Copies that a thread of the store makes ready and enqueues on a stream of its own.
class Upload : public comm::Work {
 public:
  Upload(std::shared_future<void> enqueued, std::shared_ptr<c10::Event> done, at::Device device)
      : enqueued_(std::move(enqueued)), done_(std::move(done)), device_(device) {}
  ~Upload() override {
    if (waited_) return;
    enqueued_.wait();
    try {
      block();   // the memory goes back to where the current stream takes it from
    } catch (...) {   // the driver is shutting down
    }
  }
  bool test() override {
    return enqueued_.wait_for(std::chrono::seconds(0)) == std::future_status::ready && (!done_ || done_->query());
  }
  void wait() override {
    waited_ = true;
    enqueued_.get();   // throws what the thread has thrown
    block();
  }

 private:
  void block() {
    if (done_) done_->block(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }

  std::shared_future<void> enqueued_;
  std::shared_ptr<c10::Event> done_;   // null on the CPU, whose copies are over when they return
  const at::Device device_;
  bool waited_ = false;
};

}  // namespace

std::pair<std::shared_ptr<comm::SymmetricBuffer>, int64_t> ParamStore::allocate_home(int64_t bytes, const std::string& folder) {
  const int64_t size = round_up(bytes, plan::kReservePageBytes);
  Chunk& chunk = folder.empty() ? memory_chunk_ : file_chunk_;
  if (!chunk.buffer || chunk.used_bytes + size > static_cast<int64_t>(chunk.buffer->bytes())) {
    chunk.buffer = groups_.shard->allocate(static_cast<size_t>(std::max(size, plan::kHomeChunkBytes)), folder);
    chunk.used_bytes = 0;
  }
  const int64_t offset = chunk.used_bytes;
  chunk.used_bytes += size;
  return {chunk.buffer, offset};
}

bool ParamStore::in_file(int index) const { return in_file(flats_.at(index)); }

bool ParamStore::in_file(const Flat& flat) const {
  return flat.home ? flat.home->in_file() : options_.parameter_rest && flat.shard.defined() && options_.parameter_rest->in_file(flat.shard);
}

void ParamStore::leave_file(Flat& flat) {
  if (options_.parameter_rest && flat.shard.defined()) options_.parameter_rest->leave(flat.shard);
  if (!flat.home || !flat.home->in_file()) return;
  const int64_t es = static_cast<int64_t>(c10::elementSize(flat.dtype));
  const int64_t numel = options_.shard_params ? flat.layout.shard_numel : flat.layout.numel();
  platform::unmap_pages(static_cast<char*>(flat.home->data()) + flat.home_offset_bytes, static_cast<size_t>(numel * es));
}

void ParamStore::leave_files() {
  for (Flat& flat : flats_) leave_file(flat);
}

void ParamStore::expect(int index) {
  // One rank waits for nobody: it may begin whatever the others do.
  if (options_.parameter_rest && world() == 1) gather(index, "gather_ahead", /*prefetch=*/true);
  if (options_.folder.empty() && !options_.parameter_rest) return;
  Unit& unit = units_.at(index);
  if (!options_.shard_params || unit.state != UnitState::Sharded) return;
  for (int f : unit.flats) {
    const Flat& flat = flats_[f];
    if (flat.home && flat.home->in_file()) platform::prefetch_pages(flat.shard.data_ptr(), flat.shard.nbytes());
    if (!flat.home) options_.parameter_rest->expect(flat.shard);
  }
}

// Everybody's shards to flat.full. A shard on the host goes to its place there first.
void ParamStore::start_gather(Flat& flat, const char* phase, const std::shared_ptr<c10::Event>& free_since) {
  const int64_t shard_bytes = flat.shard.numel() * static_cast<int64_t>(flat.shard.element_size());
  const comm::Tag t = tag(phase, flat.unit, shard_bytes);
  if (flat.home) {
    flat.gathering = groups_.shard->all_gather(flat.full.data_ptr(), *flat.home, static_cast<size_t>(flat.home_offset_bytes), 0,
                                               static_cast<size_t>(shard_bytes), t);
    return;
  }
  flat.gathering = start_upload(flat, free_since);
  if (world() == 1) return;
  std::optional<c10::StreamGuard> beside;
  if (upload_stream_) beside.emplace(*upload_stream_);
  flat.gathering->wait();   // the gather follows it on that stream
  const auto where = device_.is_cpu() ? comm::Device::Cpu : comm::Device::Cuda;
  const auto whole = comm::borrow(flat.full.data_ptr(), static_cast<size_t>(shard_bytes * world()), where, std::max<int>(device_.index(), 0),
                                  std::make_shared<at::Tensor>(flat.buffer));
  flat.gathering = groups_.shard->all_gather(flat.full.data_ptr(), *whole, 0, static_cast<size_t>(shard_bytes), static_cast<size_t>(shard_bytes), t);
}

// Beside what the caller and the device do: a thread copies into staging memory, a stream of its own takes it from there as soon as nobody uses
// flat.full's memory any more.
std::shared_ptr<comm::Work> ParamStore::start_upload(Flat& flat, const std::shared_ptr<c10::Event>& free_since) {
  if (!uploads_) uploads_ = std::make_unique<optim::StagingRing>(device_, options_.parameter_rest->pinned(), plan::kShardBuffers);
  std::shared_ptr<c10::Event> done;
  if (!device_.is_cpu()) {
    if (!upload_stream_) upload_stream_ = c10::impl::VirtualGuardImpl(device_.type()).getStreamFromGlobalPool(device_, /*isHighPriority=*/true);
    done = std::make_shared<c10::Event>(device_.type());
  }
  const auto task = std::make_shared<std::packaged_task<void()>>(
      [this, free_since, done, to = flat.full.narrow(0, rank() * flat.layout.shard_numel, flat.layout.shard_numel), shard = flat.shard]() mutable {
        at::NoGradGuard no_grad;
        std::optional<c10::StreamGuard> beside;
        if (upload_stream_) beside.emplace(*upload_stream_);
        if (free_since) free_since->block(*upload_stream_);
        uploads_->send(to, shard);
        options_.parameter_rest->leave(shard);
        if (done) done->record(*upload_stream_);
        to = shard = at::Tensor();   // before anybody hears of the end
      });
  const std::shared_future<void> enqueued = task->get_future().share();
  uploader_.submit([task] { (*task)(); });
  return std::make_shared<Upload>(enqueued, done, device_);
}

}  // namespace ds::zero
