// SPDX-License-Identifier: Apache-2.0
// What of the state of training rests elsewhere where the configuration asks for a part of it.
#pragma once

#include <cstdint>
#include <vector>

namespace ds::plan {

// For each unit whether its optimizer state rests elsewhere, so that these hold `share` of all trained elements, to half of the smallest unit that
// could still be moved. trained: trained elements of each unit, in the order in which forward uses them. First ones stay, as far as they fit: their
// gradients come last in backward, and nothing of it would be left to hide their update.
std::vector<bool> resting_units(const std::vector<int64_t>& trained, double share);

// Of parameters that rest in files, the first `most` elements that fit stay in memory.
class MemoryQuota {
 public:
  explicit MemoryQuota(int64_t most) : left_(most) {}
  bool take(int64_t numel) {
    if (left_ <= 0 || numel > left_) return false;
    left_ -= numel;
    return true;
  }

 private:
  int64_t left_;
};

}  // namespace ds::plan
