// SPDX-License-Identifier: Apache-2.0
#include "platform/worker.h"

#include <utility>

namespace ds::platform {

Worker::~Worker() {
  drop();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Worker::submit(std::function<void()> task) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error_) return;
    tasks_.push_back(std::move(task));
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  }
  wake_.notify_one();
}

void Worker::wait_below(size_t most) {
  std::unique_lock<std::mutex> lock(mutex_);
  less_.wait(lock, [&] { return tasks_.size() < most; });
}

void Worker::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  less_.wait(lock, [this] { return tasks_.empty(); });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Worker::drop() {
  std::deque<std::function<void()>> dropped;   // destroyed without the lock
  std::unique_lock<std::mutex> lock(mutex_);
  while (tasks_.size() > 1) {
    dropped.push_back(std::move(tasks_.back()));
    tasks_.pop_back();
  }
  less_.wait(lock, [this] { return tasks_.empty(); });
  error_ = nullptr;
}

void Worker::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    std::function<void()> task = std::move(tasks_.front());
    lock.unlock();
    std::exception_ptr error;
    try {
      task();
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;   // what it holds is let go before anybody hears of its end
    lock.lock();
    tasks_.pop_front();
    if (error) {
      error_ = error;
      tasks_.clear();
    }
    less_.notify_all();
  }
}

}  // namespace ds::platform
