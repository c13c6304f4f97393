// SPDX-License-Identifier: Apache-2.0
#include "offload/tile_stream.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "base/checked.h"
#include "base/error.h"
#include "plan/reserve.h"

namespace ds::offload {
namespace {
constexpr int64_t kPage = static_cast<int64_t>(platform::kPageBytes);
}  // namespace

struct TileStream::Tile {
  size_t job;
  int64_t begin;
  int64_t numel;
};

struct TileStream::Slot {
  std::vector<void*> data;
  std::vector<std::shared_ptr<io::Request>> requests;   // reads, then writes

  void wait() {
    for (const auto& request : requests) request->wait();
    requests.clear();
  }
  // Nobody touches the memory any more after this. The first error is on its way to the caller already; these are not reported.
  void settle() noexcept {
    for (const auto& request : requests) {
      try {
        request->wait();
      } catch (const std::exception&) {
      }
    }
    requests.clear();
  }
};

TileStream::TileStream(io::FileEngine& engine, const StreamOptions& options) : engine_(engine), options_(options) {
  DS_CHECK_VALUE(options.tile_bytes >= kPage && options.tile_bytes % kPage == 0,
                 "tile_bytes must be a positive multiple of " << kPage << ", got " << options.tile_bytes);
  DS_CHECK_VALUE(options.buffers >= plan::kFewestTiles, "buffers must be at least " << plan::kFewestTiles << ", got " << options.buffers);
}

std::vector<TileStream::Tile> TileStream::cut(const std::vector<StreamJob>& jobs) const {
  std::vector<Tile> tiles;
  for (size_t j = 0; j < jobs.size(); ++j) {
    int64_t widest = 1;
    for (const StreamArray& array : jobs[j].arrays) {
      DS_CHECK(array.element_bytes > 0 && kPage % array.element_bytes == 0, "elements of " << array.element_bytes << " bytes cannot be streamed");
      DS_CHECK(array.offset % kPage == 0, "an array to stream must begin on a page, not at " << array.offset);
      DS_CHECK(array.written_to < 0 || array.written_to % kPage == 0, "an array must be written from a page on, not at " << array.written_to);
      widest = std::max(widest, array.element_bytes);
    }
    const int64_t most = std::max(options_.tile_bytes / widest / kPage * kPage, kPage);   // whole pages of every array, whatever its elements
    for (int64_t begin = 0; begin < jobs[j].numel; begin += most) tiles.push_back({j, begin, std::min(most, jobs[j].numel - begin)});
  }
  return tiles;
}

void TileStream::make_room(size_t bytes) {
  if (memory_.bytes() >= bytes) return;
  known_.reset();
  memory_ = platform::Buffer(bytes);
  known_ = engine_.register_buffer(memory_.data(), static_cast<int64_t>(bytes));
}

void TileStream::run(const std::shared_ptr<io::EngineFile>& file, const std::vector<StreamJob>& jobs, const Work& work) {
  const std::vector<Tile> tiles = cut(jobs);
  if (tiles.empty()) return;
  const auto bytes_of = [&](const Tile& t, const StreamArray& a) { return round_up(t.numel * a.element_bytes, kPage); };

  size_t slot_bytes = 0;
  for (const Tile& t : tiles) {
    int64_t sum = 0;
    for (const StreamArray& a : jobs[t.job].arrays) sum += bytes_of(t, a);
    slot_bytes = std::max(slot_bytes, static_cast<size_t>(sum));
  }
  const size_t count = std::min(tiles.size(), static_cast<size_t>(options_.buffers));
  make_room(count * slot_bytes);

  std::vector<Slot> slots(count);
  // Half of the slots read ahead, so that a slot's writes have had time when it is read into again.
  const size_t ahead = std::max<size_t>(1, count / 2);
  const auto read = [&](size_t number) {
    const Tile& t = tiles[number];
    Slot& slot = slots[number % count];
    slot.wait();
    slot.data.clear();
    auto* at = static_cast<char*>(memory_.data()) + number % count * slot_bytes;
    std::vector<io::Transfer> reads;
    for (const StreamArray& a : jobs[t.job].arrays) {
      const int64_t bytes = bytes_of(t, a);
      slot.data.push_back(at);
      reads.push_back({file, /*is_write=*/false, a.offset + t.begin * a.element_bytes, at, bytes});
      at += bytes;
    }
    slot.requests = engine_.start(std::move(reads));
  };
  const auto write = [&](const Tile& t, Slot& slot) {
    std::vector<io::Transfer> writes;
    for (size_t i = 0; i < jobs[t.job].arrays.size(); ++i) {
      const StreamArray& a = jobs[t.job].arrays[i];
      const int64_t offset = a.written_to >= 0 ? a.written_to : a.offset;
      if (a.write) writes.push_back({file, /*is_write=*/true, offset + t.begin * a.element_bytes, slot.data[i], bytes_of(t, a)});
    }
    slot.requests = engine_.start(std::move(writes));
  };

  try {
    size_t next = 0;
    for (size_t now = 0; now < tiles.size(); ++now) {
      for (; next < tiles.size() && next <= now + ahead && next < now + count; ++next) read(next);
      Slot& slot = slots[now % count];
      slot.wait();
      const Tile& t = tiles[now];
      work(t.job, t.begin, t.numel, slot.data.data());
      write(t, slot);
    }
    for (Slot& slot : slots) slot.wait();
  } catch (...) {
    for (Slot& slot : slots) slot.settle();
    throw;
  }
}

}  // namespace ds::offload
