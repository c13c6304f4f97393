// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>

#include <fstream>
#include <random>

#include "ranks.h"
#include "base/error.h"

namespace ds::comm {
namespace {

using testing::Meeting;

Tag tag(const char* phase, int unit = -1) {
  Tag t;
  t.step = 1;
  t.phase = phase;
  t.unit = unit;
  return t;
}

// Byte i of rank r's version v.
uint8_t pattern(int r, size_t i, int v) { return static_cast<uint8_t>(i * 131 + r * 29 + v * 7 + (i >> 8)); }

void fill(SymmetricBuffer& buffer, int r, int v) {
  auto* bytes = static_cast<uint8_t*>(buffer.data());
  for (size_t i = 0; i < buffer.bytes(); ++i) bytes[i] = pattern(r, i, v);
}

void nap(std::mt19937& random, int below_us) {
  std::this_thread::sleep_for(std::chrono::microseconds(random() % below_us));
}

TEST(ShmTransport, gathers_strided_parts_of_every_size) {
  for (int n : {2, 3, 4})
    testing::on_ranks(n, [n](int rank, Meeting* meeting) {
      auto t = testing::make(meeting, rank, n);
      for (size_t bytes : {0ul, 1ul, 7ul, 64ul, 4095ul, 4097ul, (3ul << 20) + 5}) {
        const size_t stride = bytes + 3, offset = 11;
        auto buffer = t->allocate(offset + stride * n);
        RANK_CHECK(buffer->bytes() == offset + stride * n);
        for (int version = 0; version < 3; ++version) {
          fill(*buffer, rank, version);
          buffer->publish();
          std::vector<uint8_t> out(bytes * n + 1, 0xee);
          t->all_gather(out.data(), *buffer, offset, stride, bytes, tag("gather"))->wait();
          for (int r = 0; r < n; ++r)
            for (size_t i = 0; i < bytes; ++i) RANK_CHECK(out[r * bytes + i] == pattern(r, offset + r * stride + i, version));
          RANK_CHECK(out[bytes * n] == 0xee);
          t->barrier(tag("turn"));
        }
      }
      RANK_CHECK(t->count("gather").number == 21);
    });
}

TEST(ShmTransport, gathers_in_place_without_touching_my_part) {
  testing::on_ranks(3, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 3);
    const size_t part = (2 << 20) + 100;
    auto buffer = t->allocate(part * 3);
    fill(*buffer, rank, 5);
    buffer->publish();
    t->all_gather(buffer->data(), *buffer, 0, part, part, tag("gather"))->wait();
    const auto* bytes = static_cast<const uint8_t*>(buffer->data());
    for (size_t i = 0; i < part * 3; ++i) RANK_CHECK(bytes[i] == pattern(static_cast<int>(i / part), i, 5));
    t->barrier(tag("end"));
  });
}

TEST(ShmTransport, pieces_leave_padding_out) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    auto buffer = t->allocate(32);
    fill(*buffer, rank, 1);
    buffer->publish();
    std::vector<uint8_t> a(5, 0), b(3, 0);
    t->all_gather_pieces({{a.data(), 0, 0, 3}, {a.data() + 3, 1, 0, 2}, {b.data(), 1, 7, 3}}, *buffer, 8, 0, 10, tag("pieces"))->wait();
    for (int i = 0; i < 3; ++i) RANK_CHECK(a[i] == pattern(0, 8 + i, 1));
    for (int i = 0; i < 2; ++i) RANK_CHECK(a[3 + i] == pattern(1, 8 + i, 1));
    for (int i = 0; i < 3; ++i) RANK_CHECK(b[i] == pattern(1, 15 + i, 1));
    RANK_CHECK(t->count("pieces").number == 1 && t->count("pieces").bytes == 20);
    t->barrier(tag("end"));
  });
}

