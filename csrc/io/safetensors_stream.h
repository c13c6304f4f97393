// SPDX-License-Identifier: Apache-2.0
// Writing a safetensors file as a stream of bytes, summed on the way: no copy of the whole, a few blocks of memory whatever the size.
//
//   SafetensorsStream out(engine, path, entries, metadata, {});
//   for each entry, in order: out.write(data, bytes);     // in any pieces; `data` may be reused when the call returns
//   const StreamedFile file = out.finish();               // durable now; throws FileError naming the path
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "io/block_sink.h"
#include "io/file_engine.h"

namespace ds::io {

struct StreamEntry {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
};

// CRC-32C of each block of block_bytes of the file, from its first byte; the last block may be shorter.
struct StreamedFile {
  int64_t bytes = 0;
  std::vector<uint32_t> block_sums;
};

struct StreamOptions {
  int64_t block_bytes = int64_t{1} << 20;   // multiple of 4096
  int buffers = 24;                         // blocks under way at most, where the page cache is passed by
  bool durable = true;                      // finish() waits until the bytes are on the medium
};

class SafetensorsStream {
 public:
  // The file is new. An empty `path`: nothing is written, the sums alone are computed.
  // Entries come widest type first, which keeps every one aligned to its element; names differ.
  SafetensorsStream(FileEngine& engine, const std::string& path, const std::vector<StreamEntry>& entries,
                    const std::map<std::string, std::string>& metadata, const StreamOptions& options);
  // When destroyed it waits for what is under way; the file stays as it is.

  void write(const void* data, int64_t bytes);
  StreamedFile finish();

  int64_t bytes() const { return total_; }                              // of the whole file
  const std::vector<int64_t>& offsets() const { return offsets_; }      // of each entry's first byte in the file

 private:
  const StreamOptions options_;
  const std::string path_;
  std::shared_ptr<EngineFile> file_;
  std::unique_ptr<BlockSink> sink_;
  std::vector<int64_t> offsets_;
  int64_t total_ = 0, at_ = 0;
};

// The first bytes of such a file: the length, the JSON and spaces up to a multiple of 4096. `offsets`: see above.
std::string safetensors_head(const std::vector<StreamEntry>& entries, const std::map<std::string, std::string>& metadata,
                             std::vector<int64_t>* offsets, int64_t* total_bytes);

}  // namespace ds::io
