// SPDX-License-Identifier: Apache-2.0
// How the ranks of one group exchange bytes. Four carriers behind one interface:
//   local (one rank), shm (ranks of one host, CPU), gloo (CPU), nccl (CUDA).
//
// Note [Who drives]. No carrier needs a helper thread of ours. Gathers of shm copy in the thread that waits for them;
// reductions advance in every call that enters a transport (issue, test, wait, progress). So a ReduceSink may run inside
// any call on any transport of this process, always on the calling thread, never concurrently with another sink of the
// same transport; it must not issue collectives. On CUDA the sink runs at issue, with the communication stream current,
// and only enqueues kernels.
//
// Note [Lifetime]. Destructors never communicate. A rank that destroys its transport, raises or dies makes the others'
// waits fail with an error that names it; a normal end needs a barrier() first only if someone may still read its data.
//
// Torch-free on purpose (at::Tensor is only named), so that whoever includes it compiles quickly.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace at {
class Tensor;
}

namespace ds::comm {

// Names a collective for counting, logging and the stall message. `phase` must outlive the transport (a literal, or intern()).
struct Tag {
  int64_t step = -1;
  const char* phase = "";
  int unit = -1;
  int64_t bytes = 0;  // 0: the transport fills in what the collective moves
};

const char* intern(const std::string& phase);  // one pointer per text, valid for the life of the process

enum class Op : uint8_t { Sum, Max, Min };

enum class Device : uint8_t { Cpu, Cuda };

// Memory that exists with the same size on every rank of the transport.
class SymmetricBuffer : public std::enable_shared_from_this<SymmetricBuffer> {
 public:
  virtual ~SymmetricBuffer() = default;
  SymmetricBuffer(const SymmetricBuffer&) = delete;
  SymmetricBuffer& operator=(const SymmetricBuffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Device device() const { return device_; }
  int device_index() const { return device_index_; }  // 0 on CPU

  // A one-dimensional uint8 view of the whole buffer; it (and every view of it) keeps the buffer alive.
  at::Tensor tensor();

  // "My contents are final until I next publish": epoch += 1. Peers may then gather from me. Rewriting what peers gather
  // while one of them may still be reading is the caller's error; shm notices most such races and throws on the reader.
  virtual void publish() { ++epoch_; }
  int64_t epoch() const { return epoch_; }
  virtual bool in_file() const { return false; }   // the bytes rest in a file

 protected:
  SymmetricBuffer(void* data, size_t bytes, Device device, int device_index)
      : data_(data), bytes_(bytes), device_(device), device_index_(device_index) {}

  void* data_;
  size_t bytes_;
  Device device_;
  int device_index_;
  int64_t epoch_ = 0;
};

class Work {
 public:
  virtual ~Work() = default;
  virtual bool test() = 0;  // progresses without blocking; true when complete
  virtual void wait() = 0;  // CPU: blocks until complete. CUDA: makes the current stream wait, the host goes on.
};

// test()/wait(): my sink has been called. drained(): every peer has also read my bucket region, so it may be overwritten
// (on CUDA: by work enqueued on the stream that was current in wait_drained()).
class ReduceWork : public Work {
 public:
  virtual bool drained() = 0;
  virtual void wait_drained() = 0;
};

// One pointer per contribution in rank order (all ranks for shm and gloo), or one pre-summed pointer (nccl, one rank).
// Valid only during the call.
using ReduceSink = std::function<void(const void* const* srcs, int nsrc)>;

// A piece of a gathered region: `bytes` at `offset` inside rank's part go to `out`. out == own source address: left alone.
struct GatherPiece {
  void* out;
  int rank;
  size_t offset;
  size_t bytes;
};

struct Counter {
  int64_t number = 0;
  int64_t bytes = 0;  // full payload: size * part for gathers and reductions
};

enum class CollectiveState : uint8_t { Issued, Done, Failed };

struct CollectiveRecord {
  int64_t seq = 0;    // 1-based, per transport
  int64_t order = 0;  // 1-based among those that all ranks issue in the same order; 0: no order needed
  const char* kind = "";
  Tag tag;
  double start_s = 0;  // seconds since the Unix epoch, comparable among ranks of a host
  double end_s = 0;    // 0 while not done
  double waited_s = 0; // how long threads were blocked in it
  CollectiveState state = CollectiveState::Issued;
};

struct Options {
  enum Choice { Auto, Shm, C10d };
  Choice choice = Auto;
  int max_channels = 4;
  double timeout_s = 600;  // a wait longer than this throws, naming the collective and the missing ranks
  double warn_s = 30;      // a wait longer than this is reported to the stall handler, and again at each doubling
  bool deny_proc = false;     // for tests: as if /proc/<pid>/fd could not be opened
  bool deny_sockets = false;  // for tests: as if file descriptors could not be passed over a Unix socket
};

class Ledger;

class Transport : public std::enable_shared_from_this<Transport> {
 public:
  virtual ~Transport();
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t id() const { return id_; }  // the same on all ranks, unlike that of any other transport of this process
  Device device() const { return device_; }
  int max_channels() const { return options_.max_channels; }
  virtual const char* name() const = 0;  // "local", "shm", "gloo", "nccl"