// Sums in the sink, strictly in rank order; delays and the order in which channels are waited for change nothing.
void reduce_many(int rank, int n, Meeting* meeting, bool delays) {
  Options options;
  options.max_channels = 3;
  auto t = testing::make(meeting, rank, n, options);
  std::mt19937 random(rank * 7 + 1);
  const size_t part = 1001;  // floats
  const int rounds = 200;
  std::vector<std::shared_ptr<SymmetricBuffer>> buckets;
  std::vector<std::shared_ptr<ReduceWork>> last(4);
  for (int b = 0; b < 4; ++b) buckets.push_back(t->allocate(64 + part * n * sizeof(float)));
  std::vector<int> order[3];
  for (int i = 0; i < rounds; ++i) {
    const int b = i % 4, channel = i % 3;
    if (last[b]) last[b]->wait_drained();
    if (delays) nap(random, 300);
    const size_t offset = 64 * (rank % 2);  // offsets may differ among ranks
    auto* mine = reinterpret_cast<float*>(static_cast<char*>(buckets[b]->data()) + offset);
    for (size_t k = 0; k < part * n; ++k) mine[k] = static_cast<float>(i) * 1e-3f + static_cast<float>(k % 97) * (rank + 0.1f);
    last[b] = t->reduce_scatter(
        *buckets[b], offset, part * sizeof(float), channel, DType::F32,
        [&, i, channel](const void* const* srcs, int nsrc) {
          RANK_CHECK(nsrc == n);
          order[channel].push_back(i);
          for (size_t k = 0; k < part; ++k) {
            float sum = 0, expected = 0;
            for (int r = 0; r < n; ++r) sum += static_cast<const float*>(srcs[r])[k];
            for (int r = 0; r < n; ++r)
              expected += static_cast<float>(i) * 1e-3f + static_cast<float>((rank * part + k) % 97) * (r + 0.1f);
            RANK_CHECK(sum == expected);
          }
        },
        tag("reduce", b));
    if (delays && random() % 3 == 0) nap(random, 200);
    if (random() % 4 == 0) t->progress();
  }
  for (auto& work : last) work->wait();
  for (int c = 0; c < 3; ++c) {
    RANK_CHECK(static_cast<int>(order[c].size()) == (rounds + 2 - c) / 3);
    for (size_t k = 1; k < order[c].size(); ++k) RANK_CHECK(order[c][k] == order[c][k - 1] + 3);
  }
  RANK_CHECK(t->count("reduce").number == rounds);
  t->barrier(tag("end"));
}

TEST(ShmTransport, reductions_keep_order_and_bits) {
  for (int n : {2, 3, 4})
    for (bool delays : {false, true}) testing::on_ranks(n, [=](int rank, Meeting* m) { reduce_many(rank, n, m, delays); });
}

TEST(ShmTransport, more_reductions_than_the_ring_holds) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    auto bucket = t->allocate(2 * 8 * 500);
    auto* words = static_cast<uint64_t*>(bucket->data());
    for (int i = 0; i < 1000; ++i) words[i] = static_cast<uint64_t>(i * 10 + rank);
    uint64_t sum = 0;
    std::vector<std::shared_ptr<ReduceWork>> works;
    for (int i = 0; i < 500; ++i)  // rank 1 starts late: rank 0 runs into the full ring
      works.push_back((rank == 1 && i == 0 ? std::this_thread::sleep_for(std::chrono::milliseconds(200)) : void(),
                       t->reduce_scatter(*bucket, 0, 8, 0, DType::I64,
                                         [&](const void* const* s, int) {
                                           sum += *static_cast<const uint64_t*>(s[0]) + *static_cast<const uint64_t*>(s[1]);
                                         },
                                         tag("ring"))));
    works.back()->wait();
    RANK_CHECK(sum == 500ull * (2 * 10 * rank + 1));
    t->barrier(tag("end"));
  });
}

