// SPDX-License-Identifier: Apache-2.0
// Reading ranges of a file whose blocks have known checksums. Every block that a range touches is read whole, summed, and only then
// copied to where it is wanted, so nothing that is not what was written reaches the destination. A few blocks of memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "io/file_engine.h"

namespace ds::io {

// The bytes of a file are not those that were written.
struct ChecksumError : Error {
  using Error::Error;
};

// Elements of type `from` at `offset`, wanted as elements of type `to` (the same, or both floating point, F64 excepted) at `dst`.
struct ReadRange {
  int64_t offset = 0;
  int64_t numel = 0;
  DType from = DType::U8;
  DType to = DType::U8;
  void* dst = nullptr;
};

class BlockReader {
 public:
  // Throws ChecksumError when the file has another size.
  BlockReader(FileEngine& engine, const std::string& path, int64_t file_bytes, int64_t block_bytes, std::vector<uint32_t> sums);

  // Ranges in any order; they may overlap in the file, not in memory. Throws FileError or ChecksumError, naming the file and the place;
  // destinations may be half filled then.
  void read(std::vector<ReadRange> ranges);
  // All blocks of the file.
  void verify();

 private:
  void take_blocks(const std::vector<int64_t>& blocks, const std::vector<ReadRange>& ranges);
  void check(int64_t block, const char* data, int64_t bytes) const;

  FileEngine& engine_;
  std::shared_ptr<EngineFile> file_;
  const int64_t file_bytes_, block_bytes_;
  const std::vector<uint32_t> sums_;
};

// dst[i] = src[i], rounded to nearest even where the type is narrower. `src` need not be aligned.
void convert_elements(const void* src, DType from, void* dst, DType to, int64_t numel);

}  // namespace ds::io
