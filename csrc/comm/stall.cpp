// SPDX-License-Identifier: Apache-2.0
#include "comm/stall.h"

#include <unistd.h>

#include <memory>
#include <mutex>
#include <sstream>

#include "base/error.h"

namespace ds::comm {
namespace {

constexpr double kInterruptCheckEvery_s = 0.1;

void write_to_stderr(const std::string& line) {
  const std::string text = "[deepspeed] " + line + "\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
}

// Never destroyed: a wait may still be running while the process exits.
struct Handlers {
  std::mutex mutex;
  std::function<void(const std::string&)> stall = write_to_stderr;
  std::function<void()> interrupt;
  std::function<void(const std::function<void()>&)> guard;
};

Handlers& handlers() {
  static auto* all = new Handlers;
  return *all;
}

std::string seconds(double s) {
  std::ostringstream out;
  out.precision(s < 10 ? 2 : 4);
  out << s << " s";
  return out.str();
}

}  // namespace

void Transport::set_stall_handler(std::function<void(const std::string&)> handler) {
  std::lock_guard<std::mutex> lock(handlers().mutex);
  handlers().stall = handler ? std::move(handler) : write_to_stderr;
}

void Transport::set_interrupt_check(std::function<void()> check) {
  std::lock_guard<std::mutex> lock(handlers().mutex);
  handlers().interrupt = std::move(check);
}

void Transport::set_release_guard(std::function<void(const std::function<void()>&)> guard) {
  std::lock_guard<std::mutex> lock(handlers().mutex);
  handlers().guard = std::move(guard);
}

void release_guarded(const std::function<void()>& release) {
  std::function<void(const std::function<void()>&)> guard;
  {
    std::lock_guard<std::mutex> lock(handlers().mutex);
    guard = handlers().guard;
  }
  if (guard)
    guard(release);
  else
    release();
}

StallWatch::StallWatch(const Options& options)
    : timeout_s_(options.timeout_s),
      next_warning_s_(options.warn_s),
      next_check_s_(kInterruptCheckEvery_s),
      start_(std::chrono::steady_clock::now()) {}

double StallWatch::elapsed_s() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void StallWatch::tick(const std::function<std::string()>& describe) {
  const double now_s = elapsed_s();
  if (now_s >= next_check_s_) {
    next_check_s_ = now_s + kInterruptCheckEvery_s;
    std::function<void()> check;
    {
      std::lock_guard<std::mutex> lock(handlers().mutex);
      check = handlers().interrupt;
    }
    if (check) check();
  }
  if (now_s >= timeout_s_) DS_FAIL("gave up after " << seconds(now_s) << ": " << describe());
  if (next_warning_s_ > 0 && now_s >= next_warning_s_) {
    next_warning_s_ *= 2;
    std::function<void(const std::string&)> handler;
    {
      std::lock_guard<std::mutex> lock(handlers().mutex);
      handler = handlers().stall;
    }
    handler("waiting for " + seconds(now_s) + ": " + describe());
  }
}

}  // namespace ds::comm
