// SPDX-License-Identifier: Apache-2.0
// Asynchronous reads and writes of whole ranges. A request is cut into chunks; aligned chunks go past the page cache
// (O_DIRECT) where the file system allows it, the rest through it. One engine may be used from many threads.
//
//   auto engine = FileEngine::create({});
//   auto file = engine->open(path, File::Mode::Read);
//   auto known = engine->register_buffer(dst, bytes);       // if it will be used often
//   auto ticket = engine->read(file, offset, dst, bytes);   // dst stays untouched by others until wait() returns
//   ticket->wait();                                         // throws FileError naming path, range and errno
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "io/faults.h"
#include "platform/file.h"

namespace ds::io {

enum class Backend { Auto, Uring, Threads };

struct EngineOptions {
  Backend backend = Backend::Auto;  // Auto: DS_IO_ENGINE, else io_uring where the kernel allows it, else threads
  int queue_depth = 32;             // chunks in flight
  int threads = 4;                  // of the thread backend
  int64_t chunk_bytes = int64_t{1} << 20;
  bool direct = true;               // false: always through the page cache
  bool single_submit = false;       // io_uring: a system call a chunk instead of one for all that fit
  bool overlap = true;              // io_uring: false: all chunks in flight are finished before the next ones begin
  std::optional<FaultOptions> faults;  // for tests; left out: DS_IO_FAULTS
};

// What an engine keeps with a file it opened.
struct FileMark {
  virtual ~FileMark() = default;
};

// A file as the engine holds it: one descriptor through the page cache and, where possible, one past it.
class EngineFile {
 public:
  EngineFile(const std::string& path, platform::File::Mode mode, bool direct);
  EngineFile(platform::File file, bool direct);   // an open file, for reading and writing
  const platform::File& file() const { return file_; }
  platform::File& file() { return file_; }
  const std::string& path() const { return file_.path(); }
  bool has_direct() const { return direct_.is_open(); }
  int direct_fd() const { return direct_.fd(); }
  int64_t memory_alignment() const { return memory_alignment_; }  // that direct access needs
  const FileMark* mark() const { return mark_.get(); }

 private:
  friend class FileEngine;
  void open_direct(int access);

  platform::File file_;
  platform::File direct_;
  int64_t memory_alignment_;
  std::unique_ptr<FileMark> mark_;  // goes before the descriptors
};

// Memory the engine knows (io_uring: its pages are pinned once instead of for each transfer). Give this up before the memory is freed or its
// pages are given back, or transfers go to pages that are no longer there.
class KnownBuffer {
 public:
  virtual ~KnownBuffer() = default;
  virtual bool active() const { return false; }  // false: refused (no io_uring, RLIMIT_MEMLOCK); transfers work as without it
};

// One read or write under way.
class Request {
 public:
  Request(std::shared_ptr<EngineFile> file, bool is_write, int64_t offset, char* data, int64_t bytes, uint64_t serial = 0);
  bool done() const;
  void wait();  // rethrows the request's error, every time it is called
  int64_t bytes() const { return bytes_; }

 private:
  friend class ChunkQueue;
  friend struct Chunk;
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  const std::shared_ptr<EngineFile> file_;
  const bool is_write_;
  const int64_t offset_;
  char* const data_;
  const int64_t bytes_;
  const uint64_t serial_;  // number within the engine
  int64_t chunks_left_ = 0;
  int error_ = 0;          // errno of the first failing chunk; kEndOfFile for an early end
  int64_t error_offset_ = 0;
};

// A request to be made, see FileEngine::start.
struct Transfer {
  std::shared_ptr<EngineFile> file;
  bool is_write = false;
  int64_t offset = 0;
  void* data = nullptr;  // only read from when is_write
  int64_t bytes = 0;
};

// How many chunks the system was given, and how many of them by what it had been told before.
struct EngineCounts {
  int64_t chunks = 0, system_calls = 0, known_buffer = 0, known_file = 0;
};

class FileEngine {
 public:
  static std::unique_ptr<FileEngine> create(const EngineOptions& options);
  virtual ~FileEngine() = default;  // waits for what is under way

  virtual const char* name() const = 0;
  std::shared_ptr<EngineFile> open(const std::string& path, platform::File::Mode mode) const;
  std::shared_ptr<EngineFile> adopt(platform::File file) const;
  std::shared_ptr<Request> read(std::shared_ptr<EngineFile> file, int64_t offset, void* dst, int64_t bytes);
  std::shared_ptr<Request> write(std::shared_ptr<EngineFile> file, int64_t offset, const void* src, int64_t bytes);
  // Several at once, in as few system calls as the queue allows. Their order is not kept: they must not overlap.
  std::vector<std::shared_ptr<Request>> start(std::vector<Transfer> transfers);

  // Never null. Page-aligned memory is best; what it spans is pinned until the answer is dropped.
  virtual std::unique_ptr<KnownBuffer> register_buffer(void* data, int64_t bytes);
  virtual EngineCounts counts() const { return {}; }
  const EngineOptions& options() const { return options_; }
  bool forked() const;  // the threads of the engine are in another process, and nothing under way will end in this one

 protected:
  explicit FileEngine(const EngineOptions& options);
  virtual void submit(const std::vector<std::shared_ptr<Request>>& requests) = 0;
  virtual std::unique_ptr<FileMark> mark(const EngineFile&) const { return nullptr; }
  const EngineOptions options_;
  const std::optional<Faults> faults_;

 private:
  std::shared_ptr<Request> make(Transfer transfer);
  const pid_t process_;
  std::atomic<uint64_t> serial_{0};
};

}  // namespace ds::io
