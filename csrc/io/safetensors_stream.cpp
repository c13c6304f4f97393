// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors_stream.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <set>

#include "base/checked.h"
#include "io/chunk.h"
#include "io/safetensors.h"
#include "io/safetensors_header.h"

namespace ds::io {
namespace {

// Reserves the file's blocks at once: a full disk shows now, and writes past the page cache need not extend the file one by one.
void reserve(const EngineFile& file, int64_t bytes) {
  if (bytes == 0) return;
  int code;
  do {
    code = fallocate(file.direct_fd(), 0, 0, bytes) == 0 ? 0 : errno;
  } while (code == EINTR);
  if (code != 0 && code != EOPNOTSUPP && code != EINVAL && code != ENOSYS) {
    DS_FAIL_FILE("reserving " + std::to_string(bytes) + " bytes", file.path(), code);
  }
}

}  // namespace

std::string safetensors_head(const std::vector<StreamEntry>& entries, const std::map<std::string, std::string>& metadata,
                             std::vector<int64_t>* offsets, int64_t* total_bytes) {
  std::vector<HeaderEntry> header;
  std::set<std::string> names;
  int64_t at = 0;
  for (const StreamEntry& entry : entries) {
    DS_CHECK_VALUE(entry.name != "__metadata__", "a tensor cannot be named __metadata__");
    DS_CHECK_VALUE(names.insert(entry.name).second, "two tensors are named '" << entry.name << "'");
    const auto width = static_cast<int64_t>(dtype_size(entry.dtype));
    int64_t bytes = width;
    for (int64_t extent : entry.shape) {
      DS_CHECK_VALUE(extent >= 0, "tensor '" << entry.name << "' has a negative extent");
      bytes = checked_mul(bytes, extent);
    }
    DS_CHECK_VALUE(at % width == 0, "tensor '" << entry.name << "' would not be aligned to its " << width
                                               << " byte elements: entries must come widest type first");
    header.push_back({entry.name, dtype_name(entry.dtype), entry.shape, at, checked_add(at, bytes)});
    offsets->push_back(at);
    at += bytes;
  }
  std::string text = write_header_json(header, metadata);
  text.resize(static_cast<size_t>(round_up(8 + static_cast<int64_t>(text.size()), kDirectAlignment) - 8), ' ');
  DS_CHECK_VALUE(static_cast<int64_t>(text.size()) <= kMaxHeaderBytes, "a safetensors header would have " << text.size() << " bytes");
  std::string head(8, '\0');
  for (size_t i = 0; i < 8; ++i) head[i] = static_cast<char>(static_cast<uint64_t>(text.size()) >> (8 * i));
  head += text;
  for (int64_t& offset : *offsets) offset += static_cast<int64_t>(head.size());
  *total_bytes = static_cast<int64_t>(head.size()) + at;
  return head;
}

SafetensorsStream::SafetensorsStream(FileEngine& engine, const std::string& path, const std::vector<StreamEntry>& entries,
                                     const std::map<std::string, std::string>& metadata, const StreamOptions& options)
    : options_(options), path_(path) {
  DS_CHECK_VALUE(options.block_bytes > 0 && options.block_bytes % kDirectAlignment == 0,
                 "block_bytes must be a positive multiple of " << kDirectAlignment << ", got " << options.block_bytes);
  DS_CHECK_VALUE(options.buffers > 0, "buffers must be positive, got " << options.buffers);
  const std::string head = safetensors_head(entries, metadata, &offsets_, &total_);
  if (path.empty()) {
    sink_ = make_sum_sink(options.block_bytes);
  } else {
    file_ = engine.open(path, platform::File::Mode::CreateNew);
    if (file_->has_direct()) {
      reserve(*file_, total_);
      const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(options.buffers, ceil_div(total_, options.block_bytes)));
      sink_ = make_direct_sink(engine, file_, options.block_bytes, blocks);
    } else {
      sink_ = make_cached_sink(file_, options.block_bytes);
    }
  }
  write(head.data(), static_cast<int64_t>(head.size()));
}

void SafetensorsStream::write(const void* data, int64_t bytes) {
  DS_CHECK_VALUE(bytes >= 0 && bytes <= total_ - at_, "more bytes than the entries of " << path_ << " announce");
  sink_->write(static_cast<const char*>(data), bytes);
  at_ += bytes;
}

StreamedFile SafetensorsStream::finish() {
  DS_CHECK_VALUE(at_ == total_, "the entries of " << path_ << " announce " << total_ << " bytes, " << at_ << " were written");
  StreamedFile done{total_, sink_->finish()};
  if (file_ && options_.durable) file_->file().sync();
  if (file_) file_->file().close();
  return done;
}

}  // namespace ds::io