TEST(ShmTransport, small_collectives) {
  for (int n : {2, 3, 4})
    testing::on_ranks(n, [n](int rank, Meeting* meeting) {
      auto t = testing::make(meeting, rank, n);
      for (int count : {0, 1, 2, 64, 65, 40000, 70001}) {
        std::vector<double> sum(count), low(count), high(count);
        for (int i = 0; i < count; ++i) sum[i] = low[i] = high[i] = (rank + 1) * 0.1 + i * (rank % 2 ? 1e-9 : 1e9);
        t->all_reduce(sum.data(), count, Op::Sum, tag("sum"));
        t->all_reduce(low.data(), count, Op::Min, tag("min"));
        t->all_reduce(high.data(), count, Op::Max, tag("max"));
        for (int i = 0; i < count; ++i) {
          double s = 0, l = 1e300, h = -1e300;
          for (int r = 0; r < n; ++r) {
            const double v = (r + 1) * 0.1 + i * (r % 2 ? 1e-9 : 1e9);
            s = r == 0 ? v : s + v;
            l = std::min(l, v);
            h = std::max(h, v);
          }
          RANK_CHECK(sum[i] == s && low[i] == l && high[i] == h);
        }
      }
      double value = rank == 1 ? std::nan("") : 1;
      t->all_reduce(&value, 1, Op::Max, tag("max"));
      RANK_CHECK(value != value);
      for (size_t bytes : {0ul, 1ul, 300001ul, 1048576ul}) {
        std::vector<uint8_t> mine(bytes), all(bytes * n), sent(bytes);
        for (size_t i = 0; i < bytes; ++i) mine[i] = pattern(rank, i, 3);
        t->all_gather_host(mine.data(), bytes, all.data(), tag("host"));
        for (size_t i = 0; i < bytes * n; ++i) RANK_CHECK(all[i] == pattern(static_cast<int>(i / bytes), i % bytes, 3));
        for (int src = 0; src < n; ++src) {
          for (size_t i = 0; i < bytes; ++i) sent[i] = pattern(rank, i, 9);
          t->broadcast(sent.data(), bytes, src, tag("broadcast"));
          for (size_t i = 0; i < bytes; ++i) RANK_CHECK(sent[i] == pattern(src, i, 9));
        }
      }
      t->barrier(tag("end"));
    });
}

TEST(ShmTransport, two_transports_waited_for_in_opposite_order_do_not_lock_up) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto a = testing::make(meeting, rank, 2), b = testing::make(meeting, rank, 2);
    auto bucket_a = a->allocate(16), bucket_b = b->allocate(16);
    int calls = 0;
    const auto sink = [&](const void* const*, int) { ++calls; };
    auto wa = a->reduce_scatter(*bucket_a, 0, 8, 0, DType::F32, sink, tag("a"));
    auto wb = b->reduce_scatter(*bucket_b, 0, 8, 0, DType::F32, sink, tag("b"));
    (rank == 0 ? wa : wb)->wait_drained();
    (rank == 0 ? wb : wa)->wait_drained();
    RANK_CHECK(calls == 2);
    a->barrier(tag("end"));
    b->barrier(tag("end"));
  });
}

TEST(ShmTransport, a_killed_rank_is_named_within_two_seconds) {
  for (int what = 0; what < 3; ++what) {
    Meeting* meeting = testing::new_meeting(3);
    const auto body = [what](int rank, Meeting* m) {
      auto t = testing::make(m, rank, 3);
      auto buffer = t->allocate(96);
      if (rank != 1) buffer->publish();
      t->barrier(tag("start"));
      if (rank == 1) ::pause();
      const auto start = std::chrono::steady_clock::now();
      try {
        std::vector<char> out(96);
        if (what == 0) t->all_gather(out.data(), *buffer, 0, 0, 32, tag("gather", 4))->wait();
        if (what == 1) t->barrier(tag("gather", 4));
        if (what == 2)
          t->reduce_scatter(*buffer, 0, 32, 0, DType::F32, [](const void* const*, int) {}, tag("gather", 4))->wait_drained();
      } catch (const Error& error) {
        const std::string text = error.what();
        RANK_CHECK(text.find("rank 1 (pid ") != std::string::npos && text.find("has died") != std::string::npos);
        RANK_CHECK(text.find("phase gather, unit 4") != std::string::npos);
        RANK_CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(2));
        return;
      }
      throw std::runtime_error("no error");
    };
    std::vector<pid_t> pids;
    for (int r = 0; r < 3; ++r) pids.push_back(testing::start_rank(r, meeting, body));
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    ::kill(pids[1], SIGKILL);
    const auto statuses = testing::finish(pids, 10);
    EXPECT_EQ(statuses[0], 0);
    EXPECT_EQ(statuses[2], 0);
    EXPECT_TRUE(WIFSIGNALED(statuses[1]));
  }
}

TEST(ShmTransport, a_rank_that_left_is_named) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    t->barrier(tag("start"));
    if (rank == 1) {
      t.reset();
      ::usleep(500000);
      return;
    }
    try {
      t->barrier(tag("end"));
    } catch (const Error& error) {
      RANK_CHECK(std::string(error.what()).find("rank 1") != std::string::npos);
      RANK_CHECK(std::string(error.what()).find("has left the group") != std::string::npos);
      return;
    }
    throw std::runtime_error("no error");
  });
}

