// SPDX-License-Identifier: Apache-2.0
#include "io/file_engine.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <optional>
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

// What the file system says (Linux 6.1), else the block size. NVMe asks for 4 bytes, so tensors from any allocator will do.
int64_t direct_memory_alignment(int fd) {
#ifdef STATX_DIOALIGN
  struct statx status;
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) != 0 && status.stx_dio_mem_align > 0) {
    return status.stx_dio_mem_align;
  }
#endif
  return kDirectAlignment;
}

std::optional<FaultOptions> faults_of(const EngineOptions& options) {
  if (options.faults) return options.faults;
  const std::optional<std::string> text = platform::env_string("DS_IO_FAULTS");
  return text ? std::optional<FaultOptions>(FaultOptions::parse(*text)) : std::nullopt;
}

}  // namespace

EngineFile::EngineFile(const std::string& path, File::Mode mode, bool direct) : file_(path, mode), memory_alignment_(kDirectAlignment) {
  if (direct) open_direct(mode == File::Mode::Read ? O_RDONLY : O_RDWR);
}

EngineFile::EngineFile(File file, bool direct) : file_(std::move(file)), memory_alignment_(kDirectAlignment) {
  if (direct) open_direct(O_RDWR);
}

void EngineFile::open_direct(int access) {
  if (lives_in_memory(file_.fd())) return;
  // The same file once more, also where it has no name or another file has it by now; by name where /proc is not mounted.
  const int flags = access | O_CLOEXEC | O_DIRECT;
  int fd = ::open(("/proc/self/fd/" + std::to_string(file_.fd())).c_str(), flags);
  if (fd < 0) fd = ::open(file_.path().c_str(), flags);
  if (fd < 0) return;  // some network systems: everything goes through the cache
  direct_ = File::adopt(fd, file_.path());
  memory_alignment_ = direct_memory_alignment(fd);
}

// ---- requests ------------------------------------------------------------------------------------------------------

Request::Request(std::shared_ptr<EngineFile> file, bool is_write, int64_t offset, char* data, int64_t bytes, uint64_t serial)
    : file_(std::move(file)), is_write_(is_write), offset_(offset), data_(data), bytes_(bytes), serial_(serial) {}

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

// ---- engine --------------------------------------------------------------------------------------------------------

FileEngine::FileEngine(const EngineOptions& options)
    : options_(options), faults_([&options]() -> std::optional<Faults> {
        const std::optional<FaultOptions> faults = faults_of(options);
        return faults ? std::optional<Faults>(*faults) : std::nullopt;
      }()), process_(getpid()) {}

bool FileEngine::forked() const { return getpid() != process_; }

std::unique_ptr<FileEngine> FileEngine::create(const EngineOptions& options) {
  DS_CHECK_VALUE(options.queue_depth > 0 && options.queue_depth <= kMaxQueueDepth,
                 "queue_depth must lie in [1, " << kMaxQueueDepth << "], got " << options.queue_depth);
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
  auto file = std::make_shared<EngineFile>(path, mode, options_.direct);
  if (!forked()) file->mark_ = mark(*file);
  return file;
}

std::shared_ptr<EngineFile> FileEngine::adopt(File file) const {
  auto known = std::make_shared<EngineFile>(std::move(file), options_.direct);
  if (!forked()) known->mark_ = mark(*known);
  return known;
}

std::unique_ptr<KnownBuffer> FileEngine::register_buffer(void* data, int64_t bytes) { return std::make_unique<KnownBuffer>(); }

std::shared_ptr<Request> FileEngine::read(std::shared_ptr<EngineFile> file, int64_t offset, void* dst, int64_t bytes) {
  auto request = make({std::move(file), false, offset, dst, bytes});
  submit({request});
  return request;
}

std::shared_ptr<Request> FileEngine::write(std::shared_ptr<EngineFile> file, int64_t offset, const void* src, int64_t bytes) {
  auto request = make({std::move(file), true, offset, const_cast<void*>(src), bytes});
  submit({request});
  return request;
}

std::vector<std::shared_ptr<Request>> FileEngine::start(std::vector<Transfer> transfers) {
  std::vector<std::shared_ptr<Request>> requests;
  requests.reserve(transfers.size());
  for (Transfer& transfer : transfers) requests.push_back(make(std::move(transfer)));
  submit(requests);
  return requests;
}

std::shared_ptr<Request> FileEngine::make(Transfer t) {
  DS_CHECK(!forked(), "this file engine was made before a fork, and its threads are in the other process: make one after the fork");
  DS_CHECK_VALUE(t.file != nullptr, "file is null");
  DS_CHECK_VALUE(t.offset >= 0 && t.bytes >= 0, "range [" << t.offset << ", +" << t.bytes << ") of " << t.file->path() << " is negative");
  checked_add(t.offset, t.bytes);
  return std::make_shared<Request>(std::move(t.file), t.is_write, t.offset, static_cast<char*>(t.data), t.bytes, serial_++);
}

}  // namespace ds::io
