// SPDX-License-Identifier: Apache-2.0
// How a work of c10d is waited for, with one that behaves as NCCL's: a wait that runs out of time aborts the communicator.
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "comm/c10d_transport.h"

namespace ds::comm {
namespace {

class AbortingWork : public c10d::Work {
 public:
  bool isCompleted() override { return complete.load(); }
  bool wait(std::chrono::milliseconds timeout) override {
    if (timeout != kNoTimeout) {
      aborted = true;
      throw std::runtime_error("timed out");
    }
    waited = true;
    return true;
  }
  void fail(const char* reason) {
    exception_ = std::make_exception_ptr(std::runtime_error(reason));
    complete = true;
  }
  std::atomic<bool> complete{false};
  bool aborted = false, waited = false;
};

const at::Device kDevice(at::kCUDA, 0);

TEST(WaitSlice, a_late_peer_does_not_abort_a_device_group) {
  auto work = c10::make_intrusive<AbortingWork>();
  EXPECT_FALSE(wait_slice(*work, kDevice));
  EXPECT_FALSE(work->waited);
  work->complete = true;
  EXPECT_TRUE(wait_slice(*work, kDevice));
  EXPECT_TRUE(work->waited);  // the current stream comes after it
  EXPECT_FALSE(work->aborted);
}

TEST(WaitSlice, a_failed_device_work_throws_its_own_reason) {
  auto work = c10::make_intrusive<AbortingWork>();
  work->fail("the peer is gone");
  try {
    wait_slice(*work, kDevice);
    FAIL() << "nothing was thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_EQ(std::string(error.what()), "the peer is gone");
  }
}

}  // namespace
}  // namespace ds::comm
