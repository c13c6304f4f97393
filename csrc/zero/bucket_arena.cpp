// SPDX-License-Identifier: Apache-2.0
#include "zero/bucket_arena.h"

#include <algorithm>

#include "base/checked.h"
#include "base/error.h"
#include "plan/reserve.h"

namespace ds::zero {
namespace {
constexpr int64_t kAlignBytes = plan::kReservePageBytes;
}

BucketArena::BucketArena(comm::Transport& transport, int64_t largest_bytes) {
  const plan::BucketBytes bytes = plan::bucket_bytes(largest_bytes);
  general_bytes_ = bytes.general;
  total_bytes_ = bytes.total;
  buffer_ = transport.allocate(static_cast<size_t>(total_bytes_));
}

// Lowest free place, so that memory that was never touched stays untouched.
Region BucketArena::first_fit(int64_t begin, int64_t end, int64_t bytes) const {
  int64_t at = begin;
  for (const Busy& b : busy_) {
    if (b.region.offset + b.region.bytes <= at) continue;
    if (b.region.offset - at >= bytes || b.region.offset >= end) break;
    at = b.region.offset + b.region.bytes;
  }
  return at + bytes <= end ? Region{at, bytes} : Region{};
}

void BucketArena::reclaim() {
  busy_.erase(std::remove_if(busy_.begin(), busy_.end(), [](const Busy& b) { return b.work && b.work->drained(); }), busy_.end());
}

Region BucketArena::try_acquire(int64_t bytes) {
  reclaim();
  return take(first_fit(0, general_bytes_, round_up(bytes, kAlignBytes)));
}

// Keeps the list in order, which first_fit() relies on. In the reserve too: it may hold several regions, and drain out of order.
Region BucketArena::take(Region region) {
  if (!region.valid()) return region;
  const auto place = std::find_if(busy_.begin(), busy_.end(), [&](const Busy& b) { return b.region.offset > region.offset; });
  busy_.insert(place, Busy{region, nullptr});
  return region;
}

Region BucketArena::acquire(int64_t bytes, bool wait) {
  const int64_t size = round_up(bytes, kAlignBytes);
  while (true) {
    Region region = try_acquire(bytes);
    if (region.valid()) return region;
    region = take(first_fit(general_bytes_, total_bytes_, size));
    if (region.valid()) return region;
    if (!wait) return Region{};
    const auto oldest = std::find_if(busy_.begin(), busy_.end(), [](const Busy& b) { return b.work != nullptr; });
    DS_CHECK(oldest != busy_.end(), "gradient buckets: no room for " << bytes << " bytes and nothing under way");
    const std::shared_ptr<comm::ReduceWork> work = oldest->work;
    work->wait_drained();
  }
}

void BucketArena::issued(Region region, std::shared_ptr<comm::ReduceWork> work) {
  const auto it = std::find_if(busy_.begin(), busy_.end(), [&](const Busy& b) { return b.region.offset == region.offset; });
  DS_CHECK(it != busy_.end(), "gradient buckets: region at " << region.offset << " is not in use");
  it->work = std::move(work);
}

void BucketArena::release(Region region) {
  busy_.erase(std::remove_if(busy_.begin(), busy_.end(), [&](const Busy& b) { return b.region.offset == region.offset && !b.work; }), busy_.end());
}

void BucketArena::wait_drained() {
  for (Busy& b : busy_) {
    if (b.work) b.work->wait_drained();
  }
  reclaim();
}

}  // namespace ds::zero
