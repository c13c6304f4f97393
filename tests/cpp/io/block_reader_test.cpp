// SPDX-License-Identifier: Apache-2.0
#include "io/block_reader.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "io/block_sink.h"
#include "io/crc32c.h"
#include "io/safetensors.h"
#include "io/safetensors_stream.h"

namespace ds::io {
namespace {

namespace fs = std::filesystem;

struct Folder {
  Folder() : path(fs::temp_directory_path() / ("block_reader_" + std::to_string(getpid()))) { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
  std::string operator/(const std::string& name) const { return (path / name).string(); }
  fs::path path;
};

std::vector<float> values(size_t n) {
  std::mt19937 draw(3);
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  for (auto& x : v) x = normal(draw);
  return v;
}

// Each backend past the page cache where the file system allows that, and through it.
class Streams : public ::testing::TestWithParam<std::tuple<Backend, bool>> {
 protected:
  void SetUp() override {
    EngineOptions options;
    std::tie(options.backend, options.direct) = GetParam();
    try {
      engine = FileEngine::create(options);
    } catch (const Error&) {
      GTEST_SKIP() << "no io_uring here";
    }
  }
  // 3 entries, written in pieces of `piece` bytes.
  StreamedFile write(const std::string& path, int64_t piece, int64_t block) {
    StreamOptions options;
    options.block_bytes = block;
    options.buffers = 3;
    SafetensorsStream out(*engine, path, {{"a", DType::F32, {300001}}, {"b", DType::F32, {0}}, {"c", DType::U8, {777}}}, {}, options);
    offsets = out.offsets();
    std::vector<char> all(300001 * 4 + 777);
    std::memcpy(all.data(), data.data(), 300001 * 4);
    for (size_t i = 0; i < 777; ++i) all[300001 * 4 + i] = static_cast<char>(i);
    for (size_t at = 0; at < all.size(); at += static_cast<size_t>(piece)) {
      out.write(all.data() + at, std::min<int64_t>(piece, static_cast<int64_t>(all.size() - at)));
    }
    return out.finish();
  }
  std::unique_ptr<FileEngine> engine;
  std::vector<float> data = values(300001);
  std::vector<int64_t> offsets;
  Folder folder;
};

TEST_P(Streams, AFileReadsBackWholeByRangesAndByTheStrictReader) {
  for (int64_t piece : {1'200'781, 300'000, 70'001, 4096, 999}) {
    const std::string path = folder / ("f" + std::to_string(piece));
    const StreamedFile written = write(path, piece, 65536);
    ASSERT_EQ(written.bytes, static_cast<int64_t>(fs::file_size(path)));
    const SafetensorsReader strict(*engine, path);
    EXPECT_EQ(strict.find("a").bytes(), 300001 * 4);
    BlockReader reader(*engine, path, written.bytes, 65536, written.block_sums);
    reader.verify();
    std::vector<float> one(1000), two(120000), three(1);
    std::vector<unsigned char> tail(777);
    reader.read({{offsets[0] + 4 * 250000, 1000, DType::F32, DType::F32, one.data()},
                 {offsets[0] + 4 * 5, 120000, DType::F32, DType::F32, two.data()},
                 {offsets[0], 0, DType::F32, DType::F32, nullptr},
                 {offsets[0] + 4 * 300000, 1, DType::F32, DType::F32, three.data()},
                 {offsets[2], 777, DType::U8, DType::U8, tail.data()}});
    EXPECT_EQ(std::memcmp(one.data(), data.data() + 250000, 4000), 0);
    EXPECT_EQ(std::memcmp(two.data(), data.data() + 5, 480000), 0);
    EXPECT_EQ(three[0], data[300000]);
    for (size_t i = 0; i < 777; ++i) ASSERT_EQ(tail[i], static_cast<unsigned char>(i));
  }
}

TEST_P(Streams, SumsAloneAreThoseOfTheFile) {
  for (int64_t block : {int64_t{4096}, int64_t{65536}, int64_t{1} << 20}) {
    const StreamedFile written = write(folder / ("g" + std::to_string(block)), 5000, block), summed = write("", 70000, block);
    EXPECT_EQ(written.bytes, summed.bytes);
    EXPECT_EQ(written.block_sums, summed.block_sums);
  }
}

TEST(SafetensorsStream, AFullMemoryFileSystemIsAnErrorThatNamesTheFile) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  const auto engine = FileEngine::create({});
  const auto file = std::make_shared<EngineFile>("/dev/full", platform::File::Mode::ReadWrite, false);
  const auto sink = make_cached_sink(file, 1 << 20);
  const std::vector<char> much(1 << 20), little(100);
  sink->write(little.data(), 100);   // waits for more
  try {
    sink->write(much.data(), 1 << 20);
    FAIL() << "nothing was thrown";
  } catch (const platform::FileError& error) {
    EXPECT_EQ(error.code, ENOSPC);
    EXPECT_NE(error.message.find("/dev/full"), std::string::npos);
  }
}

TEST_P(Streams, DamageAndOtherSizesAreNamed) {
  const std::string path = folder / "h";
  const StreamedFile written = write(path, 1 << 20, 65536);
  {
    platform::File file(path, platform::File::Mode::ReadWrite);
    file.write("\x5a\xa5", 2, 200000);
  }
  BlockReader reader(*engine, path, written.bytes, 65536, written.block_sums);
  EXPECT_THROW(reader.verify(), ChecksumError);
  std::vector<float> got(10);
  reader.read({{offsets[0], 10, DType::F32, DType::F32, got.data()}});   // another block
  EXPECT_THROW(reader.read({{196608, 10, DType::F32, DType::F32, got.data()}}), ChecksumError);
  EXPECT_THROW(BlockReader(*engine, path, written.bytes - 1, 65536, written.block_sums), ChecksumError);
  EXPECT_THROW(reader.read({{written.bytes - 2, 1, DType::F32, DType::F32, got.data()}}), ValueError);
  EXPECT_THROW(reader.read({{offsets[0] + 1, 1, DType::F32, DType::F32, got.data()}}), ValueError);
}

TEST_P(Streams, WhatDoesNotFitTheEntriesIsRefused) {
  SafetensorsStream out(*engine, folder / "i", {{"a", DType::F32, {2}}}, {}, {});
  const float v[3] = {1, 2, 3};
  EXPECT_THROW(out.write(v, 12), ValueError);
  out.write(v, 4);
  EXPECT_THROW(out.finish(), Error);
  EXPECT_THROW(SafetensorsStream(*engine, folder / "i", {}, {}, {}), platform::FileError);   // it exists
  EXPECT_THROW(SafetensorsStream(*engine, folder / "j", {{"a", DType::U8, {1}}, {"b", DType::F32, {1}}}, {}, {}), ValueError);
  EXPECT_THROW(SafetensorsStream(*engine, folder / "k", {{"a", DType::U8, {1}}, {"a", DType::U8, {1}}}, {}, {}), ValueError);
}

INSTANTIATE_TEST_SUITE_P(Backends, Streams, ::testing::Combine(::testing::Values(Backend::Threads, Backend::Uring), ::testing::Bool()));

TEST(ConvertElements, RoundsAsTheScalarFunctions) {
  auto v = values(1001);
  v[0] = std::numeric_limits<float>::infinity();
  v[1] = std::numeric_limits<float>::quiet_NaN();
  v[2] = 65520.0f;
  v[3] = 1e-8f;
  std::vector<uint16_t> half(v.size()), brain(v.size());
  convert_elements(v.data(), DType::F32, half.data(), DType::F16, 1001);
  convert_elements(v.data(), DType::F32, brain.data(), DType::BF16, 1001);
  std::vector<float> back(v.size());
  std::vector<uint16_t> cross(v.size());
  convert_elements(brain.data(), DType::BF16, back.data(), DType::F32, 1001);
  convert_elements(half.data(), DType::F16, cross.data(), DType::BF16, 1001);
  for (size_t i = 0; i < v.size(); ++i) {
    EXPECT_EQ(half[i], float_to_f16(v[i]));
    EXPECT_EQ(brain[i], float_to_bf16(v[i]));
    EXPECT_EQ(float_bits(back[i]), float_bits(bf16_to_float(brain[i])));
    EXPECT_EQ(cross[i], float_to_bf16(f16_to_float(half[i])));
  }
  EXPECT_THROW(convert_elements(v.data(), DType::F32, half.data(), DType::I16, 1), ValueError);
}

}  // namespace
}  // namespace ds::io
