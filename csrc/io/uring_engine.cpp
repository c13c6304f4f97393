// SPDX-License-Identifier: Apache-2.0
// The io_uring backend. Callers and the reaper fill the submission side under one mutex; only the reaper, a thread that sleeps
// in the kernel, takes completions. At most queue_depth chunks are in flight, so neither ring can overflow.
#include "io/chunk.h"

#ifdef DS_WITH_URING

#include <liburing.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

namespace ds::io {
namespace {

class UringEngine final : public FileEngine {
 public:
  explicit UringEngine(const EngineOptions& options) : FileEngine(options) {}

  // 0 or a negated errno.
  int start() {
    const int code = io_uring_queue_init(static_cast<unsigned>(options_.queue_depth) + 1, &ring_, 0);  // + 1: the stop signal
    if (code != 0) return code;
    io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
    const bool usable = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) &&
                        io_uring_opcode_supported(probe, IORING_OP_WRITE);
    if (probe != nullptr) io_uring_free_probe(probe);
    if (!usable) {
      io_uring_queue_exit(&ring_);
      return -ENOSYS;
    }
    started_ = true;
    reaper_ = std::thread([this] { reap(); });
    return 0;
  }

  ~UringEngine() override {
    if (!started_) return;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      idle_.wait(lock, [this] { return in_flight_ == 0 && queue_.empty(); });
      io_uring_sqe* entry = io_uring_get_sqe(&ring_);
      io_uring_prep_nop(entry);
      io_uring_sqe_set_data(entry, nullptr);
      flush();
    }
    reaper_.join();
    io_uring_queue_exit(&ring_);
  }

  const char* name() const override { return "io_uring"; }

 protected:
  void submit(const std::shared_ptr<Request>& request, char* data) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push(request, data, options_);
    fill();
  }

 private:
  // All three below: mutex_ is held.
  void fill() {
    bool any = false;
    while (in_flight_ < options_.queue_depth && !queue_.empty()) {
      issue(new Chunk(queue_.pop()));
      ++in_flight_;
      any = true;
    }
    if (any) flush();
  }

  void issue(Chunk* chunk) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);  // never null: the ring is as deep as in_flight_ can get
    const unsigned bytes = static_cast<unsigned>(chunk->bytes);
    const uint64_t offset = static_cast<uint64_t>(chunk->offset);
    if (chunk->is_write()) {
      io_uring_prep_write(entry, chunk->fd(), chunk->data, bytes, offset);
    } else {
      io_uring_prep_read(entry, chunk->fd(), chunk->data, bytes, offset);
    }
    io_uring_sqe_set_data(entry, chunk);
  }

  void flush() {
    // Refusals here are passing ones (a signal, no memory for the moment); the entries stay in the ring until accepted.
    while (io_uring_submit(&ring_) < 0) std::this_thread::yield();
  }

  void reap() {
    while (true) {
      io_uring_cqe* entry = nullptr;
      if (io_uring_wait_cqe(&ring_, &entry) != 0) continue;  // interrupted by a signal
      Chunk* chunk = static_cast<Chunk*>(io_uring_cqe_get_data(entry));
      const int64_t result = entry->res;
      io_uring_cqe_seen(&ring_, entry);
      if (chunk == nullptr) return;
      std::unique_lock<std::mutex> lock(mutex_);
      const bool finished = chunk->complete(result);
      if (finished) {
        --in_flight_;
      } else {
        issue(chunk);
        flush();
      }
      fill();
      if (in_flight_ == 0) idle_.notify_all();
      lock.unlock();
      if (finished) delete chunk;  // outside the mutex: this may drop the last reference to a file
    }
  }

  io_uring ring_;
  bool started_ = false;
  std::mutex mutex_;
  std::condition_variable idle_;
  ChunkQueue queue_;
  int in_flight_ = 0;
  std::thread reaper_;
};

}  // namespace

std::unique_ptr<FileEngine> make_uring_engine(const EngineOptions& options) {
  auto engine = std::make_unique<UringEngine>(options);
  if (engine->start() != 0) return nullptr;
  return engine;
}

}  // namespace ds::io

#else

namespace ds::io {
std::unique_ptr<FileEngine> make_uring_engine(const EngineOptions&) { return nullptr; }
}  // namespace ds::io

#endif
