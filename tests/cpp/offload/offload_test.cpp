// SPDX-License-Identifier: Apache-2.0
// Ranges of a file that are mapped and streamed: both see the same bytes, whatever the sizes, and an error ends everything that was under way.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "base/error.h"
#include "offload/tier_file.h"
#include "offload/tile_stream.h"

namespace ds::offload {
namespace {

constexpr int64_t kPage = 4096;

struct Folder {
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("ds_offload_" + std::to_string(::getpid()));
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

class Offload : public ::testing::TestWithParam<io::Backend> {
 protected:
  io::EngineOptions options() const {
    io::EngineOptions o;
    o.backend = GetParam();
    o.chunk_bytes = 4 * kPage;
    return o;
  }
  std::shared_ptr<TierFile> make() { return TierFile::create(folder.path.string(), options()); }
  Folder folder;
};

TEST_P(Offload, RangesAreZeroAndApartAndNameless) {
  const auto file = make();
  EXPECT_TRUE(std::filesystem::is_empty(folder.path));
  auto a = file->allocate(1), b = file->allocate(3 * kPage + 5), c = file->allocate(0);
  auto* bytes = static_cast<char*>(b.get());
  for (int64_t i = 0; i < 4 * kPage; ++i) ASSERT_EQ(bytes[i], 0);
  EXPECT_EQ(file->bytes(), 6 * kPage);
  EXPECT_EQ(*file->offset_of(bytes + 17), *file->offset_of(b.get()) + 17);
  EXPECT_NE(*file->offset_of(a.get()), *file->offset_of(b.get()));
  EXPECT_FALSE(file->offset_of(&bytes));
  b.reset();
  EXPECT_EQ(file->bytes(), 2 * kPage);
  EXPECT_FALSE(file->offset_of(bytes));
  // A range that is freed leaves no bytes for the next one.
  auto d = file->allocate(4 * kPage);
  for (int64_t i = 0; i < 4 * kPage; ++i) ASSERT_EQ(static_cast<char*>(d.get())[i], 0);
}

TEST_P(Offload, LeavingKeepsValues) {
  const auto file = make();
  auto range = file->allocate(8 * kPage);
  std::memset(range.get(), 5, 8 * kPage);
  file->leave(static_cast<char*>(range.get()) + 10, 3 * kPage);
  file->leave_all();
  for (int64_t i = 0; i < 8 * kPage; ++i) ASSERT_EQ(static_cast<char*>(range.get())[i], 5);
}

TEST_P(Offload, ARangeOutlivesItsOwner) {
  auto file = make();
  auto range = file->allocate(kPage);
  file.reset();
  std::memset(range.get(), 1, kPage);
}

TEST_P(Offload, AFolderThatIsMissingOrFullSaysSo) {
  try {
    TierFile::create((folder.path / "no" / "such").string(), options());
    FAIL();
  } catch (const platform::FileError& error) {
    EXPECT_EQ(error.code, ENOENT);
    EXPECT_NE(std::string(error.what()).find("no/such"), std::string::npos);
  }
  const auto file = make();
  auto kept = file->allocate(kPage);
  std::memset(kept.get(), 9, kPage);
  const auto space = std::filesystem::space(folder.path);
  EXPECT_THROW(file->allocate(static_cast<int64_t>(space.capacity) + (int64_t{1} << 30)), platform::FileError);
  EXPECT_EQ(static_cast<char*>(kept.get())[kPage - 1], 9);
  auto more = file->allocate(kPage);   // and the file is still good
  EXPECT_NE(more, nullptr);
}

// Every element of every array passes through once, in any number of arrays, jobs and buffers; what is only read stays.
TEST_P(Offload, EveryElementOnce) {
  std::mt19937 random(1);
  for (int round = 0; round < 20; ++round) {
    const auto file = make();
    const int jobs = 1 + static_cast<int>(random() % 3);
    std::vector<std::vector<std::shared_ptr<void>>> memory(jobs);
    std::vector<StreamJob> list(jobs);
    for (int j = 0; j < jobs; ++j) {
      list[j].numel = round == 0 ? 0 : static_cast<int64_t>(random() % 40000);
      const int arrays = 1 + static_cast<int>(random() % 3);
      for (int a = 0; a < arrays; ++a) {
        const int64_t width = a == 0 ? 4 : 2;
        memory[j].push_back(file->allocate(list[j].numel * width));
        for (int64_t i = 0; i < list[j].numel; ++i) {
          if (width == 4) static_cast<uint32_t*>(memory[j][a].get())[i] = static_cast<uint32_t>(i * 3 + j);
          else static_cast<uint16_t*>(memory[j][a].get())[i] = static_cast<uint16_t>(i * 5 + a);
        }
        list[j].arrays.push_back({*file->offset_of(memory[j][a].get()), width, a != 2});
      }
    }
    TileStream stream(file->engine(), {kPage * static_cast<int64_t>(4 + random() % 9), 3 + static_cast<int>(random() % 5)});
    std::vector<int64_t> seen(jobs, 0);
    stream.run(file->file(), list, [&](size_t j, int64_t begin, int64_t numel, void* const* data) {
      EXPECT_EQ(begin, seen[j]);
      seen[j] += numel;
      for (size_t a = 0; a < list[j].arrays.size(); ++a) {
        for (int64_t i = 0; i < numel; ++i) {
          if (list[j].arrays[a].element_bytes == 4) {
            auto& x = static_cast<uint32_t*>(data[a])[i];
            ASSERT_EQ(x, static_cast<uint32_t>((begin + i) * 3 + static_cast<int64_t>(j)));
            x += 1;
          } else {
            auto& x = static_cast<uint16_t*>(data[a])[i];
            ASSERT_EQ(x, static_cast<uint16_t>((begin + i) * 5 + static_cast<int64_t>(a)));
            x = static_cast<uint16_t>(x + 1);
          }
        }
      }
    });
    for (int j = 0; j < jobs; ++j) {
      EXPECT_EQ(seen[j], list[j].numel);
      for (size_t a = 0; a < memory[j].size(); ++a) {
        const int changed = a == 2 ? 0 : 1;
        for (int64_t i = 0; i < list[j].numel; ++i) {
          if (a == 0) ASSERT_EQ(static_cast<uint32_t*>(memory[j][a].get())[i], static_cast<uint32_t>(i * 3 + j + 1));
          else ASSERT_EQ(static_cast<uint16_t*>(memory[j][a].get())[i], static_cast<uint16_t>(i * 5 + static_cast<int64_t>(a) + changed));
        }
      }
    }
  }
}

TEST_P(Offload, ASecondPlaceTakesNewValuesAndBecomesTheRange) {
  const auto file = make();
  constexpr int64_t kNumel = 5 * kPage + 3;
  auto with = file->allocate(kNumel * 4, /*second_place=*/true), without = file->allocate(kNumel * 4);
  auto* values = static_cast<uint32_t*>(with.get());
  EXPECT_FALSE(file->second_place_of(without.get()));
  EXPECT_EQ(*file->second_place_of(values + 5), *file->second_place_of(values) + 20);
  EXPECT_THROW(file->exchange(without.get()), Error);
  EXPECT_THROW(file->exchange(values + kPage), Error);
  for (int64_t i = 0; i < kNumel; ++i) values[i] = static_cast<uint32_t>(i);
  TileStream stream(file->engine(), {2 * kPage, 3});
  const auto add = [&](uint32_t what) {
    const StreamArray array{*file->offset_of(values), 4, true, *file->second_place_of(values)};
    stream.run(file->file(), {{{array}, kNumel}}, [&](size_t, int64_t, int64_t numel, void* const* data) {
      for (int64_t i = 0; i < numel; ++i) static_cast<uint32_t*>(data[0])[i] += what;
    });
  };
  const auto all_are = [&](uint32_t more) {
    for (int64_t i = 0; i < kNumel; ++i) {
      if (values[i] != static_cast<uint32_t>(i) + more) return false;
    }
    return true;
  };
  add(100);   // and forgotten
  EXPECT_TRUE(all_are(0));
  for (uint32_t round = 1; round <= 5; ++round) {
    add(round);
    EXPECT_TRUE(all_are(round * (round - 1) / 2));
    file->exchange(values);
    EXPECT_TRUE(all_are(round * (round + 1) / 2));
    if (round == 3) values[7] += 1, values[7] -= 1;   // a page that is dirty when it is streamed next
  }
  const int64_t before = file->bytes();
  with.reset();
  EXPECT_EQ(before - file->bytes(), 2 * 21 * kPage);
  auto again = file->allocate(kNumel * 4);
  for (int64_t i = 0; i < kNumel; ++i) ASSERT_EQ(static_cast<uint32_t*>(again.get())[i], 0u);
}

TEST_P(Offload, MemoryIsTheBuffersOnly) {
  const auto file = make();
  const int64_t numel = int64_t{1} << 20;
  auto range = file->allocate(numel * 4);
  TileStream stream(file->engine(), {4 * kPage, 4});
  stream.run(file->file(), {{{{*file->offset_of(range.get()), 4, true}}, numel}}, [](size_t, int64_t, int64_t, void* const*) {});
  EXPECT_LE(stream.buffer_bytes(), 4 * 4 * kPage);
}

TEST_P(Offload, AnErrorOfTheWorkEndsTheStream) {
  const auto file = make();
  auto range = file->allocate(100 * kPage);
  TileStream stream(file->engine(), {4 * kPage, 4});
  int calls = 0;
  const StreamJob job{{{*file->offset_of(range.get()), 4, true}}, 100 * kPage / 4};
  EXPECT_THROW(stream.run(file->file(), {job}, [&](size_t, int64_t, int64_t, void* const*) {
    if (++calls == 3) throw std::runtime_error("no");
  }), std::runtime_error);
  EXPECT_EQ(calls, 3);
  calls = 0;
  stream.run(file->file(), {job}, [&](size_t, int64_t, int64_t, void* const*) { ++calls; });   // and it can be used again
  EXPECT_EQ(calls, 25);
}

TEST_P(Offload, AnErrorOfTheFileEndsTheStream) {
  const auto file = make();
  auto range = file->allocate(8 * kPage);
  TileStream stream(file->engine(), {4 * kPage, 3});
  // Beyond the end of the file there is nothing to read.
  const StreamJob job{{{*file->offset_of(range.get()), 4, true}}, 100 * kPage / 4};
  EXPECT_THROW(stream.run(file->file(), {job}, [](size_t, int64_t, int64_t, void* const*) {}), platform::FileError);
}

TEST_P(Offload, BadOptionsAreRefused) {
  const auto file = make();
  EXPECT_THROW(TileStream(file->engine(), {100, 4}), ValueError);
  EXPECT_THROW(TileStream(file->engine(), {kPage, 2}), ValueError);
  auto range = file->allocate(2 * kPage);
  TileStream stream(file->engine(), {kPage, 3});
  EXPECT_THROW(stream.run(file->file(), {{{{*file->offset_of(range.get()) + 8, 4, true}}, 10}}, [](size_t, int64_t, int64_t, void* const*) {}), Error);
}

INSTANTIATE_TEST_SUITE_P(Engines, Offload, ::testing::Values(io::Backend::Auto, io::Backend::Threads),
                         [](const auto& info) { return info.param == io::Backend::Auto ? "Auto" : "Threads"; });

}  // namespace
}  // namespace ds::offload
