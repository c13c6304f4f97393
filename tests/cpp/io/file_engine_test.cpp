// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
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

TEST(Options, AreChecked) {
  EngineOptions options;
  options.queue_depth = 0;
  EXPECT_THROW(FileEngine::create(options), ValueError);
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
    request_ = std::make_shared<Request>(file, true, 0, 3 * kDirectAlignment);
    data_.resize(static_cast<size_t>(3 * kDirectAlignment + 64));
    ChunkQueue queue;
    queue.push(request_, data_.data(), EngineOptions{});
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
