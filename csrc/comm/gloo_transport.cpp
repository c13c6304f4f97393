// SPDX-License-Identifier: Apache-2.0
// CPU ranks that cannot meet in shared memory. Reductions are an all-to-all plus a local sum in rank order: Gloo's own
// reduce_scatter costs twice its all_reduce, and its order of summation depends on the algorithm.
#include <ATen/ops/empty.h>

#include <cstring>
#include <deque>

#include "comm/c10d_transport.h"
#include "comm/checks.h"
#include "comm/ledger.h"
#include "comm/memory.h"
#include "comm/registry.h"

namespace ds::comm {
namespace {

using C10dWork = c10::intrusive_ptr<c10d::Work>;

class GlooTransport;

// Gloo writes into `temp`, never into the caller's memory: a dropped work may outlive that.
class GlooGather : public Work {
 public:
  GlooGather(std::shared_ptr<GlooTransport> transport, C10dWork work, at::Tensor temp, std::vector<GatherPiece> pieces,
             std::shared_ptr<SymmetricBuffer> src, const char* own, size_t part_bytes, int64_t seq)
      : transport_(std::move(transport)), work_(std::move(work)), temp_(std::move(temp)), pieces_(std::move(pieces)),
        src_(std::move(src)), own_(own), part_bytes_(part_bytes), seq_(seq) {}
  bool test() override;
  void wait() override;

 private:
  void finish();
  std::shared_ptr<GlooTransport> transport_;
  C10dWork work_;
  at::Tensor temp_;
  std::vector<GatherPiece> pieces_;
  std::shared_ptr<SymmetricBuffer> src_;
  const char* own_;
  size_t part_bytes_;
  int64_t seq_;
  bool done_ = false;
};

class GlooReduce : public ReduceWork {
 public:
  bool test() override;
  void wait() override;
  bool drained() override { return test(); }  // complete means sent
  void wait_drained() override { wait(); }

  std::weak_ptr<GlooTransport> transport;  // weak: the transport's queues hold its works
  C10dWork work;
  at::Tensor received;
  std::shared_ptr<SymmetricBuffer> bucket;
  size_t part_bytes = 0;
  int channel = 0;
  int64_t seq = 0;
  ReduceSink sink;
  bool done = false;
};

class GlooTransport : public C10dTransport {
 public:
  GlooTransport(c10::intrusive_ptr<c10d::ProcessGroup> pg, int64_t id, std::vector<Peer> peers, const Options& options)
      : C10dTransport(std::move(pg), at::kCPU, at::kCPU, id, std::move(peers), options), queues_(options.max_channels) {}

  const char* name() const override { return "gloo"; }

  std::shared_ptr<SymmetricBuffer> make_buffer(size_t bytes, const std::string& folder) override { return memory_.allocate(bytes, folder); }

  std::shared_ptr<Work> all_gather(void* out, SymmetricBuffer& src, size_t offset, size_t stride, size_t bytes,
                                   const Tag& tag) override {
    std::vector<GatherPiece> pieces;
    for (int r = 0; r < size_; ++r) pieces.push_back({static_cast<char*>(out) + r * bytes, r, 0, bytes});
    return all_gather_pieces(std::move(pieces), src, offset, stride, bytes, tag);
  }

  std::shared_ptr<Work> all_gather_pieces(std::vector<GatherPiece> pieces, SymmetricBuffer& src, size_t offset, size_t stride,
                                          size_t bytes, const Tag& tag) override {
    check_gather(src, offset, stride, bytes, size_);
    check_pieces(pieces, bytes, size_);
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    const int64_t seq = ledger_->begin("all_gather", tag, static_cast<int64_t>(bytes) * size_);
    char* own = static_cast<char*>(src.data()) + offset + rank_ * stride;
    at::Tensor temp = take(bytes * size_);
    C10dWork work;
    if (bytes != 0) {
      at::Tensor input = byte_view(own, bytes, at::kCPU, src.shared_from_this());
      work = pg_->_allgather_base(temp, input);
    }
    return std::make_shared<GlooGather>(self(), std::move(work), std::move(temp), std::move(pieces), src.shared_from_this(), own,
                                        bytes, seq);
  }

  std::shared_ptr<ReduceWork> reduce_scatter(SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel, DType dtype,
                                             ReduceSink sink, const Tag& tag) override {
    check_reduce(bucket, offset, part_bytes, channel, options_.max_channels, dtype, size_);
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    auto reduce = std::make_shared<GlooReduce>();
    reduce->seq = ledger_->begin("reduce_scatter", tag, static_cast<int64_t>(part_bytes) * size_);
    reduce->bucket = bucket.shared_from_this();
    reduce->part_bytes = part_bytes;
    reduce->channel = channel;
    reduce->sink = std::move(sink);
    reduce->transport = self();
    reduce->received = take(part_bytes * size_);
    if (part_bytes != 0) {
      at::Tensor input = byte_view(static_cast<char*>(bucket.data()) + offset, part_bytes * size_, at::kCPU, reduce->bucket);
      std::vector<int64_t> equal;
      reduce->work = pg_->alltoall_base(reduce->received, input, equal, equal);
    }
    queues_[channel].push_back(reduce);
    ++outstanding_;
    return reduce;
  }

