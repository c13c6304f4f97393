// SPDX-License-Identifier: Apache-2.0
// A thread of one's own for work that goes on beside the caller's.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace ds::platform {

// Does what it is given, in order. The thread starts with the first task. After a task has thrown, those behind it are dropped until drop(): what they
// would have made is missing. A process forked from the owner's may destroy it,
// nothing else.
class Worker {
 public:
  Worker() = default;
  ~Worker();   // as drop()
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void submit(std::function<void()> task);
  // Returns when fewer than `most` tasks are left, the one under way included.
  void wait_below(size_t most);
  // Returns when nothing is left, and throws what a task has thrown, each time until drop().
  void drain();
  // Forgets what has not begun, waits for what has; errors are forgotten too.
  void drop();

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable wake, less;
    std::deque<std::function<void()>> tasks;   // the first one is under way
    std::exception_ptr error;
    bool stop = false;
  };
  static void work(State& s);

  std::unique_ptr<State> state_ = std::make_unique<State>();
  std::thread thread_;
  int process_ = 0;   // whose thread it is
};

}  // namespace ds::platform
