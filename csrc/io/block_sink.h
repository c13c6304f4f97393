// SPDX-License-Identifier: Apache-2.0
// Where a stream of bytes goes: to nowhere (its sums count), past the page cache, or through it; summed block by block on the way.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/file_engine.h"

namespace ds::io {

class BlockSink {
 public:
  virtual ~BlockSink() = default;

  // The next bytes. `data` is the caller's again when this returns.
  void write(const char* data, int64_t bytes);
  // All bytes are with the system afterwards. The CRC-32C of each block; the last block may be shorter.
  std::vector<uint32_t> finish();

 protected:
  explicit BlockSink(int64_t block_bytes) : block_bytes_(block_bytes) {}
  // Takes bytes of the current block; the block's sum so far, continued.
  virtual uint32_t take(const char* data, int64_t bytes, uint32_t sum) = 0;
  virtual void end_block() {}
  virtual void drain() {}

  const int64_t block_bytes_;
  int64_t at_ = 0;       // bytes taken before this block
  int64_t filled_ = 0;   // bytes of this block

 private:
  void close_block();

  std::vector<uint32_t> sums_;
  uint32_t sum_ = 0;
};

// Sums alone.
std::unique_ptr<BlockSink> make_sum_sink(int64_t block_bytes);
// Past the page cache: blocks are copied to aligned memory, at most `buffers` of them, and written by the engine meanwhile.
std::unique_ptr<BlockSink> make_direct_sink(FileEngine& engine, std::shared_ptr<EngineFile> file, int64_t block_bytes, int64_t buffers);
// Through the page cache, by the calling thread and from the caller's memory: the system's copy is the only one.
std::unique_ptr<BlockSink> make_cached_sink(std::shared_ptr<EngineFile> file, int64_t block_bytes);

}  // namespace ds::io
