// SPDX-License-Identifier: Apache-2.0
// A thread of one's own for work that goes on beside the caller's.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace ds::platform {

// Does what it is given, in order. The thread starts with the first task. After a task has thrown, those behind it are dropped until drain()
// or drop(). Not for use across a fork.
class Worker {
 public:
  Worker() = default;
  ~Worker();   // as drop()
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void submit(std::function<void()> task);
  // Returns when fewer than `most` tasks are left, the one under way included.
  void wait_below(size_t most);
  // Returns when nothing is left, and throws what a task has thrown.
  void drain();
  // Forgets what has not begun, waits for what has; errors are forgotten too.
  void drop();

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable wake_, less_;
  std::deque<std::function<void()>> tasks_;   // the first one is under way
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace ds::platform
