// SPDX-License-Identifier: Apache-2.0
// Reductions: nothing is copied. A rank offers its bucket; whoever sees all offers calls its sink with pointers into
// everybody's memory.
#include "base/error.h"
#include "comm/checks.h"
#include "comm/shm/transport.h"

namespace ds::comm::shm {
namespace {

class Posted : public Condition {
 public:
  Posted(const Core& core, int channel, uint64_t number) : Condition(core.size), core_(core), channel_(channel), number_(number) {}
  bool waits_for(int r) const override {
    return core_.of(r).channels[channel_].posted.load(std::memory_order_acquire) < number_;
  }

 private:
  const Core& core_;
  const int channel_;
  const uint64_t number_;
};

class Done : public Condition {
 public:
  Done(const Core& core, int channel, uint64_t number) : Condition(core.size), core_(core), channel_(channel), number_(number) {}
  bool waits_for(int r) const override {
    return core_.of(r).channels[channel_].done.load(std::memory_order_acquire) < number_;
  }

 private:
  const Core& core_;
  const int channel_;
  const uint64_t number_;
};

}  // namespace

std::shared_ptr<ReduceWork> ShmTransport::reduce_scatter(SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel,
                                                         DType dtype, ReduceSink sink, const Tag& tag) {
  check_reduce(bucket, offset, part_bytes, channel, options_.max_channels, dtype, size_);
  auto mine = own_buffer(bucket, "reduce_scatter");
  auto work = std::make_shared<ShmReduce>();
  work->transport_ = std::static_pointer_cast<ShmTransport>(shared_from_this());
  work->channel_ = channel;
  work->sink_ = std::move(sink);
  work->seq_ = ledger_->begin("reduce_scatter", tag, static_cast<int64_t>(part_bytes) * size_);
  Queue& queue = queues_[channel];
  const uint64_t number = queue.issued + 1;
  if (number > kRing) {  // the ring's place must have been read by all
    Done free(*core_, channel, number - kRing);
    if (!free.ready()) wait_until(free, work->seq_);
  }
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  check_usable();
  queue.issued = number;
  work->number_ = number;
  Channel& words = core_->own().channels[channel];
  words.ring[number % kRing] = {mine->id(), offset, part_bytes, static_cast<uint64_t>(dtype)};
  queue.held.push_back({number, std::move(mine)});
  queue.waiting.push_back(work);
  ++outstanding_;
  words.posted.store(number, std::memory_order_release);
  core_->notify();
  advance();
  return work;
}

void ShmTransport::advance() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (in_sink_) return;
  check_usable();
  for (int channel = 0; channel < options_.max_channels; ++channel) advance_channel(channel);
}

void ShmTransport::advance_channel(int channel) {
  Queue& queue = queues_[channel];
  while (!queue.waiting.empty() && head_ready(channel, queue.waiting.front()->number_)) {
    const auto work = queue.waiting.front();
    queue.waiting.pop_front();
    --outstanding_;
    run(channel, *work);
    core_->own().channels[channel].done.store(work->number_, std::memory_order_release);
    core_->notify();
  }
  if (!queue.held.empty()) release_drained(channel);
}

bool ShmTransport::head_ready(int channel, uint64_t number) const { return Posted(*core_, channel, number).ready(); }

bool ShmTransport::all_done(int channel, uint64_t number) const { return Done(*core_, channel, number).ready(); }

void ShmTransport::release_drained(int channel) {
  auto& held = queues_[channel].held;
  while (!held.empty() && all_done(channel, held.front().number)) {
    held.pop_front();
  }
}

std::vector<ShmTransport::Contribution> ShmTransport::contributions(int channel, const ShmReduce& work) {
  const Offer& mine = core_->own().channels[channel].ring[work.number_ % kRing];
  std::vector<Contribution> parts;
  for (int r = 0; r < size_; ++r) {
    const Offer& offer = core_->of(r).channels[channel].ring[work.number_ % kRing];
    if (offer.part_bytes != mine.part_bytes || offer.dtype != mine.dtype)
      fail(work.seq_, "ranks disagree on " + describe(ledger_->record(work.seq_)) + ", channel " + std::to_string(channel) +
                          ": rank " + std::to_string(rank_) + " reduces parts of " + std::to_string(mine.part_bytes) + " bytes of " +
                          dtype_name(static_cast<DType>(mine.dtype)) + ", rank " + std::to_string(r) + " of " +
                          std::to_string(offer.part_bytes) + " bytes of " + dtype_name(static_cast<DType>(offer.dtype)));
    const auto found = buffers_.find(offer.buffer);
    const auto buffer = found == buffers_.end() ? nullptr : found->second.lock();
    if (!buffer)
      fail(work.seq_, "rank " + std::to_string(r) + " reduces a buffer that rank " + std::to_string(rank_) + " has released");
    parts.push_back({buffer, offer.offset + static_cast<size_t>(rank_) * offer.part_bytes});
  }
  return parts;
}

void ShmTransport::run(int channel, ShmReduce& work) {
  const std::vector<Contribution> parts = contributions(channel, work);
  std::vector<const void*> srcs;
  for (int r = 0; r < size_; ++r) srcs.push_back(parts[r].buffer->data_of(r) + parts[r].offset);
  struct InSink {
    bool& flag;
    explicit InSink(bool& f) : flag(f) { flag = true; }
    ~InSink() { flag = false; }
  } in_sink(in_sink_);
  try {
    const ReduceSink sink = std::move(work.sink_);
    work.sink_ = nullptr;
    sink(srcs.data(), size_);
  } catch (const std::exception& error) {
    failure_ = "the sink of " + describe(ledger_->record(work.seq_)) + " raised: " + error.what();
    ledger_->end(work.seq_, CollectiveState::Failed);
    core_->leave(RankState::Failed, failure_);
    throw;
  }
  const size_t bytes = core_->own().channels[channel].ring[work.number_ % kRing].part_bytes;
  for (int r = 0; r < size_; ++r) parts[r].buffer->was_read(r, parts[r].offset, bytes);
  ledger_->end(work.seq_);
  work.done_.store(true, std::memory_order_release);
}

bool ShmReduce::test() {
  if (done_.load(std::memory_order_acquire)) return true;
  if (auto transport = transport_.lock()) transport->advance();
  return done_.load(std::memory_order_acquire);
}

void ShmReduce::wait() {
  if (test()) return;
  auto transport = transport_.lock();
  DS_CHECK(transport, "reduce_scatter: its transport was destroyed before it completed");
  Posted posted(transport->core(), channel_, number_);
  transport->wait_until(posted, seq_);
  transport->advance();
  DS_CHECK(done_.load(), "reduce_scatter: a sink must not wait for a reduction");
}

bool ShmReduce::drained() {
  if (drained_.load(std::memory_order_relaxed)) return true;
  if (!test()) return false;
  auto transport = transport_.lock();
  const bool yes = !transport || transport->all_done(channel_, number_);
  if (yes) drained_.store(true, std::memory_order_relaxed);
  return yes;
}

void ShmReduce::wait_drained() {
  if (drained()) return;
  wait();
  if (auto transport = transport_.lock()) {
    Done done(transport->core(), channel_, number_);
    transport->wait_until(done, seq_);
  }
  drained_.store(true, std::memory_order_relaxed);
}

}  // namespace ds::comm::shm
