// SPDX-License-Identifier: Apache-2.0
// Faults at random in the file engine: never wrong bytes, always an error or the right bits.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "io/chunk.h"
#include "io/faults.h"
#include "io/file_engine.h"
#include "platform/memory.h"

namespace ds::io {
namespace {

using platform::Buffer;
using platform::File;
using platform::FileError;

TEST(FaultOptions, AreParsedAndChecked) {
  const FaultOptions all = FaultOptions::parse("seed=7,error=0.01,torn=0.02,cut=0.1,again=0.2,delay=0.3,delay_us=40");
  EXPECT_EQ(all.seed, 7u);
  EXPECT_EQ(all.error, 0.01);
  EXPECT_EQ(all.torn, 0.02);
  EXPECT_EQ(all.cut, 0.1);
  EXPECT_EQ(all.again, 0.2);
  EXPECT_EQ(all.delay, 0.3);
  EXPECT_EQ(all.delay_us, 40);
  EXPECT_EQ(FaultOptions::parse("").error, 0);
  for (const char* text : {"error", "error=", "error=x", "error=0.1x", "error=2", "error=-1", "again=0.95", "error=0.6,torn=0.6", "eror=0.1",
                           "delay_us=-1", "seed=0.5"}) {
    EXPECT_THROW(FaultOptions::parse(text), ValueError) << text;
  }
  setenv("DS_IO_FAULTS", "error=1", 1);
  char byte = 0;
  const auto engine = FileEngine::create({});
  EXPECT_THROW(engine->read(engine->open("/proc/self/exe", File::Mode::Read), 0, &byte, 1)->wait(), FileError);
  setenv("DS_IO_FAULTS", "nonsense", 1);
  EXPECT_THROW(FileEngine::create({}), ValueError);
  unsetenv("DS_IO_FAULTS");
}

class Runs : public ::testing::TestWithParam<Backend> {
 protected:
  static constexpr int64_t kFileBytes = 160000;

  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/ds_faults_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    if (GetParam() == Backend::Uring && make_uring_engine({}) == nullptr) GTEST_SKIP() << "this kernel refuses io_uring";
  }
  void TearDown() override { EXPECT_EQ(std::system(("rm -rf '" + directory_ + "'").c_str()), 0); }

  std::unique_ptr<FileEngine> engine(const std::optional<FaultOptions>& faults, std::mt19937_64& random) const {
    EngineOptions options;
    options.backend = GetParam();
    options.direct = random() % 4 != 0;
    options.chunk_bytes = kDirectAlignment << random() % 4;
    options.queue_depth = 1 + static_cast<int>(random() % 8);
    options.threads = 2;
    options.overlap = random() % 4 != 0;
    options.single_submit = random() % 4 == 0;
    options.faults = faults ? faults : FaultOptions{};
    return FileEngine::create(options);
  }

  static FaultOptions faults(std::mt19937_64& random) {
    const auto p = [&](double most) { return static_cast<double>(random() % 1000) / 1000 * most; };
    FaultOptions options;
    options.seed = random();
    options.error = p(0.03);
    options.torn = p(0.03);
    options.cut = p(0.4);
    options.again = p(0.3);
    options.delay = p(0.1);
    options.delay_us = 50;
    return options;
  }

  struct Outcome {
    std::vector<std::string> messages;  // empty: no error
    bool operator==(const Outcome& other) const { return messages == other.messages; }
  };

  // Writes disjoint ranges, reads them back, checks each: an error or the right bits, and what was not written to is as it was.
  Outcome run(uint64_t seed);