TEST(ShmTransport, a_raising_sink_is_reported_to_the_others) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    auto bucket = t->allocate(16);
    std::string text;
    try {
      t->reduce_scatter(*bucket, 0, 8, 0, DType::F32, [&](const void* const*, int) {
         if (rank == 1) throw std::runtime_error("no room");
       }, tag("grad"))->wait_drained();
    } catch (const std::exception& error) {
      text = error.what();
    }
    RANK_CHECK(text.find("no room") != std::string::npos);
    ::usleep(300000);
  });
}

TEST(ShmTransport, disagreeing_ranks_get_an_error) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    std::string text;
    try {
      double values[2] = {1, 2};
      t->all_reduce(values, 1 + rank, Op::Sum, tag("norm"));
    } catch (const Error& error) {
      text = error.what();
    }
    RANK_CHECK(text.find("disagree") != std::string::npos);
    ::usleep(300000);
  });
}

TEST(ShmTransport, a_stall_is_reported_then_given_up) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    Options options;
    options.warn_s = 0.2;
    options.timeout_s = 0.7;
    auto t = testing::make(meeting, rank, 2, options);
    t->barrier(tag("start"));
    if (rank == 1) {
      ::usleep(1200000);
      return;
    }
    std::vector<std::string> lines;
    Transport::set_stall_handler([&](const std::string& line) { lines.push_back(line); });
    try {
      t->barrier(tag("late", 3));
      throw std::logic_error("no error");
    } catch (const Error& error) {
      const std::string text = error.what();
      RANK_CHECK(text.find("gave up after 0.7") != std::string::npos);
      RANK_CHECK(text.find("phase late, unit 3") != std::string::npos && text.find("missing 1") != std::string::npos);
    }
    RANK_CHECK(lines.size() == 2);  // at 0.2 and 0.4 s
    RANK_CHECK(lines[0].find("arrived 0; missing 1; rank 1 (pid") != std::string::npos);
  });
}

TEST(ShmTransport, rewriting_what_a_peer_still_gathers_is_noticed) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    auto buffer = t->allocate(64);
    buffer->publish();
    char out[128];
    auto work = t->all_gather(out, *buffer, 0, 0, 64, tag("gather"));
    if (rank == 1) buffer->publish();
    t->barrier(tag("turn"));
    std::string text;
    try {
      if (rank == 0) work->wait();
    } catch (const Error& error) {
      text = error.what();
    }
    RANK_CHECK(rank == 1 || text.find("rank 1 published a buffer 2 times") != std::string::npos);
    ::usleep(200000);  // rank 1 keeps its buffer meanwhile: a released one is another error
  });
}

TEST(ShmTransport, descriptors_travel_over_sockets_where_proc_is_denied) {
  for (int n : {2, 4})
    testing::on_ranks(n, [n](int rank, Meeting* meeting) {
      Options options;
      options.deny_proc = rank == n - 1;  // one rank is enough to make all use sockets
      auto t = testing::make(meeting, rank, n, options);
      auto buffer = t->allocate(100);
      fill(*buffer, rank, 2);
      buffer->publish();
      std::vector<uint8_t> out(100 * n);
      t->all_gather(out.data(), *buffer, 0, 0, 100, tag("gather"))->wait();
      for (size_t i = 0; i < out.size(); ++i) RANK_CHECK(out[i] == pattern(static_cast<int>(i / 100), i % 100, 2));
      t->barrier(tag("end"));
    });
}

TEST(ShmTransport, death_is_noticed_over_sockets_too) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    Options options;
    options.deny_proc = true;
    auto t = testing::make(meeting, rank, 2, options);
    t->barrier(tag("start"));
    if (rank == 1) ::_exit(0);  // no destructor runs
    try {
      t->barrier(tag("end"));
    } catch (const Error& error) {
      RANK_CHECK(std::string(error.what()).find("rank 1") != std::string::npos);
      return;
    }
    throw std::runtime_error("no error");
  });
}

TEST(ShmTransport, unreachable_memory_is_agreed_on) {
  testing::on_ranks(3, [](int rank, Meeting* meeting) {
    Options options;
    options.deny_proc = options.deny_sockets = rank == 2;
    std::string why;
    RANK_CHECK(!make_shm_transport(testing::join(meeting, rank, 3), options, &why));
    RANK_CHECK(why.find("rank 2") != std::string::npos);
  });
}

