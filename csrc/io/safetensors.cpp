// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <exception>
#include <functional>
#include <optional>
#include <tuple>
#include <utility>

#include "base/checked.h"
#include "io/chunk.h"
#include "io/safetensors_header.h"
#include "io/safetensors_stream.h"

namespace ds::io {
namespace {

using platform::File;

[[noreturn]] void fail(SafetensorsFault fault, const std::string& message) {
  throw SafetensorsError(__FILE__, __LINE__, std::string(fault_name(fault)) + ": " + message, fault);
}

std::optional<DType> dtype_of(const std::string& name) {
  for (DType t : {DType::F32, DType::F16, DType::BF16, DType::F64, DType::I64, DType::I32, DType::I16, DType::I8, DType::U8,
                  DType::BOOL}) {
    if (name == dtype_name(t)) return t;
  }
  return std::nullopt;
}

// Size in bytes of that many elements; nothing when it does not fit.
std::optional<int64_t> size_of(DType dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = static_cast<int64_t>(dtype_size(dtype));
  for (int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(bytes, extent, &bytes)) return std::nullopt;
  }
  return bytes;
}

TensorEntry check_entry(RawTensor&& raw, int64_t data_bytes) {
  const std::string who = "tensor '" + raw.name + "'";
  const std::optional<DType> dtype = dtype_of(raw.dtype);
  if (!dtype) fail(SafetensorsFault::UnknownDtype, who + " has dtype '" + raw.dtype + "'");
  const std::optional<int64_t> bytes = size_of(*dtype, raw.shape);
  if (!bytes) fail(SafetensorsFault::InvalidShape, who + " has more elements than can be counted");
  const int64_t begin = raw.data_offsets[0], end = raw.data_offsets[1];
  const std::string range = "[" + std::to_string(begin) + ", " + std::to_string(end) + ")";
  if (begin > end || end > data_bytes) {
    fail(SafetensorsFault::InvalidOffsets, who + " lies at " + range + " of " + std::to_string(data_bytes) + " bytes of data");
  }
  if (end - begin != *bytes) {
    fail(SafetensorsFault::SizeMismatch, who + " needs " + std::to_string(*bytes) + " bytes and lies at " + range);
  }
  return TensorEntry{std::move(raw.name), *dtype, std::move(raw.shape), begin, end};
}

void check_cover(const std::vector<TensorEntry>& tensors, int64_t data_bytes) {
  int64_t at = 0;
  for (const TensorEntry& tensor : tensors) {
    const std::string where = "tensor '" + tensor.name + "' begins at " + std::to_string(tensor.begin_bytes) + ", the one before ends at ";
    if (tensor.begin_bytes < at) fail(SafetensorsFault::Overlap, where + std::to_string(at));
    if (tensor.begin_bytes > at) fail(SafetensorsFault::Gap, where + std::to_string(at));
    at = tensor.end_bytes;
  }
  if (at != data_bytes) {
    fail(SafetensorsFault::TrailingBytes, std::to_string(data_bytes - at) + " bytes after the last tensor");
  }
}

void write_all(FileEngine& engine, const std::string& path, const std::vector<TensorSource>& tensors, const std::string& head) {
  const auto file = engine.open(path, File::Mode::CreateNew);
  std::vector<std::shared_ptr<Request>> requests = {engine.write(file, 0, head.data(), static_cast<int64_t>(head.size()))};
  int64_t at = static_cast<int64_t>(head.size());
  for (const TensorSource& tensor : tensors) {
    const int64_t bytes = *size_of(tensor.dtype, tensor.shape);
    requests.push_back(engine.write(file, at, tensor.data, bytes));
    at += bytes;
  }
  // All are waited for, even after a failure: the memory they read from belongs to the caller.
  std::exception_ptr failure;
  for (const auto& request : requests) {
    try {
      request->wait();
    } catch (...) {
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
  file->file().sync();
}

}  // namespace

const char* fault_name(SafetensorsFault fault) {
  switch (fault) {
    case SafetensorsFault::TooShort: return "TooShort";
    case SafetensorsFault::HeaderTooLarge: return "HeaderTooLarge";
    case SafetensorsFault::HeaderPastEnd: return "HeaderPastEnd";
    case SafetensorsFault::HeaderStart: return "HeaderStart";
    case SafetensorsFault::HeaderSyntax: return "HeaderSyntax";
    case SafetensorsFault::HeaderEncoding: return "HeaderEncoding";
    case SafetensorsFault::DuplicateName: return "DuplicateName";
    case SafetensorsFault::UnknownDtype: return "UnknownDtype";
    case SafetensorsFault::InvalidShape: return "InvalidShape";
    case SafetensorsFault::InvalidOffsets: return "InvalidOffsets";
    case SafetensorsFault::SizeMismatch: return "SizeMismatch";
    case SafetensorsFault::Overlap: return "Overlap";
    case SafetensorsFault::Gap: return "Gap";
    case SafetensorsFault::TrailingBytes: return "TrailingBytes";
  }
  DS_FAIL("not a SafetensorsFault: " << static_cast<int>(fault));
}

SafetensorsHeader parse_safetensors_header(const std::string& text, int64_t data_bytes) {
  if (text.empty() || text[0] != '{') fail(SafetensorsFault::HeaderStart, "the header does not begin with '{'");
  RawHeader raw = parse_header_json(text);
  SafetensorsHeader header;
  header.metadata = std::move(raw.metadata);
  header.tensors.reserve(raw.tensors.size());
  for (RawTensor& tensor : raw.tensors) header.tensors.push_back(check_entry(std::move(tensor), data_bytes));
  std::sort(header.tensors.begin(), header.tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin_bytes, a.end_bytes, a.name) < std::tie(b.begin_bytes, b.end_bytes, b.name);
  });
  check_cover(header.tensors, data_bytes);
  return header;
}

