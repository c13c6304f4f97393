// SPDX-License-Identifier: Apache-2.0
#include "io/chunk.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/checked.h"

namespace ds::io {

int Chunk::fd() const { return direct ? request->file_->direct_fd() : request->file_->file().fd(); }

bool Chunk::is_write() const { return request->is_write_; }

uint64_t Chunk::serial() const { return request->serial_; }

const EngineFile& Chunk::file() const { return *request->file_; }

bool Chunk::complete(int64_t result) {
  if (result == -EINTR || result == -EAGAIN) return false;
  if (result == -EINVAL && direct) {
    direct = false;
    return false;
  }
  if (result < 0) {
    finish(static_cast<int>(-result));
    return true;
  }
  if (result == 0 && bytes > 0) {
    finish(is_write() ? ENOSPC : kEndOfFile);
    return true;
  }
  data += result;
  offset += result;
  bytes -= result;
  if (bytes == 0) {
    finish(0);
    return true;
  }
  if (result % kDirectAlignment != 0) direct = false;  // the rest is no longer aligned
  return false;
}

void Chunk::finish(int error) {
  Request& r = *request;
  const std::lock_guard<std::mutex> lock(r.mutex_);
  // Of several failures the one nearest the start is reported, so that the message does not depend on timing.
  if (error != 0 && (r.error_ == 0 || offset < r.error_offset_)) {
    r.error_ = error;
    r.error_offset_ = offset;
  }
  if (--r.chunks_left_ == 0) r.finished_.notify_all();
}

void ChunkQueue::push(const std::shared_ptr<Request>& request, const EngineOptions& options) {
  char* const data = request->data_;
  const int64_t begin = request->offset_;
  const int64_t end = begin + request->bytes_;
  // Direct access needs memory that is aligned where the file is; then all but a head and a tail can go past the cache.
  const uintptr_t memory_at_block = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(round_up(begin, kDirectAlignment) - begin);
  const bool direct = request->file_->has_direct() && memory_at_block % static_cast<uintptr_t>(request->file_->memory_alignment()) == 0;
  const int64_t body_begin = direct ? std::min(end, round_up(begin, kDirectAlignment)) : end;
  const int64_t body_end = direct ? std::max(body_begin, end / kDirectAlignment * kDirectAlignment) : end;

  const auto cut = [&](int64_t from, int64_t to, bool is_direct) {
    for (int64_t at = from; at < to; at += options.chunk_bytes) {
      chunks_.push_back(Chunk{request, data + (at - begin), at, std::min(options.chunk_bytes, to - at), is_direct, Fault::None, 0, 0});
    }
  };
  const size_t before = chunks_.size();
  cut(begin, body_begin, false);
  cut(body_begin, body_end, true);
  cut(body_end, end, false);
  request->chunks_left_ = static_cast<int64_t>(chunks_.size() - before);
}

Chunk ChunkQueue::pop() {
  Chunk chunk = std::move(chunks_.front());
  chunks_.pop_front();
  return chunk;
}


}  // namespace ds::io
