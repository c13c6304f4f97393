// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/manifest.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "checkpoint/base64.h"
#include "io/crc32c.h"

namespace ds::checkpoint {
namespace {

using Json = nlohmann::json;

[[noreturn]] void fail(ManifestFault fault, const std::string& message) {
  throw ManifestError(__FILE__, __LINE__, std::string(fault_name(fault)) + ": " + message, fault);
}

// The last member of the object: ,"checksum":"crc32c:01234567"}\n
constexpr char kSealStart[] = ",\"checksum\":\"crc32c:";
constexpr char kSealEnd[] = "\"}\n";
constexpr size_t kSealBytes = sizeof(kSealStart) - 1 + 8 + sizeof(kSealEnd) - 1;

std::string seal_of(const std::string& text, size_t bytes) {
  char sum[16];
  std::snprintf(sum, sizeof(sum), "%08x", io::crc32c(text.data(), bytes));
  return std::string(kSealStart) + sum + kSealEnd;
}

const Json& member(const Json& object, const char* key, const std::string& where) {
  if (!object.is_object()) fail(ManifestFault::Syntax, where + " is not an object");
  const auto found = object.find(key);
  if (found == object.end()) fail(ManifestFault::Syntax, where + " has no \"" + key + "\"");
  return *found;
}

std::string text_of(const Json& value, const std::string& where) {
  if (!value.is_string()) fail(ManifestFault::Syntax, where + " is not a text");
  return value.get<std::string>();
}

int64_t count_of(const Json& value, const std::string& where) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    fail(ManifestFault::Syntax, where + " is not a whole number >= 0");
  }
  return value.get<int64_t>();
}

const Json& list_of(const Json& value, const std::string& where) {
  if (!value.is_array()) fail(ManifestFault::Syntax, where + " is not a list");
  return value;
}

std::vector<int64_t> counts_of(const Json& value, const std::string& where) {
  std::vector<int64_t> result;
  for (const Json& item : list_of(value, where)) result.push_back(count_of(item, where));
  return result;
}

FileRecord read_file(const Json& json, int64_t block_bytes) {
  FileRecord file;
  file.name = text_of(member(json, "name", "a file"), "a file's name");
  const std::string who = "file '" + file.name + "'";
  const bool plain = !file.name.empty() && file.name[0] != '.' && file.name.size() <= 255 &&
                     std::all_of(file.name.begin(), file.name.end(), [](char c) {
                       return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.';
                     });
  if (!plain) fail(ManifestFault::FileName, who + " is not a plain file name");
  file.bytes = count_of(member(json, "bytes", who), who + ": bytes");
  std::string packed;
  if (!decode_base64(text_of(member(json, "crc32c", who), who + ": crc32c"), &packed) || packed.size() % 4 != 0) {
    fail(ManifestFault::FileSums, who + ": its checksums are not base64 of 32-bit numbers");
  }
  const int64_t blocks = file.bytes / block_bytes + (file.bytes % block_bytes != 0);
  if (static_cast<int64_t>(packed.size() / 4) != blocks) {
    fail(ManifestFault::FileSums, who + " has " + std::to_string(packed.size() / 4) + " checksums for " + std::to_string(blocks) + " blocks");
  }
  for (size_t i = 0; i < packed.size(); i += 4) {
    uint32_t sum = 0;
    for (size_t k = 0; k < 4; ++k) sum |= static_cast<uint32_t>(static_cast<unsigned char>(packed[i + k])) << (8 * k);
    file.sums.push_back(sum);
  }
  return file;
}

void check_order(const TensorRecord& tensor, const std::string& who) {
  if (tensor.order.empty()) return;
  std::vector<int64_t> sorted = tensor.order;
  std::sort(sorted.begin(), sorted.end());
  bool good = sorted.size() == tensor.shape.size();
  for (size_t i = 0; good && i < sorted.size(); ++i) good = sorted[i] == static_cast<int64_t>(i);
  if (!good) fail(ManifestFault::Shape, who + ": its order does not name every dimension once");
}

void read_pieces(const Json& list, const std::vector<FileRecord>& files, const std::string& who, TensorRecord& tensor) {
  for (const Json& json : list) {
    const std::vector<int64_t> numbers = counts_of(json, who + ": a piece");
    if (numbers.size() != 4) fail(ManifestFault::Syntax, who + ": a piece is not four numbers");
    const Place place{numbers[0], numbers[3]};
    tensor.runs.push_back({numbers[1], numbers[2]});
    tensor.places.push_back(place);
    if (place.file >= static_cast<int64_t>(files.size())) fail(ManifestFault::PieceOutside, who + ": a piece lies in no file");
    const FileRecord& file = files[static_cast<size_t>(place.file)];
    if (place.offset > file.bytes || numbers[2] > (file.bytes - place.offset) / tensor.item_bytes ||
        place.offset % tensor.item_bytes != 0) {
      fail(ManifestFault::PieceOutside, who + ": a piece of " + std::to_string(numbers[2]) + " elements at byte " +
                                            std::to_string(place.offset) + " does not fit file '" + file.name + "' of " +
                                            std::to_string(file.bytes));
    }
  }
  const std::string problem = plan::cover_problem(tensor.runs, tensor.numel);
  if (!problem.empty()) fail(ManifestFault::Cover, who + ": " + problem);
}