  std::string directory_;
  int64_t good_writes_ = 0, good_reads_ = 0, errors_ = 0;
};

INSTANTIATE_TEST_SUITE_P(Backends, Runs, ::testing::Values(Backend::Threads, Backend::Uring),
                         [](const auto& info) { return info.param == Backend::Threads ? "Threads" : "Uring"; });

Runs::Outcome Runs::run(uint64_t seed) {
  std::mt19937_64 random(seed);
  const std::string path = directory_ + "/f";
  const FaultOptions with = faults(random);
  const auto e = engine(with, random);
  const auto file = e->open(path, File::Mode::Create);
  Buffer out(kFileBytes + 4096), in(kFileBytes + 4096);
  const int64_t shift = random() % 2 == 0 ? 0 : static_cast<int64_t>(random() % 4096);   // memory alignment of both
  char *const source = static_cast<char*>(out.data()) + shift, *const copy = static_cast<char*>(in.data()) + shift;
  for (int64_t i = 0; i < kFileBytes; ++i) source[i] = static_cast<char>(random());
  const std::string old(kFileBytes, 'o');
  file->file().write(old.data(), old.size(), 0);
  std::unique_ptr<KnownBuffer> known[2];
  if (random() % 2 == 0) {
    known[0] = e->register_buffer(source, kFileBytes);
    known[1] = e->register_buffer(copy, kFileBytes);
  }

  std::vector<Transfer> writes;
  for (int64_t at = 0; at < kFileBytes;) {
    const int64_t bytes = std::min<int64_t>(kFileBytes - at, random() % 2 == 0 ? 1 + static_cast<int64_t>(random() % 50000) : 16384);
    if (random() % 4 != 0) writes.push_back({file, true, at, source + at, bytes});
    at += bytes;
  }
  Outcome outcome;
  std::vector<char> is_right(writes.size(), 0);
  const auto settle = [&](const std::shared_ptr<Request>& request) {
    try {
      request->wait();
      return true;
    } catch (const FileError& error) {
      EXPECT_TRUE(error.code == EIO || error.code == ENOSPC) << error.message;
      EXPECT_NE(error.message.find(path), std::string::npos) << error.message;
      outcome.messages.push_back(error.message);
      ++errors_;
      return false;
    }
  };
  const auto under_way = e->start(writes);
  for (size_t i = 0; i < writes.size(); ++i) is_right[i] = settle(under_way[i]);

  // What the file holds, seen without the engine.
  std::string found(kFileBytes, '\0');
  File(path, File::Mode::Read).read(found.data(), found.size(), 0);
  std::set<int64_t> written;
  for (size_t i = 0; i < writes.size(); ++i) {
    const auto at = static_cast<size_t>(writes[i].offset), bytes = static_cast<size_t>(writes[i].bytes);
    if (is_right[i]) {
      EXPECT_EQ(std::memcmp(found.data() + at, source + at, bytes), 0) << "a write that succeeded is not in the file, seed " << seed;
    }
    good_writes_ += is_right[i];
    for (size_t b = at; b < at + bytes; ++b) {
      if (found[b] != 'o' && found[b] != source[b]) ADD_FAILURE() << "byte " << b << " was never written, seed " << seed;
    }
  }
  int64_t at = 0;
  for (size_t i = 0; i <= writes.size(); ++i) {
    const int64_t until = i < writes.size() ? writes[i].offset : kFileBytes;
    EXPECT_EQ(found.compare(static_cast<size_t>(at), static_cast<size_t>(until - at), old, 0, static_cast<size_t>(until - at)), 0)
        << "a write left its range, seed " << seed;
    at = i < writes.size() ? until + writes[i].bytes : until;
  }

  // Reads of the same ranges, bytes around them untouched.
  std::memset(in.data(), 'i', in.bytes());
  for (size_t i = 0; i < writes.size(); i += 2) {
    const Transfer& w = writes[i];
    if (settle(e->read(file, w.offset, copy + w.offset, w.bytes))) {
      ++good_reads_;
      EXPECT_EQ(std::memcmp(copy + w.offset, found.data() + w.offset, static_cast<size_t>(w.bytes)), 0) << "wrong bytes were read, seed " << seed;
    }
    if (w.offset + w.bytes < kFileBytes) {
      EXPECT_EQ(copy[w.offset + w.bytes], 'i') << "a read left its range, seed " << seed;
    }
  }
  return outcome;
}

TEST_P(Runs, AThousandGiveAnErrorOrTheRightBits) {
  for (uint64_t seed = 0; seed < 1000 && !HasFailure(); ++seed) run(seed);
  // The probabilities are such that each happens thousands of times.
  EXPECT_GT(good_writes_, 1000);
  EXPECT_GT(good_reads_, 1000);
  EXPECT_GT(errors_, 300);
}

TEST_P(Runs, AreTheSameForASeed) {
  int with_errors = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Outcome first = run(seed);
    EXPECT_EQ(first, run(seed)) << seed;
    with_errors += !first.messages.empty();
  }
  EXPECT_GT(with_errors, 5);
}

}  // namespace
}  // namespace ds::io
