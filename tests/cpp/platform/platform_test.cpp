// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <future>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "platform/cpu.h"
#include "platform/env.h"
#include "platform/file.h"
#include "platform/memory.h"
#include "platform/worker.h"

namespace ds::platform {
namespace {

struct TemporaryDirectory {
  TemporaryDirectory() {
    std::string pattern = ::testing::TempDir() + "/ds_platform_XXXXXX";
    path = mkdtemp(pattern.data());
  }
  ~TemporaryDirectory() { EXPECT_EQ(std::system(("rm -rf '" + path + "'").c_str()), 0); }
  std::string path;
};

TEST(Cpu, FeaturesAreConsistent) {
  const CpuFeatures& f = cpu_features();
#if defined(__x86_64__)
  EXPECT_FALSE(f.neon);
  EXPECT_TRUE(!f.avx512 || f.avx2);
  EXPECT_TRUE(!f.avx512_bf16 || f.avx512);
#endif
  EXPECT_EQ(&f, &cpu_features());
  EXPECT_FALSE(cpu_model_name().empty());
  EXPECT_GE(available_cores(), 1);
}

TEST(Env, ReadsOnlyWhatTheTableNames) {
  unsetenv("RANK");
  EXPECT_FALSE(env_int("RANK").has_value());
  setenv("RANK", "", 1);
  EXPECT_FALSE(env_int("RANK").has_value());
  setenv("RANK", "12", 1);
  EXPECT_EQ(*env_int("RANK"), 12);
  for (const char* bad : {"1x", "x", "99999999999999999999", " "}) {
    setenv("RANK", bad, 1);
    EXPECT_THROW(env_int("RANK"), ValueError) << bad;
  }
  unsetenv("RANK");
  EXPECT_TRUE(*env_bool("DS_HUGE_PAGES"));
  setenv("DS_HUGE_PAGES", "off", 1);
  EXPECT_FALSE(*env_bool("DS_HUGE_PAGES"));
  setenv("DS_HUGE_PAGES", "maybe", 1);
  EXPECT_THROW(env_bool("DS_HUGE_PAGES"), ValueError);
  unsetenv("DS_HUGE_PAGES");
  EXPECT_THROW(env_string("NOT_IN_THE_TABLE"), Error);
}

TEST(Memory, IsZeroAlignedAndLazy) {
  for (size_t bytes : {size_t{1}, kPageBytes, kPageBytes + 1, kHugePageBytes - 1, kHugePageBytes, 3 * kHugePageBytes + 5}) {
    const Buffer buffer(bytes);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    EXPECT_EQ(address % (bytes >= kHugePageBytes ? kHugePageBytes : kPageBytes), 0u);
    EXPECT_EQ(buffer.bytes(), bytes);
    EXPECT_EQ(buffer.resident_bytes(), 0u);
    auto* p = static_cast<unsigned char*>(buffer.data());
    EXPECT_EQ(p[0] | p[bytes / 2] | p[bytes - 1], 0);
    p[bytes - 1] = 1;
    EXPECT_GT(buffer.resident_bytes(), 0u);
  }
  EXPECT_EQ(Buffer(0).data(), nullptr);
  EXPECT_THROW(Buffer(~size_t{0}), ValueError);
}

TEST(Memory, DiscardGivesBackWholePagesOnly) {
  setenv("DS_HUGE_PAGES", "0", 1);
  Buffer buffer(8 * kPageBytes);
  std::memset(buffer.data(), 7, buffer.bytes());
  EXPECT_EQ(buffer.resident_bytes(), 8 * kPageBytes);
  buffer.discard(kPageBytes - 1, 2 * kPageBytes);  // covers page 1 wholly, touches 0 and 2
  EXPECT_EQ(buffer.resident_bytes(), 7 * kPageBytes);
  const auto* p = static_cast<unsigned char*>(buffer.data());
  EXPECT_EQ(p[kPageBytes - 1], 7);
  EXPECT_EQ(p[kPageBytes], 0);
  EXPECT_EQ(p[2 * kPageBytes], 7);
  buffer.discard(100, 50);
  EXPECT_EQ(p[120], 7);
  EXPECT_THROW(buffer.discard(0, buffer.bytes() + 1), ValueError);
  EXPECT_THROW(buffer.discard(buffer.bytes() + 1, 0), ValueError);
  unsetenv("DS_HUGE_PAGES");
}

TEST(Memory, MovesOwnership) {
  Buffer a(100);
  void* data = a.data();
  Buffer b(std::move(a));
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(a.data(), nullptr);
  a = std::move(b);
  EXPECT_EQ(a.data(), data);
  EXPECT_EQ(a.bytes(), 100u);
}

int g_pinned = 0;

TEST(Memory, PinsThroughTheHooksOrRefuses) {
  set_pin_hooks({});
  EXPECT_THROW(Buffer(100, true), ValueError);
  set_pin_hooks({[](void*, size_t) { return ++g_pinned, true; }, [](void*) { --g_pinned; }});
  {
    Buffer buffer(100, true);
    EXPECT_TRUE(buffer.pinned());
    EXPECT_EQ(g_pinned, 1);
    EXPECT_THROW(buffer.discard(0, 100), Error);
  }
  EXPECT_EQ(g_pinned, 0);
  set_pin_hooks({[](void*, size_t) { return false; }, [](void*) { --g_pinned; }});
  EXPECT_THROW(Buffer(100, true), Error);
  EXPECT_EQ(g_pinned, 0);  // what was never pinned is not unpinned
  set_pin_hooks({});
}

TEST(File, WritesReadsAndResizes) {
  const TemporaryDirectory directory;
  const std::string path = directory.path + "/f";
  File file(path, File::Mode::CreateNew);
  file.write("hello", 5, 3);
  file.sync();
  sync_directory_of(path);
  EXPECT_EQ(file.size(), 8);
  char text[6] = {};
  file.read(text, 5, 3);
  EXPECT_STREQ(text, "hello");
  file.resize(4);
  EXPECT_EQ(file.size(), 4);
  file.close();
  EXPECT_FALSE(file.is_open());
  file.close();
  EXPECT_THROW(File(path, File::Mode::CreateNew), FileError);
}

TEST(File, ReserveLengthensOrNamesTheReason) {
  File file = File::memory("room", 10);
  file.reserve(0, 10000);
  EXPECT_EQ(file.size(), 10000);
  file.reserve(50, 100);
  EXPECT_EQ(file.size(), 10000);
  // A limit, not a size no disk has: for files in memory the system would try.
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit low{20000, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  try {
    file.reserve(10000, 20000);
    ADD_FAILURE();
  } catch (const FileError& error) {
    EXPECT_EQ(error.code, EFBIG);
    EXPECT_NE(error.message.find("setting 20000 bytes aside of memory:room failed"), std::string::npos) << error.message;
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
}

TEST(File, ErrorsNameThePathAndTheReason) {
  const TemporaryDirectory directory;
  try {
    File(directory.path + "/absent", File::Mode::Read);
    FAIL();
  } catch (const FileError& error) {
    EXPECT_EQ(error.code, ENOENT);
    EXPECT_NE(error.message.find("/absent"), std::string::npos);
    EXPECT_NE(error.message.find("No such file"), std::string::npos);
  }
  File file(directory.path + "/short", File::Mode::Create);
  file.write("abc", 3, 0);
  char text[8];
  try {
    file.read(text, 8, 0);
    FAIL();
  } catch (const FileError& error) {
    EXPECT_EQ(error.code, 0);
    EXPECT_NE(error.message.find("the file ends after 3"), std::string::npos) << error.message;
  }
  File full("/dev/full", File::Mode::ReadWrite);
  try {
    full.write("abc", 3, 0);
    FAIL();
  } catch (const FileError& error) {
    EXPECT_EQ(error.code, ENOSPC);
  }
}

TEST(File, MemoryFilesHaveTheAskedSize) {
  File file = File::memory("test", 10000);
  EXPECT_EQ(file.size(), 10000);
  char byte = 1;
  file.read(&byte, 1, 9999);
  EXPECT_EQ(byte, 0);
  File moved = std::move(file);
  EXPECT_FALSE(file.is_open());
  EXPECT_TRUE(moved.is_open());
}

}  // namespace
TEST(Pages, DiscardLeavesNeighbours) {
  const Buffer memory(4 * kPageBytes);
  auto* bytes = static_cast<unsigned char*>(memory.data());
  std::fill_n(bytes, memory.bytes(), 7);
  EXPECT_TRUE(discard_pages(bytes + 1, 3 * kPageBytes));  // two whole pages in it
  EXPECT_EQ(std::count(bytes, bytes + memory.bytes(), 7), 2 * static_cast<int64_t>(kPageBytes));
  EXPECT_EQ(bytes[kPageBytes - 1], 7);
  EXPECT_EQ(bytes[kPageBytes], 0);
  EXPECT_EQ(bytes[3 * kPageBytes], 7);
  EXPECT_TRUE(discard_pages(bytes + 1, 10));
}

TEST(Pages, ExchangeKeepsAddressesAndNeighbours) {
  for (const size_t bytes : {kPageBytes, 3 * kPageBytes, kHugePageBytes, 3 * kHugePageBytes}) {
    Buffer first(bytes), second(bytes);
    auto* a = static_cast<unsigned char*>(first.data());
    auto* b = static_cast<unsigned char*>(second.data());
    std::fill_n(a, bytes, 3);
    std::fill_n(b, kPageBytes, 5);   // the rest is untouched
    exchange_pages(a, b, bytes);
    EXPECT_EQ(std::count(b, b + bytes, 3), static_cast<int64_t>(bytes));
    EXPECT_EQ(std::count(a, a + bytes, 5), static_cast<int64_t>(kPageBytes));
    EXPECT_EQ(std::count(a, a + bytes, 0), static_cast<int64_t>(bytes - kPageBytes));
    a[0] = 9;
    exchange_pages(a, b, bytes);
    EXPECT_EQ(b[0], 9);
    EXPECT_EQ(std::count(a, a + bytes, 3), static_cast<int64_t>(bytes));
    exchange_pages(a, b, 0);
  }
}

TEST(Worker, DoesAllInOrder) {
  Worker worker;
  std::vector<int> seen;
  for (int i = 0; i < 1000; ++i) {
    worker.submit([&seen, i] { seen.push_back(i); });
    if (i % 100 == 0) worker.wait_below(2);
  }
  worker.drain();
  ASSERT_EQ(seen.size(), 1000u);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(seen[i], i);
}

TEST(Worker, AnErrorDropsWhatFollowsAndIsToldUntilDrop) {
  Worker worker;
  std::atomic<int> later{0};
  worker.submit([] { throw std::runtime_error("no"); });
  worker.wait_below(1);
  worker.submit([&] { ++later; });
  EXPECT_THROW(worker.drain(), std::runtime_error);
  worker.submit([&] { ++later; });
  EXPECT_THROW(worker.drain(), std::runtime_error);
  EXPECT_EQ(later, 0);
  worker.drop();
  worker.submit([&] { ++later; });
  worker.drain();
  EXPECT_EQ(later, 1);
}

TEST(Worker, AForkCanDestroyIt) {
  auto worker = std::make_unique<Worker>();
  std::promise<void> begun, go_on;
  worker->submit([&] {
    begun.set_value();
    go_on.get_future().wait();
  });
  begun.get_future().wait();
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);   // instead of a hang
    worker.reset();
    _exit(0);
  }
  int status = 1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  go_on.set_value();
  worker->drain();
}

TEST(Worker, DropWaitsForWhatIsUnderWayOnly) {
  std::atomic<int> done{0};
  {
    Worker worker;
    std::promise<void> begun, go_on;
    worker.submit([&] {
      begun.set_value();
      go_on.get_future().wait();
      ++done;
    });
    for (int i = 0; i < 5; ++i) worker.submit([&] { ++done; });
    begun.get_future().wait();
    std::thread later([&] { go_on.set_value(); });
    worker.drop();
    later.join();
    EXPECT_GE(done, 1);
    EXPECT_LE(done, 6);
    for (int i = 0; i < 5; ++i) worker.submit([&] { ++done; });
  }
  EXPECT_LE(done, 11);
}

// Parts of a heap block that begin and end anywhere: bytes and neighbours stay, untouched pages stay away.
TEST(HugePages, CollapseKeepsBytes) {
  const Buffer memory(5 * kHugePageBytes);
  auto* bytes = static_cast<unsigned char*>(memory.data());
  for (size_t i = 0; i < 3 * kHugePageBytes; ++i) bytes[i] = static_cast<unsigned char>(i * 7 >> 3);
  collapse_huge_pages(bytes + 13, memory.bytes() - 100);
  for (size_t i = 0; i < 3 * kHugePageBytes; ++i) ASSERT_EQ(bytes[i], static_cast<unsigned char>(i * 7 >> 3)) << i;
  EXPECT_LE(memory.resident_bytes(), 3 * kHugePageBytes);
  collapse_huge_pages(bytes, 0);
  collapse_huge_pages(bytes + 1, kHugePageBytes);  // no whole huge page in it
}

}  // namespace ds::platform
