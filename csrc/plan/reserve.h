// SPDX-License-Identifier: Apache-2.0
// How much memory is set aside for what: the rules that the store, the buckets and the buffer pool follow, and that the
// memory estimate applies to a model that does not exist yet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/checked.h"

namespace ds::plan {

constexpr int64_t kReservePageBytes = 4096;            // a flat starts on a page, so peers can drop exactly its pages
constexpr int64_t kReserveHugePageBytes = int64_t{2} << 20;
constexpr int64_t kHomeChunkBytes = int64_t{64} << 20; // parameters that live for the run are cut from chunks of this size

// Memory for gradients on their way: `general` for any flat, and up to `total` a reserve for the flat whose turn it is.
struct BucketBytes {
  int64_t general = 0;
  int64_t total = 0;
};

// largest_bytes: the largest flat, in the type gradients are reduced in.
inline BucketBytes bucket_bytes(int64_t largest_bytes) {
  const int64_t largest = round_up(std::max<int64_t>(largest_bytes, 1), kReservePageBytes);
  BucketBytes bytes;
  bytes.general = largest + round_up(largest / 8, kReservePageBytes);  // room for a small flat opened early beside the one whose turn it is
  bytes.total = bytes.general + largest;
  return bytes;
}

// What the pool of gathered units asks the system for when it needs `bytes`.
inline int64_t pool_buffer_bytes(int64_t bytes, bool on_host) {
  return on_host ? round_up(bytes, bytes >= kReserveHugePageBytes ? kReserveHugePageBytes : 1) : bytes;
}

// The smallest of the free buffers that holds `bytes` and is not much more than twice as large; -1 when none does.
inline int best_free_buffer(const std::vector<int64_t>& free_bytes, int64_t bytes) {
  int best = -1;
  for (size_t i = 0; i < free_bytes.size(); ++i) {
    if (free_bytes[i] < bytes || free_bytes[i] > 2 * bytes + kReserveHugePageBytes) continue;
    if (best < 0 || free_bytes[i] < free_bytes[static_cast<size_t>(best)]) best = static_cast<int>(i);
  }
  return best;
}

// ---- state that rests elsewhere ------------------------------------------------------------------------------------

// Tiles in which the optimizer's step takes each array through memory.
struct StepTiles {
  int64_t tile_bytes = 0;   // of one array
  int buffers = 0;          // tiles in memory at a time
};

constexpr int64_t kStepBufferBytes = int64_t{4} << 20;   // of one array: what `buffer_count` of the configuration counts
constexpr int kFewestTiles = 3;                          // one read, one worked on, one written

// For state on the host, of which a tile is a part.
constexpr int64_t kHostTileBytes = int64_t{4} << 20;

// For state in files, from which one request reads at most `block_bytes`: tiles of a request, of 2 to 4 MiB, and as many of them as fit into the same
// memory. (Four tiles of 4 MiB, 8 of 2 and 16 of 1 move bytes at rates within 4 % of each other, less than the disk itself varies.)
inline StepTiles step_tiles(int64_t buffer_count, int64_t block_bytes) {
  const int64_t memory = std::max<int64_t>(buffer_count, 1) * kStepBufferBytes;
  const int64_t tile = std::min(std::max(block_bytes / kReservePageBytes * kReservePageBytes, kStepBufferBytes / 2), kStepBufferBytes);
  return {tile, static_cast<int>(std::max<int64_t>(memory / tile, kFewestTiles))};
}

// Rings of memory through which values pass between an accelerator and the host.
constexpr int kWeightBuffers = 2;          // tiles of updated weights on their way up
constexpr int kShardBuffers = 3;           // pieces of shards on their way to a gather
constexpr int64_t kShardPieceBytes = int64_t{16} << 20;

// Slices of gradients on their way down at a time: fewer when they are large, two at least.
inline int64_t gradient_buffers(int64_t slice_bytes) {
  constexpr int64_t kMost = 4, kFewest = 2, kMostBytes = int64_t{256} << 20;
  return std::clamp(kMostBytes / std::max<int64_t>(slice_bytes, 1), kFewest, kMost);
}

}  // namespace ds::plan