SafetensorsReader::SafetensorsReader(const FileEngine& engine, const std::string& path)
    : file_(engine.open(path, File::Mode::Read)) {
  const int64_t file_bytes = file_->file().size();
  try {
    if (file_bytes < 8) fail(SafetensorsFault::TooShort, "the file has " + std::to_string(file_bytes) + " bytes");
    unsigned char prefix[8];
    file_->file().read(prefix, sizeof(prefix), 0);
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | prefix[i];
    if (header_bytes > static_cast<uint64_t>(kMaxHeaderBytes)) {
      fail(SafetensorsFault::HeaderTooLarge, "the header claims " + std::to_string(header_bytes) + " bytes");
    }
    data_start_ = 8 + static_cast<int64_t>(header_bytes);
    if (data_start_ > file_bytes) {
      fail(SafetensorsFault::HeaderPastEnd, "the header claims " + std::to_string(header_bytes) + " bytes and the file has " +
                                                std::to_string(file_bytes));
    }
    std::string text(header_bytes, '\0');
    file_->file().read(text.data(), text.size(), 8);
    header_ = parse_safetensors_header(text, file_bytes - data_start_);
  } catch (const SafetensorsError& error) {
    throw SafetensorsError(error.file, error.line, path + " is not a valid safetensors file: " + error.message, error.fault);
  }
  for (size_t i = 0; i < header_.tensors.size(); ++i) index_[header_.tensors[i].name] = i;
}

const TensorEntry& SafetensorsReader::find(const std::string& name) const {
  const auto found = index_.find(name);
  DS_CHECK_VALUE(found != index_.end(), file_->path() << " has no tensor '" << name << "'");
  return header_.tensors[found->second];
}

std::shared_ptr<Request> SafetensorsReader::read(FileEngine& engine, const TensorEntry& tensor, int64_t offset_bytes, void* dst,
                                                 int64_t bytes) const {
  DS_CHECK_VALUE(offset_bytes >= 0 && bytes >= 0 && offset_bytes <= tensor.bytes() && bytes <= tensor.bytes() - offset_bytes,
                 "bytes [" << offset_bytes << ", +" << bytes << ") are outside tensor '" << tensor.name << "' of " << tensor.bytes());
  return engine.read(file_, data_start_ + tensor.begin_bytes + offset_bytes, dst, bytes);
}

void write_safetensors(FileEngine& engine, const std::string& path, std::vector<TensorSource> tensors,
                       const std::map<std::string, std::string>& metadata) {
  // Widest type first keeps every tensor aligned to its element; by name within a type, so that equal contents give equal files.
  std::sort(tensors.begin(), tensors.end(), [](const TensorSource& a, const TensorSource& b) {
    return std::make_tuple(-static_cast<int>(dtype_size(a.dtype)), std::cref(a.name)) <
           std::make_tuple(-static_cast<int>(dtype_size(b.dtype)), std::cref(b.name));
  });
  std::vector<StreamEntry> entries;
  for (const TensorSource& tensor : tensors) {
    const std::optional<int64_t> bytes = size_of(tensor.dtype, tensor.shape);
    DS_CHECK_VALUE(bytes, "tensor '" << tensor.name << "' has a negative extent or more elements than can be counted");
    DS_CHECK_VALUE(tensor.data != nullptr || *bytes == 0, "tensor '" << tensor.name << "' has no data");
    entries.push_back({tensor.name, tensor.dtype, tensor.shape});
  }
  std::vector<int64_t> offsets;
  int64_t total_bytes = 0;
  const std::string head = safetensors_head(entries, metadata, &offsets, &total_bytes);

  // Process and time make the name unique: a file left by a killed process never blocks the next save.
  const int64_t now = std::chrono::steady_clock::now().time_since_epoch().count();
  const std::string temporary = path + ".tmp." + std::to_string(getpid()) + "." + std::to_string(now);
  try {
    write_all(engine, temporary, tensors, head);
    if (std::rename(temporary.c_str(), path.c_str()) != 0) DS_FAIL_FILE("renaming to " + path, temporary, errno);
  } catch (...) {
    unlink(temporary.c_str());
    throw;
  }
  platform::sync_directory_of(path);
}

}  // namespace ds::io
