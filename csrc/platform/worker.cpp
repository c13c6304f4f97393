// SPDX-License-Identifier: Apache-2.0
#include "platform/worker.h"

#include <unistd.h>

#include <utility>

namespace ds::platform {

Worker::~Worker() {
  if (thread_.joinable() && getpid() != process_) {   // a fork has no thread to wait for, and locks as that thread had left them
    thread_.detach();
    state_.release();
    return;
  }
  drop();
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Worker::submit(std::function<void()> task) {
  State& s = *state_;
  {
    const std::lock_guard<std::mutex> lock(s.mutex);
    if (s.error) return;
    s.tasks.push_back(std::move(task));
    if (!thread_.joinable()) {
      process_ = getpid();
      thread_ = std::thread([&s] { work(s); });
    }
  }
  s.wake.notify_one();
}

void Worker::wait_below(size_t most) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->less.wait(lock, [&] { return state_->tasks.size() < most; });
}

void Worker::drain() {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->less.wait(lock, [this] { return state_->tasks.empty(); });
  if (state_->error) std::rethrow_exception(state_->error);
}

void Worker::drop() {
  State& s = *state_;
  std::deque<std::function<void()>> dropped;   // destroyed without the lock
  std::unique_lock<std::mutex> lock(s.mutex);
  while (s.tasks.size() > 1) {
    dropped.push_back(std::move(s.tasks.back()));
    s.tasks.pop_back();
  }
  s.less.wait(lock, [&s] { return s.tasks.empty(); });
  s.error = nullptr;
}

void Worker::work(State& s) {
  std::unique_lock<std::mutex> lock(s.mutex);
  while (true) {
    s.wake.wait(lock, [&s] { return s.stop || !s.tasks.empty(); });
    if (s.tasks.empty()) return;
    std::function<void()> task = std::move(s.tasks.front());
    lock.unlock();
    std::exception_ptr error;
    try {
      task();
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;   // what it holds is let go before anybody hears of its end
    lock.lock();
    s.tasks.pop_front();
    if (error) {
      s.error = error;
      s.tasks.clear();
    }
    s.less.notify_all();
  }
}

}  // namespace ds::platform
