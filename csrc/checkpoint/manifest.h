// SPDX-License-Identifier: Apache-2.0
// A checkpoint's manifest.json: which tensors there are and in which bytes of which files. docs/checkpoint_format.md has the format.
// What it says is checked here as a whole, so that whoever reads by it can neither leave the folder nor the files, and knows that
// every element of every tensor is there exactly once. The part "state" is only skipped over.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "plan/pieces.h"

namespace ds::checkpoint {

constexpr int64_t kFormatVersion = 1;

// Everything that can be wrong with a manifest, one name each.
enum class ManifestFault {
  Syntax,        // not JSON, or not of the form described
  Checksum,      // the text is not what was written: torn or damaged
  NotOurs,       // "format" is another
  Version,       // written by a newer library
  FileName,      // not a plain name inside the folder
  FileSums,      // the number of checksums does not fit the size
  Duplicate,     // two files or two tensors of one name and kind
  Dtype,
  Shape,         // more elements than can be counted, or an order that is none
  Cover,         // pieces leave out or repeat elements
  PieceOutside,  // a piece does not lie inside its file
};
const char* fault_name(ManifestFault fault);

struct ManifestError : Error {
  ManifestError(const char* file, int line, const std::string& message, ManifestFault fault_)
      : Error(file, line, message), fault(fault_) {}
  ManifestFault fault;
};

struct FileRecord {
  std::string name;
  int64_t bytes = 0;
  std::vector<uint32_t> sums;   // CRC-32C by block
};

// Where each piece lies; the elements themselves are runs of TensorRecord::runs.
struct Place {
  int64_t file = 0;     // index into Manifest::files
  int64_t offset = 0;   // of its first byte in that file
};

struct TensorRecord {
  std::string name;
  std::string kind;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> order;   // dimensions, slowest first, in which the elements are counted; empty: row-major
  int64_t item_bytes = 0;
  int64_t numel = 0;
  std::vector<plan::Run> runs;  // ascending
  std::vector<Place> places;    // of each run
};

struct Manifest {
  int64_t version = 0;
  int64_t block_bytes = 0;
  std::vector<FileRecord> files;
  std::vector<TensorRecord> tensors;
};

// Throws ManifestError, its message without a path.
Manifest parse_manifest(const std::string& text);

// `body` is a JSON object without its closing brace; returns the whole text, checksum included.
std::string seal_manifest(const std::string& body);

// Bytes of one element of a dtype the format knows; 0 for others.
int64_t item_bytes_of(const std::string& dtype);

}  // namespace ds::checkpoint
