// SPDX-License-Identifier: Apache-2.0
// The safetensors file format (https://github.com/huggingface/safetensors), strictly:
//   8 bytes    N, little-endian
//   N bytes    JSON object, first byte '{', may end in spaces:
//              name -> {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, and "__metadata__" -> {text: text}
//   the rest   tensor data, row-major, little-endian; offsets count from here; the tensors cover it without gap or overlap
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"
#include "io/file_engine.h"

namespace ds::io {

constexpr int64_t kMaxHeaderBytes = 100'000'000;

// Everything that can be wrong with a file, one name each.
enum class SafetensorsFault {
  TooShort,            // fewer than 8 bytes
  HeaderTooLarge,      // N over kMaxHeaderBytes
  HeaderPastEnd,       // N reaches beyond the file
  HeaderStart,         // does not begin with '{'
  HeaderSyntax,        // not the JSON described above
  HeaderEncoding,      // a string is not UTF-8
  DuplicateName,
  UnknownDtype,
  InvalidShape,        // negative, or the product overflows
  InvalidOffsets,      // begin > end, or past the end of the data
  SizeMismatch,        // end - begin is not the size of dtype and shape
  Overlap,
  Gap,                 // bytes between tensors that belong to none
  TrailingBytes,       // bytes after the last tensor
};
const char* fault_name(SafetensorsFault fault);

struct SafetensorsError : Error {
  SafetensorsError(const char* file, int line, const std::string& message, SafetensorsFault fault_)
      : Error(file, line, message), fault(fault_) {}
  SafetensorsFault fault;
};

struct TensorEntry {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  int64_t begin_bytes;  // from the start of the data
  int64_t end_bytes;
  int64_t bytes() const { return end_bytes - begin_bytes; }
};

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;  // by position in the file
  std::map<std::string, std::string> metadata;
};

// `text` is the N bytes of JSON; `data_bytes` the size of what follows. Throws SafetensorsError, its message without a path.
SafetensorsHeader parse_safetensors_header(const std::string& text, int64_t data_bytes);

class SafetensorsReader {
 public:
  // Reads and checks the header; data only when asked.
  SafetensorsReader(const FileEngine& engine, const std::string& path);

  const std::vector<TensorEntry>& tensors() const { return header_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  const TensorEntry& find(const std::string& name) const;  // throws naming the file when absent
  bool contains(const std::string& name) const { return index_.count(name) != 0; }

  // Bytes [offset, offset + bytes) of a tensor.
  std::shared_ptr<Request> read(FileEngine& engine, const TensorEntry& tensor, int64_t offset_bytes, void* dst, int64_t bytes) const;

 private:
  std::shared_ptr<EngineFile> file_;
  SafetensorsHeader header_;
  std::map<std::string, size_t> index_;
  int64_t data_start_ = 0;
};

struct TensorSource {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  const void* data;
};

// Writes the file under a temporary name beside `path`, makes it durable and renames it: `path` is whole or as it was before.
// The tensor data starts at a multiple of kDirectAlignment of the file.
void write_safetensors(FileEngine& engine, const std::string& path, std::vector<TensorSource> tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace ds::io