TensorRecord read_tensor(const Json& json, const std::vector<FileRecord>& files) {
  TensorRecord tensor;
  tensor.name = text_of(member(json, "name", "a tensor"), "a tensor's name");
  tensor.kind = text_of(member(json, "kind", "tensor '" + tensor.name + "'"), "its kind");
  const std::string who = tensor.kind + " of '" + tensor.name + "'";
  tensor.dtype = text_of(member(json, "dtype", who), who + ": dtype");
  tensor.item_bytes = item_bytes_of(tensor.dtype);
  if (tensor.item_bytes == 0) fail(ManifestFault::Dtype, who + " has the unknown dtype '" + tensor.dtype + "'");
  tensor.shape = counts_of(member(json, "shape", who), who + ": shape");
  int64_t bytes = tensor.item_bytes;
  bool fits = true, empty = false;
  for (int64_t extent : tensor.shape) {
    empty = empty || extent == 0;
    fits = fits && (extent == 0 || !__builtin_mul_overflow(bytes, extent, &bytes));
  }
  if (!fits && !empty) fail(ManifestFault::Shape, who + " has more elements than can be counted");
  tensor.numel = empty ? 0 : bytes / tensor.item_bytes;
  if (const auto order = json.find("order"); order != json.end()) tensor.order = counts_of(*order, who + ": order");
  check_order(tensor, who);
  read_pieces(list_of(member(json, "pieces", who), who + ": pieces"), files, who, tensor);
  return tensor;
}

Json parse_sealed(const std::string& text) {
  if (text.size() < kSealBytes + 1 || text[0] != '{') fail(ManifestFault::Syntax, "it is no manifest, or its end is missing");
  const size_t body = text.size() - kSealBytes;
  if (text.compare(body, std::string::npos, seal_of(text, body)) != 0) {
    fail(ManifestFault::Checksum, "its checksum is not that of its text: it is torn or damaged");
  }
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) fail(ManifestFault::Syntax, "it is not JSON");
  return json;
}

}  // namespace

const char* fault_name(ManifestFault fault) {
  switch (fault) {
    case ManifestFault::Syntax: return "Syntax";
    case ManifestFault::Checksum: return "Checksum";
    case ManifestFault::NotOurs: return "NotOurs";
    case ManifestFault::Version: return "Version";
    case ManifestFault::FileName: return "FileName";
    case ManifestFault::FileSums: return "FileSums";
    case ManifestFault::Duplicate: return "Duplicate";
    case ManifestFault::Dtype: return "Dtype";
    case ManifestFault::Shape: return "Shape";
    case ManifestFault::Cover: return "Cover";
    case ManifestFault::PieceOutside: return "PieceOutside";
  }
  DS_FAIL("not a ManifestFault: " << static_cast<int>(fault));
}

int64_t item_bytes_of(const std::string& dtype) {
  static const std::map<std::string, int64_t> known = {
      {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I64", 8}, {"I32", 4}, {"I16", 2},
      {"I8", 1},  {"U64", 8}, {"U32", 4}, {"U16", 2},  {"U8", 1},      {"BOOL", 1},    {"C64", 8}, {"C128", 16}};
  const auto found = known.find(dtype);
  return found == known.end() ? 0 : found->second;
}

std::string seal_manifest(const std::string& body) { return body + seal_of(body, body.size()); }

Manifest parse_manifest(const std::string& text) {
  const Json json = parse_sealed(text);
  if (text_of(member(json, "format", "it"), "format") != "deepspeed-checkpoint") fail(ManifestFault::NotOurs, "its format is another");
  Manifest manifest;
  manifest.version = count_of(member(json, "version", "it"), "version");
  if (manifest.version < 1 || manifest.version > kFormatVersion) {
    fail(ManifestFault::Version, "it has version " + std::to_string(manifest.version) + ", this library reads up to " +
                                     std::to_string(kFormatVersion));
  }
  manifest.block_bytes = count_of(member(json, "block_bytes", "it"), "block_bytes");
  if (manifest.block_bytes < 4096 || manifest.block_bytes > (int64_t{1} << 30) || manifest.block_bytes % 4096 != 0) {
    fail(ManifestFault::Syntax, "block_bytes is not a multiple of 4096 up to 2^30");
  }
  std::set<std::string> names;
  for (const Json& file : list_of(member(json, "files", "it"), "files")) {
    manifest.files.push_back(read_file(file, manifest.block_bytes));
    if (!names.insert(manifest.files.back().name).second) {
      fail(ManifestFault::Duplicate, "file '" + manifest.files.back().name + "' is listed twice");
    }
  }
  std::set<std::pair<std::string, std::string>> keys;
  for (const Json& tensor : list_of(member(json, "tensors", "it"), "tensors")) {
    manifest.tensors.push_back(read_tensor(tensor, manifest.files));
    const TensorRecord& record = manifest.tensors.back();
    if (!keys.insert({record.kind, record.name}).second) {
      fail(ManifestFault::Duplicate, record.kind + " of '" + record.name + "' is listed twice");
    }
  }
  return manifest;
}

}  // namespace ds::checkpoint
