// SPDX-License-Identifier: Apache-2.0
// The fallback backend: a few threads that call pread and pwrite.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <memory>
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
    if (forked()) {
      for (std::thread& thread : threads_) thread.detach();  // they are in another process,
      wake_.release();                                       // whose waiting its end would wait for
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_->notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  const char* name() const override { return "threads"; }

 protected:
  void submit(const std::vector<std::shared_ptr<Request>>& requests) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& request : requests) queue_.push(request, options_);
    }
    wake_->notify_all();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_->wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;  // stop only once everything is done
      {
        Chunk chunk = queue_.pop();
        lock.unlock();
        transfer(chunk);
      }
      lock.lock();
    }
  }

  void transfer(Chunk& chunk) const {
    int64_t result;
    do {
      const auto bytes = static_cast<size_t>(faults_ ? faults_->issue(chunk) : chunk.bytes);
      result = chunk.is_write() ? pwrite(chunk.fd(), chunk.data, bytes, chunk.offset)
                                : pread(chunk.fd(), chunk.data, bytes, chunk.offset);
      if (result < 0) result = -errno;
      if (faults_) result = faults_->answer(chunk, result);
    } while (!chunk.complete(result));
  }

  std::mutex mutex_;
  std::unique_ptr<std::condition_variable> wake_ = std::make_unique<std::condition_variable>();
  ChunkQueue queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<FileEngine> make_thread_engine(const EngineOptions& options) { return std::make_unique<ThreadEngine>(options); }

}  // namespace ds::io