  void broadcast(void* data, size_t bytes, int src, const Tag& tag) override {
    DS_CHECK_VALUE(src >= 0 && src < size_, "broadcast: source rank " << src << " of " << size_);
    const int64_t seq = ledger_->begin("broadcast", tag, static_cast<int64_t>(bytes));
    if (bytes != 0) {
      std::vector<at::Tensor> tensors{byte_view(data, bytes, at::kCPU, nullptr)};
      c10d::BroadcastOptions options;
      options.rootRank = src;
      await(*pg_->broadcast(tensors, options), seq);
    }
    ledger_->end(seq);
  }

  bool complete(const C10dWork& work) { return !work || work->isCompleted(); }

  // Runs the sinks of the channel's completed head works; up to and including `last`, waiting, when that is given.
  void advance(int channel, GlooReduce* last) {
    std::unique_lock<std::recursive_mutex> lock(mutex_);
    if (in_sink_) return;
    auto& queue = queues_[channel];
    while (!queue.empty() && (last == nullptr || !last->done)) {
      auto head = queue.front();
      if (!complete(head->work)) {
        if (last == nullptr) return;
        lock.unlock();
        await(*head->work, head->seq);
        lock.lock();
        continue;
      }
      if (head->work) await(*head->work, head->seq);  // rethrows what failed
      queue.pop_front();
      --outstanding_;
      run_sink(*head);
    }
  }

  void give(at::Tensor temp) {
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (pool_.size() < 8) pool_.push_back(std::move(temp));
  }
  void settle(int64_t seq) { ledger_->end(seq); }

 private:
  std::shared_ptr<GlooTransport> self() { return std::static_pointer_cast<GlooTransport>(shared_from_this()); }

  void do_progress() override {
    for (int channel = 0; channel < options_.max_channels; ++channel) advance(channel, nullptr);
  }

  void run_sink(GlooReduce& head) {
    std::vector<const void*> srcs;
    for (int r = 0; r < size_; ++r)
      srcs.push_back(static_cast<const char*>(head.received.data_ptr()) + r * head.part_bytes);
    in_sink_ = true;
    struct Leave {
      bool& flag;
      ~Leave() { flag = false; }
    } leave{in_sink_};
    head.sink(srcs.data(), size_);
    head.done = true;
    ledger_->end(head.seq);
    give(std::move(head.received));
    head.work.reset();
    head.bucket.reset();
    head.sink = nullptr;
  }

  // The smallest pooled tensor that is large enough, cut to size.
  at::Tensor take(size_t bytes) {
    auto best = pool_.end();
    for (auto it = pool_.begin(); it != pool_.end(); ++it)
      if (it->storage().nbytes() >= bytes && (best == pool_.end() || it->storage().nbytes() < best->storage().nbytes())) best = it;
    if (best == pool_.end()) {
      if (!pool_.empty()) pool_.erase(pool_.begin());  // do not collect sizes that are no longer asked for
      return at::empty({static_cast<int64_t>(bytes)}, at::kByte);
    }
    at::Tensor found = std::move(*best);
    pool_.erase(best);
    return found.set_(found.storage(), 0, {static_cast<int64_t>(bytes)}, {1});
  }

  HostMemory memory_;
  std::vector<std::deque<std::shared_ptr<GlooReduce>>> queues_;
  std::vector<at::Tensor> pool_;
  bool in_sink_ = false;
};

bool GlooGather::test() {
  if (done_) return true;
  transport_->progress();
  if (!transport_->complete(work_)) return false;
  wait();
  return true;
}

void GlooGather::wait() {
  if (done_) return;
  transport_->progress();
  if (work_) transport_->await(*work_, seq_);
  finish();
}

void GlooGather::finish() {
  const char* all = static_cast<const char*>(temp_.data_ptr());
  for (const auto& piece : pieces_) {
    const bool in_place = piece.rank == transport_->rank() && piece.out == own_ + piece.offset;
    if (!in_place && piece.bytes != 0) std::memcpy(piece.out, all + piece.rank * part_bytes_ + piece.offset, piece.bytes);
  }
  done_ = true;
  work_.reset();
  transport_->give(std::move(temp_));
  transport_->settle(seq_);
  src_.reset();
  transport_.reset();
}

bool GlooReduce::test() {
  if (done) return true;
  if (auto keep = transport.lock()) keep->advance(channel, nullptr);
  return done;
}

void GlooReduce::wait() {
  if (done) return;
  auto keep = transport.lock();
  DS_CHECK(keep, "reduce_scatter: its transport was destroyed before it completed");
  keep->advance(channel, this);
  DS_CHECK(done, "reduce_scatter: a sink must not wait for a reduction");
}

}  // namespace

std::shared_ptr<Transport> make_gloo_transport(c10::intrusive_ptr<c10d::ProcessGroup> pg, int64_t id, std::vector<Peer> peers,
                                               const Options& options) {
  return std::make_shared<GlooTransport>(std::move(pg), id, std::move(peers), options);
}

}  // namespace ds::comm
