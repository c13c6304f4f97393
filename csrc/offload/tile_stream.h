// SPDX-License-Identifier: Apache-2.0
// Passes over arrays that rest in a file, tile by tile, in three stages: tiles ahead are read, one is worked on, those behind are written.
// Memory: `buffers` tiles, whatever the arrays' size. Bytes moved: each array once in, and once out where it is written.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "io/file_engine.h"
#include "platform/memory.h"

namespace ds::offload {

struct StreamOptions {
  int64_t tile_bytes = int64_t{2} << 20;   // of one array
  int buffers = 8;                         // tiles in memory at a time
};

// One array: where it begins in the file, aligned to a page, as is its end (what lies behind it up to the next page is its own).
struct StreamArray {
  int64_t offset = 0;
  int64_t element_bytes = 4;
  bool write = true;
  int64_t written_to = -1;   // where the new values go, also aligned to a page; -1: in place of the old ones
};

// Arrays of equal length that are worked on together.
struct StreamJob {
  std::vector<StreamArray> arrays;
  int64_t numel = 0;
};

class TileStream {
 public:
  // data[i]: the elements [begin, begin + numel) of the job's array i, which the work may change.
  using Work = std::function<void(size_t job, int64_t begin, int64_t numel, void* const* data)>;

  // `engine` outlives this.
  TileStream(io::FileEngine& engine, const StreamOptions& options);

  // Returns when everything is written. Throws the first error, of a file or of the work, after all that was under way has ended: the arrays then
  // hold some tiles of before and some of after.
  void run(const std::shared_ptr<io::EngineFile>& file, const std::vector<StreamJob>& jobs, const Work& work);

  int64_t buffer_bytes() const { return static_cast<int64_t>(memory_.bytes()); }   // held between runs

 private:
  struct Tile;
  struct Slot;
  std::vector<Tile> cut(const std::vector<StreamJob>& jobs) const;

  void make_room(size_t bytes);

  io::FileEngine& engine_;
  const StreamOptions options_;
  platform::Buffer memory_;                  // of all slots, made at the first run
  std::unique_ptr<io::KnownBuffer> known_;   // to the engine; goes before the memory
};

}  // namespace ds::offload
