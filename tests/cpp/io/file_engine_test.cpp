// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "io/chunk.h"
#include "io/file_engine.h"
#include "platform/memory.h"

namespace ds::io {
namespace {

using platform::Buffer;
using platform::File;
using platform::FileError;

class Engines : public ::testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/ds_io_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    if (GetParam() == Backend::Uring && make_uring_engine({}) == nullptr) GTEST_SKIP() << "this kernel refuses io_uring";
  }
  void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + directory_ + "'").c_str()), 0); }

  std::unique_ptr<FileEngine> engine(bool direct = true, int64_t chunk_bytes = 8192, int queue_depth = 4) const {
    EngineOptions options;
    options.backend = GetParam();
    options.direct = direct;
    options.chunk_bytes = chunk_bytes;
    options.queue_depth = queue_depth;
    return FileEngine::create(options);
  }

  static int code_of(const std::shared_ptr<Request>& request, std::string* message = nullptr) {
    try {
      request->wait();
    } catch (const FileError& error) {
      if (message) *message = error.message;
      return error.code;
    }
    return -1;
  }

  std::string directory_;
};

INSTANTIATE_TEST_SUITE_P(Backends, Engines, ::testing::Values(Backend::Threads, Backend::Uring),
                         [](const auto& info) { return info.param == Backend::Threads ? "Threads" : "Uring"; });

TEST_P(Engines, MoveAnyRangeUnchanged) {
  std::mt19937 random(7);
  for (bool direct : {true, false}) {
    const auto e = engine(direct);
    const auto file = e->open(directory_ + "/f", File::Mode::Create);
    Buffer source(200000), copy(200000);
    auto* s = static_cast<unsigned char*>(source.data());
    auto* c = static_cast<unsigned char*>(copy.data());
    for (size_t i = 0; i < source.bytes(); ++i) s[i] = static_cast<unsigned char>(random());
    // memory offset, file offset, bytes: aligned alike, aligned differently, within one block, empty
    const int64_t cases[][3] = {{0, 0, 65536},   {0, 0, 65537}, {100, 4196, 100000}, {1, 0, 50000}, {4095, 4095, 2},
                                {17, 17, 1},     {0, 0, 0},     {8191, 8191, 8194},  {5, 9, 4096},  {4096, 8192, 4096}};
    for (const auto& [memory, offset, bytes] : cases) {
      e->write(file, offset, s + memory, bytes)->wait();
      std::memset(c, 0xee, copy.bytes());
      const auto request = e->read(file, offset, c + memory, bytes);
      request->wait();
      EXPECT_TRUE(request->done());
      EXPECT_EQ(std::memcmp(s + memory, c + memory, static_cast<size_t>(bytes)), 0) << memory << " " << offset << " " << bytes;
      EXPECT_EQ(c[memory + bytes], 0xee);
      EXPECT_TRUE(memory == 0 || c[memory - 1] == 0xee);
    }
  }
}

TEST_P(Engines, ManyRequestsFromManyThreads) {
  const auto e = engine(true, 4096, 3);
  const auto file = e->open(directory_ + "/f", File::Mode::Create);
  constexpr int kThreads = 4, kRequests = 50;
  constexpr int64_t kBytes = 10000;
  std::vector<std::thread> threads;
  std::vector<int> wrong(kThreads, 0);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Buffer data(kRequests * kBytes), back(kRequests * kBytes);
      std::memset(data.data(), t + 1, data.bytes());
      const int64_t base = t * kRequests * kBytes;
      std::vector<std::shared_ptr<Request>> requests;
      for (int i = 0; i < kRequests; ++i) {
        requests.push_back(e->write(file, base + i * kBytes, static_cast<char*>(data.data()) + i * kBytes, kBytes));
      }
      for (const auto& request : requests) request->wait();
      e->read(file, base, back.data(), kRequests * kBytes)->wait();
      wrong[t] = std::memcmp(data.data(), back.data(), back.bytes());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(kThreads, 0));
  EXPECT_EQ(file->file().size(), kThreads * kRequests * kBytes);
}

TEST_P(Engines, DestructionFinishesWhatIsUnderWay) {
  std::vector<char> data(1000000, 'x');
  {
    const auto e = engine(false, 4096, 2);
    e->write(e->open(directory_ + "/f", File::Mode::Create), 0, data.data(), static_cast<int64_t>(data.size()));
  }
  EXPECT_EQ(File(directory_ + "/f", File::Mode::Read).size(), 1000000);
}

