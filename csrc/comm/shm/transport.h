// SPDX-License-Identifier: Apache-2.0
// The shared-memory carrier. shm/wait.cpp: blocking; shm/reduce.cpp: reductions; shm/rounds.cpp: small collectives;
// shm/gather.cpp: gathers.
#pragma once

#include <deque>
#include <mutex>
#include <unordered_map>

#include "comm/shm/buffer.h"
#include "comm/shm/wait.h"

namespace ds::comm::shm {

class ShmTransport;

class ShmReduce : public ReduceWork {
 public:
  bool test() override;
  void wait() override;
  bool drained() override;
  void wait_drained() override;

 private:
  friend class ShmTransport;
  // Weak: the transport's queues hold its works. A transport that is gone waits for nobody.
  std::weak_ptr<ShmTransport> transport_;
  int64_t seq_ = 0;     // in the ledger
  int channel_ = 0;
  uint64_t number_ = 0;  // on the channel
  ReduceSink sink_;
  std::atomic<bool> done_{false};
  std::atomic<bool> drained_{false};
};

class ShmTransport : public Transport {
 public:
  ShmTransport(std::shared_ptr<Core> core, int64_t id, const Options& options);
  ~ShmTransport() override;

  const char* name() const override { return "shm"; }
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

  // ---- for the works ----
  Core& core() const { return *core_; }
  void advance();                                        // outstanding reductions; throws if this transport has failed
  void wait_until(Condition& condition, int64_t seq);    // blocks, advancing; holds no lock while it sleeps
  void end(int64_t seq) { ledger_->end(seq); }
  bool all_done(int channel, uint64_t number) const;     // every rank has read reduction `number`
  [[noreturn]] void fail(int64_t seq, const std::string& reason);  // tells the peers, then throws

 private:
  struct Held {  // a bucket that peers may still read
    uint64_t number;
    std::shared_ptr<ShmBuffer> bucket;
  };
  struct Queue {
    uint64_t issued = 0;
    std::deque<std::shared_ptr<ShmReduce>> waiting;  // sinks not called yet
    std::deque<Held> held;
  };

  void do_progress() override { advance(); }
  std::shared_ptr<ShmBuffer> own_buffer(SymmetricBuffer& buffer, const char* what) const;
  void check_usable() const;

  // wait.cpp
  bool spin(Condition& condition);
  void sleep(Condition& condition, int64_t seq);
  void check_peers(Condition& condition, int64_t seq, bool look_at_processes);
  std::string stall_text(Condition& condition, int64_t seq) const;
  bool progress_others() const;

  // reduce.cpp, under the lock
  void advance_channel(int channel);
  bool head_ready(int channel, uint64_t number) const;
  void run(int channel, ShmReduce& work);
  void release_drained(int channel);
  struct Contribution {
    std::shared_ptr<ShmBuffer> buffer;
    size_t offset;
  };
  std::vector<Contribution> contributions(int channel, const ShmReduce& work);  // one a rank

  // rounds.cpp
  uint64_t enter_round(uint64_t kind, const void* mine, size_t filled, size_t bytes);
  void finish_round(uint64_t round, uint64_t kind, size_t bytes, int64_t seq);
  const char* round_data(uint64_t round, int r) const;
  std::vector<std::shared_ptr<File>> exchange_files(size_t bytes, const std::string& folder);  // collective: every rank's part, opened

  std::shared_ptr<Core> core_;
  std::recursive_mutex mutex_;
  std::string failure_;  // why nothing works any more
  bool in_sink_ = false;
  std::vector<Queue> queues_;
  std::unordered_map<uint64_t, std::weak_ptr<ShmBuffer>> buffers_;
  const bool spins_;  // every rank has a core: spinning steals from nobody
};

}  // namespace ds::comm::shm