size_t resident_shared_bytes() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line))
    if (line.rfind("RssShmem:", 0) == 0) return std::stoul(line.substr(9)) * 1024;
  return 0;
}

TEST(ShmTransport, gathering_does_not_keep_peers_pages_and_release_gives_memory_back) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    const size_t start = resident_shared_bytes(), part = size_t{64} << 20;
    auto buffer = t->allocate(part);
    RANK_CHECK(resident_shared_bytes() < start + (4 << 20));  // untouched
    std::memset(buffer->data(), rank + 1, part);
    buffer->publish();
    std::vector<char> out(part * 2);
    for (int i = 0; i < 2; ++i) t->all_gather(out.data(), *buffer, 0, 0, part, tag("gather"))->wait();
    RANK_CHECK(out[0] == 1 && out[part] == 2 && out[2 * part - 1] == 2);
    RANK_CHECK(resident_shared_bytes() < start + part + (16 << 20));
    t->barrier(tag("end"));
    buffer.reset();
    RANK_CHECK(resident_shared_bytes() < start + (4 << 20));
    t->barrier(tag("bye"));
  });
}

TEST(ShmTransport, a_forked_child_does_not_disturb_its_parent) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    auto buffer = t->allocate(4 << 20);
    std::memset(buffer->data(), 7, buffer->bytes());
    const pid_t child = ::fork();
    if (child == 0) {
      buffer.reset();
      t.reset();
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    buffer->publish();
    std::vector<char> out(8 << 20);
    t->all_gather(out.data(), *buffer, 0, 0, 4 << 20, tag("gather"))->wait();
    for (char c : out) RANK_CHECK(c == 7);
    t->barrier(tag("end"));
  });
}

TEST(ShmTransport, descriptors_are_closed_on_exec) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    int found = 0;
    for (int fd = 3; fd < 100; ++fd) {
      char target[64] = {};
      if (::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), target, 63) <= 0) continue;
      if (!std::strstr(target, "memfd:deepspeed") && !std::strstr(target, "pidfd")) continue;
      ++found;
      RANK_CHECK(::fcntl(fd, F_GETFD) & FD_CLOEXEC);
    }
    RANK_CHECK(found >= 3);
    t->barrier(tag("end"));
  });
}

TEST(ShmTransport, many_buffers_come_and_go) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    for (int i = 0; i < 1500; ++i) {  // more than may live at a time
      auto buffer = t->allocate(100);
      static_cast<char*>(buffer->data())[0] = static_cast<char>(i + rank);
      buffer->publish();
      char out[2];
      t->all_gather(out, *buffer, 0, 0, 1, tag("gather"))->wait();
      RANK_CHECK(out[0] == static_cast<char>(i) && out[1] == static_cast<char>(i + 1));
      t->barrier(tag("turn"));
    }
  });
}

TEST(ShmTransport, wrong_arguments_are_value_errors) {
  testing::on_ranks(2, [](int rank, Meeting* meeting) {
    auto t = testing::make(meeting, rank, 2);
    auto u = testing::make(meeting, rank, 2);
    auto buffer = t->allocate(64);
    char out[256];
    int caught = 0;
    const auto bad = [&](const std::function<void()>& call) {
      try {
        call();
      } catch (const ValueError&) {
        ++caught;
      }
    };
    const ReduceSink sink = [](const void* const*, int) {};
    bad([&] { t->all_gather(out, *buffer, 0, 64, 64, tag("")); });
    bad([&] { t->all_gather(out, *buffer, 65, 0, 0, tag("")); });
    bad([&] { u->all_gather(out, *buffer, 0, 0, 8, tag("")); });
    bad([&] { t->all_gather_pieces({{out, 2, 0, 1}}, *buffer, 0, 0, 8, tag("")); });
    bad([&] { t->all_gather_pieces({{out, 0, 8, 1}}, *buffer, 0, 0, 8, tag("")); });
    bad([&] { t->reduce_scatter(*buffer, 0, 36, 0, DType::F32, sink, tag("")); });
    bad([&] { t->reduce_scatter(*buffer, 0, 6, 0, DType::F32, sink, tag("")); });
    bad([&] { t->reduce_scatter(*buffer, 0, 8, 4, DType::F32, sink, tag("")); });
    bad([&] { t->broadcast(out, 1, 2, tag("")); });
    RANK_CHECK(caught == 9);
    t->barrier(tag("end"));
  });
}

}  // namespace
}  // namespace ds::comm
