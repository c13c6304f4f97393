// SPDX-License-Identifier: Apache-2.0
// Asynchronous reads and writes of whole ranges. A request is cut into chunks; aligned chunks go past the page cache
// (O_DIRECT) where the file system allows it, the rest through it. One engine may be used from many threads.
//
//   auto engine = FileEngine::create({});
//   auto file = engine->open(path, File::Mode::Read);
//   auto ticket = engine->read(file, offset, dst, bytes);   // dst stays untouched by others until wait() returns
//   ticket->wait();                                         // throws FileError naming path, range and errno
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "platform/file.h"

namespace ds::io {

enum class Backend { Auto, Uring, Threads };

struct EngineOptions {
  Backend backend = Backend::Auto;  // Auto: DS_IO_ENGINE, else io_uring where the kernel allows it, else threads
  int queue_depth = 32;             // chunks in flight
  int threads = 4;                  // of the thread backend
  int64_t chunk_bytes = int64_t{1} << 20;
  bool direct = true;               // false: always through the page cache
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

 private:
  void open_direct(const std::string& path, int access);

  platform::File file_;
  platform::File direct_;
};

// One read or write under way.
class Request {
 public:
  Request(std::shared_ptr<EngineFile> file, bool is_write, int64_t offset, int64_t bytes);
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
  const int64_t bytes_;
  int64_t chunks_left_ = 0;
  int error_ = 0;          // errno of the first failing chunk; kEndOfFile for an early end
  int64_t error_offset_ = 0;
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

 protected:
  explicit FileEngine(const EngineOptions& options) : options_(options) {}
  virtual void submit(const std::shared_ptr<Request>& request, char* data) = 0;
  const EngineOptions options_;

 private:
  std::shared_ptr<Request> start(std::shared_ptr<EngineFile> file, bool is_write, int64_t offset, char* data, int64_t bytes);
};

}  // namespace ds::io
