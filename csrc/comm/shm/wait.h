// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace ds::comm::shm {

// What a wait is for: something from some ranks. Monotone: a rank that is no longer waited for stays so.
class Condition {
 public:
  explicit Condition(int size) : size_(size) {}
  virtual ~Condition() = default;
  virtual bool waits_for(int rank) const = 0;
  bool ready() {
    while (next_ < size_ && !waits_for(next_)) ++next_;
    return next_ == size_;
  }
  int size() const { return size_; }

 private:
  const int size_;
  int next_ = 0;  // all below have come
};

}  // namespace ds::comm::shm
