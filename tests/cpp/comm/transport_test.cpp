// SPDX-License-Identifier: Apache-2.0
// What needs no second process: the ledger, the stall watch, liveness, the one-rank carrier.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "comm/combine.h"
#include "comm/ledger.h"
#include "comm/liveness.h"
#include "comm/local_transport.h"
#include "comm/stall.h"

namespace ds::comm {
namespace {

Tag tag(const char* phase, int64_t step = -1, int unit = -1) {
  Tag t;
  t.phase = phase;
  t.step = step;
  t.unit = unit;
  return t;
}

TEST(Ledger, counts_by_phase_text_and_keeps_the_last) {
  Ledger ledger;
  const std::string copy = "grad";  // another pointer, the same text
  ledger.begin("reduce_scatter", tag("grad", 3, 7), 100);
  ledger.end(ledger.begin("reduce_scatter", tag(copy.c_str()), 50));
  ledger.end(ledger.begin("all_gather", tag("param"), 1), CollectiveState::Failed);
  EXPECT_EQ(ledger.counts().at("grad").number, 2);
  EXPECT_EQ(ledger.counts().at("grad").bytes, 150);
  const auto recent = ledger.recent();
  ASSERT_EQ(recent.size(), 3u);
  EXPECT_EQ(recent[0].state, CollectiveState::Issued);
  EXPECT_EQ(recent[0].end_s, 0);
  EXPECT_EQ(recent[1].state, CollectiveState::Done);
  EXPECT_GE(recent[1].end_s, recent[1].start_s);
  EXPECT_EQ(recent[2].state, CollectiveState::Failed);
  EXPECT_EQ(describe(recent[0]), "reduce_scatter #1 (step 3, phase grad, unit 7, 100 bytes)");
  for (int i = 0; i < 1000; ++i) ledger.begin("barrier", tag("x"), 0);
  EXPECT_EQ(ledger.recent().size(), 256u);
  EXPECT_EQ(ledger.recent().back().seq, 1003);
  EXPECT_EQ(ledger.record(1).seq, 0);
  ledger.reset_counts();
  EXPECT_TRUE(ledger.counts().empty());
}

TEST(Ledger, interned_texts_are_one) {
  EXPECT_EQ(intern("abc"), intern(std::string("ab") + "c"));
  EXPECT_STREQ(intern("abc"), "abc");
}

TEST(StallWatch, interrupt_check_may_end_a_wait) {
  Options options;
  StallWatch watch(options);
  Transport::set_interrupt_check([] { throw std::runtime_error("stop"); });
  ::usleep(150000);
  EXPECT_THROW(watch.tick([] { return ""; }), std::runtime_error);
  Transport::set_interrupt_check(nullptr);
  EXPECT_NO_THROW(watch.tick([] { return ""; }));
}

TEST(Combine, nan_wins) {
  const double nan = std::nan("");
  for (Op op : {Op::Sum, Op::Max, Op::Min}) {
    EXPECT_TRUE(std::isnan(combine(op, nan, 1)));
    EXPECT_TRUE(std::isnan(combine(op, 1, nan)));
  }
  EXPECT_EQ(combine(Op::Max, 1, 2), 2);
  EXPECT_EQ(combine(Op::Min, 1, 2), 1);
}

TEST(Liveness, a_process_is_dead_before_it_is_reaped) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  Identity identity = Identity::self();
  identity.pid = child;
  identity.start_ticks = 0;  // not its start: treated as another process with its id
  EXPECT_TRUE(Peer(identity).dead());
  EXPECT_FALSE(Peer(Identity::self()).dead());
  EXPECT_FALSE(Peer().dead());
  std::snprintf(identity.host, sizeof(identity.host), "elsewhere");
  EXPECT_FALSE(Peer(identity).dead());
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST(Liveness, a_zombie_is_dead) {
  int tell[2];
  ASSERT_EQ(::pipe(tell), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const Identity me = Identity::self();
    if (::write(tell[1], &me, sizeof(me)) != sizeof(me)) ::_exit(1);
    ::pause();
  }
  Identity identity;
  ASSERT_EQ(::read(tell[0], &identity, sizeof(identity)), static_cast<ssize_t>(sizeof(identity)));
  const Peer peer(identity);
  EXPECT_FALSE(peer.dead());
  ::kill(child, SIGKILL);
  for (int i = 0; i < 1000 && !peer.dead(); ++i) ::usleep(1000);
  EXPECT_TRUE(peer.dead());
  EXPECT_EQ(first_dead({Peer(), peer}, 0), "rank 1 (pid " + std::to_string(child) + ") has died");
  ::waitpid(child, nullptr, 0);
  ::close(tell[0]);
  ::close(tell[1]);
}

TEST(LocalTransport, everything_is_done_at_once) {
  Options options;
  options.max_channels = 2;
  auto t = std::make_shared<LocalTransport>(1, std::make_unique<HostMemory>(), options);
  auto buffer = t->allocate((4 << 20) + 3);
  EXPECT_EQ(buffer->bytes(), static_cast<size_t>((4 << 20) + 3));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % (2 << 20), 0u);
  auto* bytes = static_cast<char*>(buffer->data());
  for (size_t i = 0; i < buffer->bytes(); ++i) ASSERT_EQ(bytes[i], 0);
  std::memcpy(bytes, "hello, world", 12);
  buffer->publish();
  EXPECT_EQ(buffer->epoch(), 1);
  char out[6] = {};
  t->all_gather(out, *buffer, 7, 0, 5, tag("gather"))->wait();
  EXPECT_STREQ(out, "world");
  const void* seen = nullptr;
  auto work = t->reduce_scatter(*buffer, 4, 8, 1, DType::F32, [&](const void* const* s, int n) {
    EXPECT_EQ(n, 1);
    seen = s[0];
  }, tag("reduce"));
  EXPECT_EQ(seen, bytes + 4);
  EXPECT_TRUE(work->test() && work->drained());
  double value = 2.5;
  t->all_reduce(&value, 1, Op::Sum, tag("norm"));
  EXPECT_EQ(value, 2.5);
  EXPECT_THROW(t->reduce_scatter(*buffer, 0, 8, 2, DType::F32, [](const void* const*, int) {}, tag("")), ValueError);
  EXPECT_THROW(t->all_gather(out, *buffer, buffer->bytes(), 0, 1, tag("")), ValueError);
  EXPECT_EQ(t->counts().size(), 3u);
  EXPECT_EQ(t->allocate(0)->bytes(), 0u);
}

TEST(Transport, options_are_checked) {
  Options options;
  options.max_channels = 0;
  EXPECT_THROW(LocalTransport(1, std::make_unique<HostMemory>(), options), ValueError);
}

}  // namespace
}  // namespace ds::comm
