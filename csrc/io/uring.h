// SPDX-License-Identifier: Apache-2.0
// One io_uring and what has been registered with it. Everything here that touches the ring or a table needs `mutex`, except for taking
// completions. The ring outlives its engine for as long as a registered file or buffer does, but is closed with the engine.
#pragma once

#ifdef DS_WITH_URING

#include <liburing.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "io/file_engine.h"

namespace ds::io {

class Uring {
 public:
  Uring();
  std::mutex mutex;

  // 0 or a negated errno. A trial shows that the kernel does what the engine needs.
  int open(int entries);
  void close();
  io_uring* ring() { return &ring_; }
  // False in a child process: the ring is its parent's, and the mutex may be locked for ever.
  bool is_ours() const;
  // Hands everything that is prepared to the kernel; the number of system calls that took.
  int flush();

  // Index of the first of two descriptors that are now known, or -1.
  int add_files(int cached_fd, int direct_fd);
  void remove_files(int index);
  // Indices of the pieces, empty when refused.
  std::vector<int> add_buffer(char* data, int64_t bytes);
  void remove_buffers(const std::vector<int>& indices);
  // Index of the piece that holds the whole range, or -1.
  int find_buffer(const char* data, int64_t bytes) const;

 private:
  struct Piece {
    const char* begin;
    const char* end;
    int index;
  };
  int trial();
  void make_tables();

  const pid_t process_;
  io_uring ring_;
  bool open_ = false;
  std::vector<int> free_files_, free_buffers_;  // places in the kernel's tables
  std::vector<Piece> pieces_;
};

struct UringMark final : FileMark {
  UringMark(std::shared_ptr<Uring> uring_, int index_) : uring(std::move(uring_)), index(index_) {}
  ~UringMark() override;
  const std::shared_ptr<Uring> uring;
  const int index;  // of the descriptor through the cache; the direct one follows
};

class UringBuffer final : public KnownBuffer {
 public:
  UringBuffer(std::shared_ptr<Uring> uring, char* data, int64_t bytes);
  ~UringBuffer() override;
  bool active() const override { return !indices_.empty(); }

 private:
  const std::shared_ptr<Uring> uring_;
  std::vector<int> indices_;
};

}  // namespace ds::io

#endif
