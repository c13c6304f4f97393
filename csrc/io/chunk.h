// SPDX-License-Identifier: Apache-2.0
// What both backends share: cutting a request into chunks and judging what the system returned for one.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "io/faults.h"
#include "io/file_engine.h"

namespace ds::io {

constexpr int64_t kDirectAlignment = 4096;  // of offset and length; covers every block size in use
constexpr int64_t kMaxChunkBytes = int64_t{1} << 30;  // one system call moves less than 2 GiB
constexpr int kMaxQueueDepth = 16384;       // the kernel's limit on a ring is 32768
constexpr int kEndOfFile = -1;              // in place of an errno

// A contiguous part of a request, the unit handed to the system.
struct Chunk {
  std::shared_ptr<Request> request;
  char* data;
  int64_t offset;
  int64_t bytes;
  bool direct;
  // Of the faults alone.
  Fault fault = Fault::None;
  uint64_t luck = 0;
  uint64_t issues = 0;

  int fd() const;
  bool is_write() const;
  uint64_t serial() const;
  const EngineFile& file() const;

  // `result` is a byte count or a negated errno. True: the chunk is finished (its request knows). False: issue the chunk again
  // as it now stands: after a short transfer, an interruption, or a file system that refuses direct access after all.
  bool complete(int64_t result);

 private:
  void finish(int error);
};

// Chunks waiting for a free place. Not locked: each backend guards it with its own mutex.
class ChunkQueue {
 public:
  void push(const std::shared_ptr<Request>& request, const EngineOptions& options);
  bool empty() const { return chunks_.empty(); }
  Chunk pop();

 private:
  std::deque<Chunk> chunks_;
};

std::unique_ptr<FileEngine> make_thread_engine(const EngineOptions& options);
// Null when the kernel (or a sandbox) refuses io_uring, or the build had no liburing.
std::unique_ptr<FileEngine> make_uring_engine(const EngineOptions& options);

}  // namespace ds::io