TEST_P(Engines, ReadPastTheEndIsNamed) {
  const auto e = engine();
  const auto file = e->open(directory_ + "/f", File::Mode::Create);
  e->write(file, 0, "0123456789", 10)->wait();
  std::vector<char> data(30000);
  std::string message;
  const auto request = e->read(file, 4, data.data(), 30000);
  EXPECT_EQ(code_of(request, &message), 0);
  EXPECT_NE(message.find("read of 30000 bytes at offset 4 (the file ends at 10) of " + directory_ + "/f"), std::string::npos) << message;
  EXPECT_EQ(code_of(request), 0);  // every wait reports it
}

TEST_P(Engines, FullDeviceIsNamed) {
  const auto e = engine();
  std::string message;
  EXPECT_EQ(code_of(e->write(e->open("/dev/full", File::Mode::ReadWrite), 0, "abc", 3), &message), ENOSPC);
  EXPECT_NE(message.find("write of 3 bytes"), std::string::npos) << message;
  EXPECT_NE(message.find("/dev/full"), std::string::npos) << message;
  EXPECT_NE(message.find("No space left"), std::string::npos) << message;
}

TEST_P(Engines, DeviceErrorIsNamed) {
  const auto e = engine(false);
  char data[16];
  // Address 0 of one's own memory is not mapped; the kernel answers EIO.
  EXPECT_EQ(code_of(e->read(e->open("/proc/self/mem", File::Mode::Read), 0, data, 16)), EIO);
}

TEST_P(Engines, ReadOnlyFileRefusesWrites) {
  const auto e = engine();
  e->write(e->open(directory_ + "/f", File::Mode::Create), 0, "abc", 3)->wait();
  EXPECT_EQ(code_of(e->write(e->open(directory_ + "/f", File::Mode::Read), 0, "abc", 3)), EBADF);
}

TEST_P(Engines, BadArguments) {
  const auto e = engine();
  const auto file = e->open(directory_ + "/f", File::Mode::Create);
  char byte;
  EXPECT_THROW(e->read(file, -1, &byte, 1), ValueError);
  EXPECT_THROW(e->read(file, 0, &byte, -1), ValueError);
  EXPECT_THROW(e->read(file, INT64_MAX, &byte, 1), Error);
  EXPECT_THROW(e->open(directory_ + "/none/f", File::Mode::Create), FileError);
}

TEST_P(Engines, SeveralAtOnce) {
  const auto e = engine(true, 4096, 8);
  const auto a = e->open(directory_ + "/a", File::Mode::Create), b = e->open(directory_ + "/b", File::Mode::Create);
  Buffer out(40000), in(40000);
  for (size_t i = 0; i < out.bytes(); ++i) static_cast<char*>(out.data())[i] = static_cast<char>(i * 7 + i / 256);
  char *const from = static_cast<char*>(out.data()), *const to = static_cast<char*>(in.data());
  for (const auto& r : e->start({{a, true, 0, from, 10000}, {b, true, 5, from + 10000, 20000}, {a, true, 12288, from + 30000, 10000}})) r->wait();
  const auto reads = e->start({{a, false, 0, to, 10000}, {b, false, 5, to + 10000, 20000}, {a, false, 12288, to + 30000, 10000}, {a, false, 0, to, 0}});
  ASSERT_EQ(reads.size(), 4u);
  for (const auto& r : reads) r->wait();
  EXPECT_EQ(std::memcmp(from, to, out.bytes()), 0);
  EXPECT_TRUE(e->start({}).empty());
  EXPECT_THROW(e->start({{a, true, 0, from, 10}, {nullptr, true, 0, from, 10}}), ValueError);
}

TEST_P(Engines, KnownBuffersAndFiles) {
  const auto e = engine(true, 8192, 4);
  Buffer out(65536), in(65536);
  std::memset(out.data(), 'k', out.bytes());
  const auto first = e->open(directory_ + "/f", File::Mode::Create);
  auto known = e->register_buffer(out.data(), static_cast<int64_t>(out.bytes()));
  const EngineCounts before = e->counts();
  e->write(first, 0, out.data(), 65536)->wait();
  const EngineCounts after = e->counts();
  if (GetParam() == Backend::Uring && known->active()) {
    EXPECT_EQ(after.known_buffer - before.known_buffer, 8);
    EXPECT_EQ(after.known_file - before.known_file, 8);
  }
  known.reset();
  e->read(first, 0, in.data(), 65536)->wait();   // unknown memory
  EXPECT_EQ(e->counts().known_buffer, after.known_buffer);
  EXPECT_EQ(std::memcmp(in.data(), out.data(), in.bytes()), 0);
  // More than there are places, again and again, of files and of buffers.
  std::vector<std::shared_ptr<EngineFile>> files;
  std::vector<std::unique_ptr<KnownBuffer>> buffers;
  for (int round = 0; round < 3; ++round) {
    files.clear();
    buffers.clear();
    for (int i = 0; i < 200; ++i) {
      files.push_back(e->open(directory_ + "/" + std::to_string(i), File::Mode::Create));
      buffers.push_back(e->register_buffer(out.data(), 65536));
      std::memcpy(out.data(), &i, sizeof(i));
      e->write(files.back(), 0, out.data(), 4096)->wait();
    }
    for (int i = 0; i < 200; ++i) {
      int found = -1;
      e->read(files[static_cast<size_t>(i)], 0, &found, sizeof(found))->wait();
      EXPECT_EQ(found, i);
    }
  }
  EXPECT_NE(e->register_buffer(nullptr, 100), nullptr);
}

