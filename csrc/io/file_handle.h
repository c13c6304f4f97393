// SPDX-License-Identifier: Apache-2.0
// Reads and writes of whole buffers by path, started one after the other and waited for together: what deepspeed.ops.aio offers.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io/file_engine.h"
#include "platform/memory.h"

namespace ds::io {

struct HandleOptions {
  int64_t block_bytes = int64_t{1} << 20;  // of one transfer; rounded up to what direct access needs
  int queue_depth = 128;                   // transfers under way for each of `parallelism`
  bool single_submit = false;              // a system call for each transfer
  bool overlap_events = false;             // begin a transfer as soon as one ends, not when all have
  int parallelism = 1;
};

// Page-aligned memory that stays in RAM and that the engine knows, as far as the system allows either.
class LockedBuffer {
 public:
  LockedBuffer(FileEngine& engine, int64_t bytes);
  void* data() const { return memory_.data(); }
  int64_t bytes() const { return static_cast<int64_t>(memory_.bytes()); }
  bool locked() const { return locked_; }
  void unlock();  // the memory itself stays until the end of the object

 private:
  platform::Buffer memory_;
  std::unique_ptr<KnownBuffer> known_;  // goes before the memory
  bool locked_ = false;
};

// One operation: a range of a file and memory.
struct Operation {
  std::string path;
  int descriptor = -1;  // instead of a path
  bool is_write = false;
  bool validate = false;  // the file is read again, through the page cache, and compared
  int64_t offset = 0;
  void* data = nullptr;
  int64_t bytes = 0;
};

class FileHandle {
 public:
  explicit FileHandle(const HandleOptions& options);
  ~FileHandle();  // waits

  // A write makes the file where there is none and leaves what it does not cover. Throws when the file cannot be opened or is too short to be
  // read from; what fails later is thrown by wait().
  void start(const Operation& operation);
  // Waits for all that was started: how many operations. Throws the first error, after the last one has ended.
  int64_t wait();
  int64_t pending() const;
  void run(const Operation& operation);  // start and wait, of this operation alone

  const HandleOptions& options() const { return options_; }
  FileEngine& engine() { return *engine_; }

 private:
  struct Started {
    Operation operation;
    std::shared_ptr<EngineFile> file;
    std::shared_ptr<Request> request;
    void finish() const;
  };
  Started begin(const Operation& operation);

  const HandleOptions options_;
  std::unique_ptr<FileEngine> engine_;
  mutable std::mutex mutex_;
  std::vector<Started> started_;
};

}  // namespace ds::io
