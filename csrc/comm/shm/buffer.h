// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <vector>

#include "comm/shm/core.h"

namespace ds::comm::shm {

// Where one rank keeps a buffer. Plain bytes: travels when the buffer is made.
struct BufferSite {
  uint64_t bytes;
  uint64_t heap_offset;
  uint64_t place;
  uint64_t generation;
};

// The interpreter is about to end: memory that peers may still read is left to the kernel.
void set_exiting();
bool exiting();

class ShmBuffer : public SymmetricBuffer {
 public:
  // Collective in two steps: reserve my part, exchange the sites, map everybody's. `files`: where each rank's part lies when that is
  // not its heap, the same on no two ranks; else empty.
  static BufferSite reserve(Core& core, size_t bytes, bool in_heap);
  ShmBuffer(std::shared_ptr<Core> core, uint64_t id, const std::vector<BufferSite>& sites, std::vector<std::shared_ptr<File>> files);
  ~ShmBuffer() override;

  void publish() override;
  bool in_file() const override { return in_file_; }
  uint64_t id() const { return id_; }
  const Core* core() const { return core_.get(); }

  // Peers only. The published epoch, with the bit kReleased when rank r has released the buffer; kGone when that is long ago.
  uint64_t epoch_of(int r) const;
  const char* data_of(int r) const { return parts_[r]->data(); }  // read-only for peers' parts

  // Copies from rank r's part.
  void copy_from(int r, void* out, size_t offset, size_t bytes);
  // Bytes of rank r's part were read in place. Pages of peers are unmapped again once they add up, so that resident memory
  // stays bounded.
  void was_read(int r, size_t offset, size_t bytes);

 private:
  bool released_by_all() const;

  struct Touched {
    size_t begin = 0;
    size_t end = 0;
  };
  std::shared_ptr<Core> core_;
  const uint64_t id_;
  std::vector<BufferSite> sites_;
  const bool in_file_;
  std::vector<std::unique_ptr<Mapping>> parts_;
  std::vector<Touched> touched_;
};

}  // namespace ds::comm::shm
