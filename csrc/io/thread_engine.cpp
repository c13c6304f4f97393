// SPDX-License-Identifier: Apache-2.0
// The fallback backend: a few threads that call pread and pwrite.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io/chunk.h"

namespace ds::io {
namespace {

class ThreadEngine final : public FileEngine {
 public:
  explicit ThreadEngine(const EngineOptions& options) : FileEngine(options) {
    for (int i = 0; i < options.threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadEngine() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const char* name() const override { return "threads"; }

 protected:
  void submit(const std::shared_ptr<Request>& request, char* data) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queue_.push(request, data, options_);
    }
    wake_.notify_all();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;  // stop only once everything is done
      {
        Chunk chunk = queue_.pop();
        lock.unlock();
        transfer(chunk);
      }
      lock.lock();
    }
  }

  static void transfer(Chunk& chunk) {
    int64_t result;
    do {
      const size_t bytes = static_cast<size_t>(chunk.bytes);
      result = chunk.is_write() ? pwrite(chunk.fd(), chunk.data, bytes, chunk.offset)
                                : pread(chunk.fd(), chunk.data, bytes, chunk.offset);
      if (result < 0) result = -errno;
    } while (!chunk.complete(result));
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  ChunkQueue queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<FileEngine> make_thread_engine(const EngineOptions& options) { return std::make_unique<ThreadEngine>(options); }

}  // namespace ds::io
