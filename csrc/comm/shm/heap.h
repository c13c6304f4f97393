// SPDX-License-Identifier: Apache-2.0
// A rank's shareable memory: one anonymous file (memfd). Nothing in /dev/shm, nothing to clean up after a kill.
//
// Note [One file a rank]. All buffers of a rank lie in one file, at offsets that are never used twice, so a peer needs to get
// hold of one descriptor, once. A released range is punched out, which gives its memory back whoever has it mapped.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace ds::comm::shm {

inline constexpr size_t kHugePage = size_t{2} << 20;

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }  // the descriptor is the caller's from now on
  static std::shared_ptr<File> anonymous();  // throws where the kernel refuses
  void discard(size_t offset, size_t bytes) const;  // gives the memory of a range back; it reads as zeros from now on

 private:
  int fd_;
};

// [offset, offset + bytes) of a file. From 2 MB up: at an aligned address, huge pages advised.
class Mapping {
 public:
  Mapping(std::shared_ptr<File> file, size_t offset, size_t bytes, bool writable);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Unmaps the pages of [begin, begin + bytes) from this process; they stay in the file. A hint, never fails.
  void drop(size_t begin, size_t bytes) const;
  // Puts what is mostly resident into huge pages, whoever maps it, also where the system does not give them to shared memory
  // by itself. About 1 ms a MB, once; peers then map and drop 2 MB at a time (measured: gathers twice as fast). A hint.
  void collapse() const;

 private:
  std::shared_ptr<File> file_;
  char* data_;
  size_t bytes_;
};

class Heap {
 public:
  explicit Heap(size_t head_bytes);  // `head_bytes` at offset 0 are the caller's
  const std::shared_ptr<File>& file() const { return file_; }
  size_t allocate(size_t bytes);               // an offset: page-aligned, from 2 MB up 2 MB-aligned

 private:
  std::shared_ptr<File> file_;
  size_t end_;
};

size_t extent(size_t bytes);  // what allocate() sets aside

}  // namespace ds::comm::shm