TEST_P(Engines, WhatIsKnownMayOutliveTheEngine) {
  Buffer memory(8192);
  std::shared_ptr<EngineFile> file;
  std::unique_ptr<KnownBuffer> known;
  {
    const auto e = engine();
    file = e->open(directory_ + "/f", File::Mode::Create);
    known = e->register_buffer(memory.data(), 8192);
  }
  known.reset();
  const auto other = engine();   // a file of one engine works with another
  other->write(file, 0, "abc", 3)->wait();
  char text[3];
  other->read(file, 0, text, 3)->wait();
  EXPECT_EQ(std::string(text, 3), "abc");
}

TEST_P(Engines, RefusedRegistrationChangesNothing) {
  // Another user with a low limit of locked memory, as in many containers.
  const pid_t child = fork();
  if (child == 0) {
    const rlimit low{65536, 65536};
    bool right = chmod(directory_.c_str(), 0777) == 0 && setrlimit(RLIMIT_MEMLOCK, &low) == 0 && (geteuid() != 0 || setuid(65534) == 0);
    try {
      const auto e = engine();
      Buffer out(1 << 20), in(1 << 20);
      std::memset(out.data(), 'r', out.bytes());
      const auto known = e->register_buffer(out.data(), 1 << 20);
      const auto file = e->open(directory_ + "/f", File::Mode::Create);
      e->write(file, 0, out.data(), 1 << 20)->wait();
      e->read(file, 0, in.data(), 1 << 20)->wait();
      right = right && !known->active() && e->counts().known_buffer == 0 && std::memcmp(in.data(), out.data(), in.bytes()) == 0;
    } catch (const Error& error) {
      fprintf(stderr, "%s\n", error.what());
      right = false;
    }
    _exit(right ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_P(Engines, ForkedChildIsRefusedAndHarmless) {
  auto e = engine();
  auto file = e->open(directory_ + "/f", File::Mode::Create);
  Buffer memory(65536);
  auto known = e->register_buffer(memory.data(), 65536);
  const pid_t child = fork();
  if (child == 0) {
    bool refused = false;
    try {
      e->write(file, 0, memory.data(), 4096);
    } catch (const Error& error) {
      refused = error.message.find("before a fork") != std::string::npos;
    }
    known.reset();
    file.reset();
    e.reset();
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  const EngineCounts before = e->counts();
  e->write(file, 0, memory.data(), 65536)->wait();   // still known here
  if (known->active()) {
    EXPECT_EQ(e->counts().known_buffer - before.known_buffer, 8);
  }
}

TEST_P(Engines, VanishedFolder) {
  const auto e = engine();
  Buffer data(65536);
  ASSERT_EQ(mkdir((directory_ + "/gone").c_str(), 0755), 0);
  const auto file = e->open(directory_ + "/gone/f", File::Mode::Create);
  ASSERT_EQ(std::system(("rm -r '" + directory_ + "/gone'").c_str()), 0);
  e->write(file, 0, data.data(), 65536)->wait();   // what is open stays usable
  e->read(file, 0, data.data(), 65536)->wait();
  try {
    e->open(directory_ + "/gone/f", File::Mode::Read);
    FAIL();
  } catch (const FileError& error) {
    EXPECT_EQ(error.code, ENOENT);
    EXPECT_NE(error.message.find("opening of " + directory_ + "/gone/f failed"), std::string::npos) << error.message;
  }
}

TEST_P(Engines, WaysOfSubmitting) {
  for (const bool single : {false, true}) {
    for (const bool overlap : {false, true}) {
      EngineOptions options;
      options.backend = GetParam();
      options.chunk_bytes = 4096;
      options.queue_depth = 5;
      options.single_submit = single;
      options.overlap = overlap;
      options.faults = FaultOptions::parse("seed=3,cut=0.3,again=0.2");
      const auto e = FileEngine::create(options);
      Buffer out(100000), in(100000);
      for (size_t i = 0; i < out.bytes(); ++i) static_cast<char*>(out.data())[i] = static_cast<char>(i * 13 + i / 512);
      const auto file = e->open(directory_ + "/f", File::Mode::Create);
      e->write(file, 0, out.data(), 100000)->wait();
      e->read(file, 0, in.data(), 100000)->wait();
      EXPECT_EQ(std::memcmp(in.data(), out.data(), in.bytes()), 0) << single << overlap;
      const EngineCounts counts = e->counts();
      if (GetParam() == Backend::Uring && single && !overlap) {
        EXPECT_GE(counts.system_calls, 50);
      }
    }
  }
}

TEST(Options, AreChecked) {
  EngineOptions options;
  for (int depth : {0, kMaxQueueDepth + 1}) {
    options.queue_depth = depth;
    EXPECT_THROW(FileEngine::create(options), ValueError);
  }
  options = {};
  options.threads = 0;
  EXPECT_THROW(FileEngine::create(options), ValueError);
  for (int64_t bytes : {int64_t{0}, int64_t{100}, kMaxChunkBytes * 2}) {
    options = {};
    options.chunk_bytes = bytes;
    EXPECT_THROW(FileEngine::create(options), ValueError);
  }
  setenv("DS_IO_ENGINE", "threads", 1);
  EXPECT_STREQ(FileEngine::create({})->name(), "threads");
  setenv("DS_IO_ENGINE", "floppy", 1);
  EXPECT_THROW(FileEngine::create({}), ValueError);
  unsetenv("DS_IO_ENGINE");
}

// What the system may answer, without needing a system that does.
class ChunkAnswers : public ::testing::Test {
 protected:
  ChunkAnswers() {
    std::string pattern = ::testing::TempDir() + "/ds_io_XXXXXX";
    path_ = pattern;
    close(mkstemp(path_.data()));
    auto file = std::make_shared<EngineFile>(path_, File::Mode::ReadWrite, false);
    data_.resize(static_cast<size_t>(3 * kDirectAlignment + 64));
    request_ = std::make_shared<Request>(file, true, 0, data_.data(), 3 * kDirectAlignment);
    ChunkQueue queue;
    queue.push(request_, EngineOptions{});
    chunk_ = std::make_unique<Chunk>(queue.pop());
  }
  ~ChunkAnswers() override { unlink(path_.c_str()); }

  std::string path_;
  std::vector<char> data_;
  std::shared_ptr<Request> request_;
  std::unique_ptr<Chunk> chunk_;
};

TEST_F(ChunkAnswers, ShortTransferGoesOnWhereItStopped) {
  EXPECT_FALSE(chunk_->complete(100));
  EXPECT_EQ(chunk_->offset, 100);
  EXPECT_EQ(chunk_->data, data_.data() + 100);
  EXPECT_EQ(chunk_->bytes, 3 * kDirectAlignment - 100);
  EXPECT_FALSE(request_->done());
  EXPECT_TRUE(chunk_->complete(chunk_->bytes));
  EXPECT_TRUE(request_->done());
  EXPECT_NO_THROW(request_->wait());
}

TEST_F(ChunkAnswers, InterruptionsAreRepeated) {
  EXPECT_FALSE(chunk_->complete(-EINTR));
  EXPECT_FALSE(chunk_->complete(-EAGAIN));
  EXPECT_EQ(chunk_->offset, 0);
}

TEST_F(ChunkAnswers, DirectAccessIsGivenUpWhenRefusedOrUnaligned) {
  chunk_->direct = true;
  EXPECT_FALSE(chunk_->complete(kDirectAlignment));
  EXPECT_TRUE(chunk_->direct);
  EXPECT_FALSE(chunk_->complete(512));
  EXPECT_FALSE(chunk_->direct);
  chunk_->direct = true;
  EXPECT_FALSE(chunk_->complete(-EINVAL));
  EXPECT_FALSE(chunk_->direct);
  EXPECT_TRUE(chunk_->complete(-EINVAL));  // through the cache it is a real error
  EXPECT_THROW(request_->wait(), FileError);
}

TEST_F(ChunkAnswers, NothingWrittenMeansFull) {
  EXPECT_TRUE(chunk_->complete(0));
  try {
    request_->wait();
    FAIL();
  } catch (const FileError& error) {
    EXPECT_EQ(error.code, ENOSPC);
  }
}

}  // namespace
}  // namespace ds::io
