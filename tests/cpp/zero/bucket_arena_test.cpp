// SPDX-License-Identifier: Apache-2.0
// Regions in use never overlap, whatever order the reductions drain in.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "base/error.h"
#include "comm/local_transport.h"
#include "comm/memory.h"
#include "zero/bucket_arena.h"

namespace ds::zero {
namespace {

constexpr int64_t kPage = 4096;

// A reduction that drains when the test says so, or when somebody waits.
struct SlowWork : comm::ReduceWork {
  bool over = false;
  bool test() override { return over; }
  void wait() override { over = true; }
  bool drained() override { return over; }
  void wait_drained() override { over = true; }
};

struct Held {
  Region region;
  std::shared_ptr<SlowWork> work;   // null: still being filled
};

void expect_apart(const std::vector<Held>& held, const Region& region, int64_t end) {
  ASSERT_GE(region.offset, 0);
  ASSERT_LE(region.offset + region.bytes, end);
  for (const Held& h : held) {
    if (h.work && h.work->over) continue;
    EXPECT_TRUE(region.offset + region.bytes <= h.region.offset || h.region.offset + h.region.bytes <= region.offset)
        << "[" << region.offset << ", +" << region.bytes << ") and [" << h.region.offset << ", +" << h.region.bytes << ")";
  }
}

TEST(BucketArena, several_regions_in_the_reserve_drain_out_of_order) {
  comm::LocalTransport transport(0, std::make_unique<comm::HostMemory>(), {});
  BucketArena arena(transport, 8 * kPage);
  const Region early = arena.try_acquire(9 * kPage);   // all that is not the reserve, opened before its turn
  ASSERT_TRUE(early.valid());
  std::vector<Held> held{{early, nullptr}};
  const auto take = [&](int64_t pages) {
    const Region region = arena.acquire(pages * kPage);
    expect_apart(held, region, arena.bytes());
    held.push_back({region, std::make_shared<SlowWork>()});
    arena.issued(region, held.back().work);
  };
  take(1);
  take(1);
  held[1].work->over = true;   // the first drains, the second does not
  take(1);                     // goes where the first was
  take(1);
  take(4);
  held[2].work->over = true;
  take(1);
}

TEST(BucketArena, random_orders) {
  std::mt19937 random(7);
  comm::LocalTransport transport(0, std::make_unique<comm::HostMemory>(), {});
  for (int round = 0; round < 200; ++round) {
    const int64_t largest = static_cast<int64_t>(1 + random() % 12) * kPage;
    BucketArena arena(transport, largest);
    std::vector<Held> held;
    for (int call = 0; call < 60; ++call) {
      const int64_t bytes = 1 + static_cast<int64_t>(random() % largest);
      for (const Held& h : held) {
        if (h.work && random() % 4 == 0) h.work->over = true;
      }
      if (random() % 3 == 0) {   // a flat that is opened early, and whose turn comes later
        const Region region = arena.try_acquire(bytes);
        if (!region.valid()) continue;
        expect_apart(held, region, arena.bytes());
        held.push_back({region, nullptr});
      } else {
        const Region region = arena.acquire(bytes);   // one turn after the other: issued before the next
        expect_apart(held, region, arena.bytes());
        held.push_back({region, std::make_shared<SlowWork>()});
        arena.issued(region, held.back().work);
      }
      if (random() % 2 == 0) {   // one of the early ones has its turn
        const auto open = std::find_if(held.begin(), held.end(), [](const Held& h) { return !h.work; });
        if (open == held.end()) continue;
        open->work = std::make_shared<SlowWork>();
        arena.issued(open->region, open->work);
      }
    }
  }
}

}  // namespace
}  // namespace ds::zero
