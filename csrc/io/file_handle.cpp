// SPDX-License-Identifier: Apache-2.0
#include "io/file_handle.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include "base/checked.h"
#include "io/chunk.h"

namespace ds::io {

using platform::File;

namespace {

constexpr int64_t kComparedBytes = int64_t{1} << 20;
constexpr int kFewestThreads = 4, kMostThreads = 32;

EngineOptions engine_options(const HandleOptions& options) {
  DS_CHECK_VALUE(options.block_bytes >= 512 && options.block_bytes <= kMaxChunkBytes,
                 "block_size must lie in [512, " << kMaxChunkBytes << "], got " << options.block_bytes);
  DS_CHECK_VALUE(options.queue_depth >= 1, "queue_depth must be at least 1, got " << options.queue_depth);
  DS_CHECK_VALUE(options.parallelism >= 1, "intra_op_parallelism must be at least 1, got " << options.parallelism);
  const int64_t depth = int64_t{options.queue_depth} * options.parallelism;
  EngineOptions engine;
  engine.chunk_bytes = round_up(options.block_bytes, kDirectAlignment);
  engine.queue_depth = static_cast<int>(std::min<int64_t>(depth, kMaxQueueDepth));
  engine.threads = static_cast<int>(std::min<int64_t>(depth, std::clamp(options.parallelism, kFewestThreads, kMostThreads)));
  engine.single_submit = options.single_submit;
  engine.overlap = options.overlap_events;
  return engine;
}

std::shared_ptr<EngineFile> open_for(const FileEngine& engine, const Operation& operation) {
  if (operation.descriptor < 0) return engine.open(operation.path, operation.is_write ? File::Mode::OpenOrCreate : File::Mode::Read);
  const int own = fcntl(operation.descriptor, F_DUPFD_CLOEXEC, 0);
  const std::string name = "file descriptor " + std::to_string(operation.descriptor);
  if (own < 0) DS_FAIL_FILE("duplicating", name, errno);
  return engine.adopt(File::adopt(own, name));
}

}  // namespace

LockedBuffer::LockedBuffer(FileEngine& engine, int64_t bytes) {
  DS_CHECK_VALUE(bytes >= 0, "a buffer of " << bytes << " bytes");
  memory_ = platform::Buffer(static_cast<size_t>(bytes), platform::can_pin() && bytes > 0);
  known_ = engine.register_buffer(memory_.data(), bytes);
  locked_ = memory_.pinned() || known_->active() || (bytes > 0 && mlock(memory_.data(), memory_.bytes()) == 0);
}

void LockedBuffer::unlock() {
  known_.reset();
  if (locked_ && !memory_.pinned()) munlock(memory_.data(), memory_.bytes());
  locked_ = false;
}

FileHandle::FileHandle(const HandleOptions& options) : options_(options), engine_(FileEngine::create(engine_options(options))) {}

FileHandle::~FileHandle() {
  try {
    wait();
  } catch (const Error&) {  // nobody asked
  }
}

FileHandle::Started FileHandle::begin(const Operation& operation) {
  DS_CHECK_VALUE(operation.offset >= 0, "file_offset must not be negative, got " << operation.offset);
  Started started{operation, open_for(*engine_, operation), nullptr};
  const int64_t end = checked_add(operation.offset, operation.bytes), size = started.file->file().size();
  if (operation.is_write) {
    // A file that grows is written one transfer at a time; space set aside first is not.
    if (end > size && started.file->has_direct()) started.file->file().reserve(size, end - size);
  } else if (size > 0 && end > size) {  // before anything is overwritten; a device has no size
    DS_FAIL_FILE("read of " + std::to_string(operation.bytes) + " bytes at offset " + std::to_string(operation.offset) + " (the file has " +
                 std::to_string(size) + ")", started.file->path(), 0);
  }
  started.request = operation.is_write ? engine_->write(started.file, operation.offset, operation.data, operation.bytes)
                                       : engine_->read(started.file, operation.offset, operation.data, operation.bytes);
  return started;
}

void FileHandle::Started::finish() const {
  request->wait();
  if (!operation.validate) return;
  const platform::Buffer again(static_cast<size_t>(std::min(operation.bytes, kComparedBytes)));
  for (int64_t at = 0; at < operation.bytes; at += kComparedBytes) {
    const auto bytes = static_cast<size_t>(std::min(kComparedBytes, operation.bytes - at));
    file->file().read(again.data(), bytes, operation.offset + at);
    DS_CHECK(std::memcmp(again.data(), static_cast<const char*>(operation.data) + at, bytes) == 0,
             file->path() << ": bytes [" << operation.offset + at << ", +" << bytes << ") are not those in memory");
  }
}

void FileHandle::start(const Operation& operation) {
  Started started = begin(operation);
  const std::lock_guard<std::mutex> lock(mutex_);
  started_.push_back(std::move(started));
}

void FileHandle::run(const Operation& operation) { begin(operation).finish(); }

int64_t FileHandle::pending() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(started_.size());
}

int64_t FileHandle::wait() {
  DS_CHECK(!engine_->forked(), "this file handle was made before a fork, and its threads are in the other process: make one after the fork");
  std::vector<Started> all;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    all.swap(started_);
  }
  std::exception_ptr first;
  for (const Started& started : all) {
    try {
      started.finish();
    } catch (const Error&) {
      if (!first) first = std::current_exception();
    }
  }
  if (first) std::rethrow_exception(first);
  return static_cast<int64_t>(all.size());
}

}  // namespace ds::io
