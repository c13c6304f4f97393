// SPDX-License-Identifier: Apache-2.0
#include "io/file_engine.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "base/checked.h"
#include "base/error.h"
#include "io/chunk.h"
#include "platform/env.h"

namespace ds::io {

using platform::File;

// ---- files ---------------------------------------------------------------------------------------------------------

namespace {

// Such a system may accept O_DIRECT, but its files have no place other than the page cache.
bool lives_in_memory(int fd) {
  struct statfs system;
  return fstatfs(fd, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
}

}  // namespace

EngineFile::EngineFile(const std::string& path, File::Mode mode, bool direct) : file_(path, mode) {
  if (direct) open_direct(path, mode == File::Mode::Read ? O_RDONLY : O_RDWR);
}

EngineFile::EngineFile(File file, bool direct) : file_(std::move(file)) {
  // Also where it has no name, or another file has it by now.
  if (direct) open_direct("/proc/self/fd/" + std::to_string(file_.fd()), O_RDWR);
}

void EngineFile::open_direct(const std::string& path, int access) {
  if (lives_in_memory(file_.fd())) return;
  const int fd = ::open(path.c_str(), access | O_CLOEXEC | O_DIRECT);
  if (fd >= 0) direct_ = File::adopt(fd, file_.path());  // else (some network systems): everything goes through the cache
}

// ---- requests ------------------------------------------------------------------------------------------------------

Request::Request(std::shared_ptr<EngineFile> file, bool is_write, int64_t offset, int64_t bytes)
    : file_(std::move(file)), is_write_(is_write), offset_(offset), bytes_(bytes) {}

bool Request::done() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return chunks_left_ == 0;
}

void Request::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [this] { return chunks_left_ == 0; });
  if (error_ == 0) return;
  std::string what = std::string(is_write_ ? "write" : "read") + " of " + std::to_string(bytes_) + " bytes at offset " +
                     std::to_string(offset_);
  if (error_ == kEndOfFile) {
    what += " (the file ends at " + std::to_string(error_offset_) + ")";
  } else if (error_offset_ != offset_) {
    what += " (at " + std::to_string(error_offset_) + ")";
  }
  DS_FAIL_FILE(what, file_->path(), error_ == kEndOfFile ? 0 : error_);
}

// ---- chunks --------------------------------------------------------------------------------------------------------

int Chunk::fd() const { return direct ? request->file_->direct_fd() : request->file_->file().fd(); }

bool Chunk::is_write() const { return request->is_write_; }

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

void ChunkQueue::push(const std::shared_ptr<Request>& request, char* data, const EngineOptions& options) {
  const int64_t begin = request->offset_;
  const int64_t end = begin + request->bytes_;
  // Direct access needs memory and file to be aligned alike; then all but a head and a tail can go past the cache.
  const bool alike = reinterpret_cast<uintptr_t>(data) % kDirectAlignment == static_cast<uintptr_t>(begin % kDirectAlignment);
  const bool direct = alike && request->file_->has_direct();
  const int64_t body_begin = direct ? std::min(end, round_up(begin, kDirectAlignment)) : end;
  const int64_t body_end = direct ? std::max(body_begin, end / kDirectAlignment * kDirectAlignment) : end;

  const auto cut = [&](int64_t from, int64_t to, bool is_direct) {
    for (int64_t at = from; at < to; at += options.chunk_bytes) {
      chunks_.push_back(Chunk{request, data + (at - begin), at, std::min(options.chunk_bytes, to - at), is_direct});
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

// ---- engine --------------------------------------------------------------------------------------------------------

std::unique_ptr<FileEngine> FileEngine::create(const EngineOptions& options) {
  DS_CHECK_VALUE(options.queue_depth > 0, "queue_depth must be positive, got " << options.queue_depth);
  DS_CHECK_VALUE(options.threads > 0, "threads must be positive, got " << options.threads);
  DS_CHECK_VALUE(options.chunk_bytes > 0 && options.chunk_bytes <= kMaxChunkBytes && options.chunk_bytes % kDirectAlignment == 0,
                 "chunk_bytes must be a multiple of " << kDirectAlignment << " in (0, " << kMaxChunkBytes << "], got "
                                                      << options.chunk_bytes);
  Backend backend = options.backend;
  if (backend == Backend::Auto) {
    const std::string choice = *platform::env_string("DS_IO_ENGINE");
    DS_CHECK_VALUE(choice == "auto" || choice == "uring" || choice == "threads",
                   "environment variable DS_IO_ENGINE must be auto, uring or threads, got '" << choice << "'");
    if (choice == "uring") backend = Backend::Uring;
    if (choice == "threads") backend = Backend::Threads;
  }
  if (backend != Backend::Threads) {
    std::unique_ptr<FileEngine> engine = make_uring_engine(options);
    if (engine) return engine;
    DS_CHECK(backend == Backend::Auto, "io_uring was asked for, but this kernel or this build does not offer it");
  }
  return make_thread_engine(options);
}

std::shared_ptr<EngineFile> FileEngine::open(const std::string& path, File::Mode mode) const {
  return std::make_shared<EngineFile>(path, mode, options_.direct);
}

std::shared_ptr<EngineFile> FileEngine::adopt(File file) const { return std::make_shared<EngineFile>(std::move(file), options_.direct); }

std::shared_ptr<Request> FileEngine::read(std::shared_ptr<EngineFile> file, int64_t offset, void* dst, int64_t bytes) {
  return start(std::move(file), false, offset, static_cast<char*>(dst), bytes);
}

std::shared_ptr<Request> FileEngine::write(std::shared_ptr<EngineFile> file, int64_t offset, const void* src, int64_t bytes) {
  return start(std::move(file), true, offset, static_cast<char*>(const_cast<void*>(src)), bytes);
}

std::shared_ptr<Request> FileEngine::start(std::shared_ptr<EngineFile> file, bool is_write, int64_t offset, char* data,
                                           int64_t bytes) {
  DS_CHECK_VALUE(file != nullptr, "file is null");
  DS_CHECK_VALUE(offset >= 0 && bytes >= 0, "range [" << offset << ", +" << bytes << ") of " << file->path() << " is negative");
  checked_add(offset, bytes);
  auto request = std::make_shared<Request>(std::move(file), is_write, offset, bytes);
  submit(request, data);
  return request;
}

}  // namespace ds::io