  // True: all_gather, too, must be issued by all ranks in the same order (c10d). False: each rank gathers what it needs.
  virtual bool needs_matching_order() const = 0;

  // Collective: same order and size on every rank. Zero-filled, untouched pages not resident; CPU: page-aligned (2 MB-aligned
  // and huge-page advised from 2 MB up). Must be released while its transport lives or after; never needs the peers.
  // With a `folder` (this rank's; empty on all ranks or on none) the bytes rest in a file without a name there: disk space is set aside now,
  // memory holds what is used of it, and whoever has touched pages may unmap them (platform::unmap_pages). Not for device memory.
  std::shared_ptr<SymmetricBuffer> allocate(size_t bytes, const std::string& folder = {}) { return make_buffer(bytes, folder); }

  // out[r * bytes ..) = rank r's buffer at src_offset + r * src_stride, for all r, as of the peers' publish() with my count.
  // `out` may alias my own buffer; my own part is then left as it is. src and out must stay valid until the work is waited
  // for or dropped. Shm: nothing is copied before test() or wait(); a gather that is dropped costs nothing.
  virtual std::shared_ptr<Work> all_gather(void* out, SymmetricBuffer& src, size_t src_offset, size_t src_stride, size_t bytes,
                                           const Tag& tag) = 0;

  // The same for a region whose parts end up in many places: rank r's part is [src_offset + r * src_stride, + bytes); each
  // piece copies a range of one part. Pieces may leave padding out. One collective in the counters.
  virtual std::shared_ptr<Work> all_gather_pieces(std::vector<GatherPiece> pieces, SymmetricBuffer& src, size_t src_offset,
                                                  size_t src_stride, size_t bytes, const Tag& tag) = 0;

  // size() consecutive parts of part_bytes at `offset` of `bucket` (offsets may differ among ranks). `sink` gets everybody's
  // contributions to part rank(). On one channel, 0 <= channel < max_channels(), ranks issue the same sequence and sinks run
  // in that order; channels are independent in shm (c10d: the whole order must match). part_bytes: a multiple of the dtype.
  virtual std::shared_ptr<ReduceWork> reduce_scatter(SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel,
                                                     DType dtype, ReduceSink sink, const Tag& tag) = 0;

  // Small host values; the same bits on every rank; also a barrier. Issued by all ranks in the same order, as all below.
  virtual void all_reduce(double* values, int n, Op op, const Tag& tag) = 0;
  virtual void all_gather_host(const void* mine, size_t bytes, void* out, const Tag& tag) = 0;
  // Any size; a host pointer on a CPU transport, a device pointer on CUDA (stream-ordered there).
  virtual void broadcast(void* data, size_t bytes, int src, const Tag& tag) = 0;
  virtual void barrier(const Tag& tag) = 0;

  // Advances outstanding reductions in issue order, without blocking. Call it often: a relaxed load when there are none.
  void progress() {
    if (outstanding_.load(std::memory_order_relaxed) != 0) do_progress();
  }
  bool busy() const { return outstanding_.load(std::memory_order_relaxed) != 0; }
  static void progress_all();  // every transport of this process

  // Accounts, and the flight record.
  Counter count(const std::string& phase) const;
  std::map<std::string, Counter> counts() const;
  void reset_counts();
  std::vector<CollectiveRecord> recent() const;  // oldest first, at most 256
  Ledger& ledger() const { return *ledger_; }

  // Receives the lines about stalled collectives. Default: writes them to stderr. One handler per process.
  static void set_stall_handler(std::function<void(const std::string&)> handler);
  // Called about ten times a second during a blocked wait, without locks; may throw to end the wait. One per process.
  static void set_interrupt_check(std::function<void()> check);
  // Wraps the release of a process group, which joins threads that may need a lock of the caller's (Python's). One per process.
  static void set_release_guard(std::function<void(const std::function<void()>& release)> guard);

 protected:
  Transport(int rank, int size, int64_t id, Device device, const Options& options);
  virtual std::shared_ptr<SymmetricBuffer> make_buffer(size_t bytes, const std::string& folder) = 0;
  virtual void do_progress() {}

  const int rank_;
  const int size_;
  const int64_t id_;
  const Device device_;
  const Options options_;
  std::unique_ptr<Ledger> ledger_;
  std::atomic<int> outstanding_{0};  // reductions not complete yet; written under the transport's lock
};

}  // namespace ds::comm
