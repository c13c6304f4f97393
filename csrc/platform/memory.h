// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds::platform {

constexpr size_t kCacheLineBytes = 64;
constexpr size_t kPageBytes = 4096;
constexpr size_t kHugePageBytes = size_t{2} << 20;

// How memory is page-locked for a device. The torch side registers CUDA's functions at start-up; without them pinning is
// refused, because memory that only claims to be pinned makes asynchronous copies silently synchronous.
struct PinHooks {
  bool (*pin)(void* data, size_t bytes) = nullptr;  // false: the system refused
  void (*unpin)(void* data) = nullptr;
};
void set_pin_hooks(const PinHooks& hooks);
bool can_pin();

// The whole huge pages inside [data, data + bytes): neighbours in a heap are left alone. Both are advice, which a kernel without huge pages
// ignores, and which DS_HUGE_PAGES=0 turns off.
void advise_huge_pages(void* data, size_t bytes);    // for memory that is to be written
void collapse_huge_pages(void* data, size_t bytes);  // for memory that has been: its small pages are copied together (Linux 6.1)

// Gives the whole pages inside [data, data + bytes) back to the system, those of a shared mapping in its file; false, with errno, where it keeps
// them. They come back empty when they are touched.
bool discard_pages(void* data, size_t bytes);

// Takes the whole pages that meet [data, data + bytes) of a shared mapping of a file out of this process's resident memory; the file keeps them.
// Never for other memory, whose values it would drop.
void unmap_pages(void* data, size_t bytes);
// Starts to read such pages from the disk.
void prefetch_pages(const void* data, size_t bytes);

// Two ranges of whole pages, of equal length, each (part of) one private mapping: their values change places. Where the system can, the pages do, so
// that no byte is moved; otherwise the bytes are.
void exchange_pages(void* a, void* b, size_t bytes);

// Zero-filled memory mapped from the system; pages become resident when first written. Page-aligned; from kHugePageBytes on
// aligned to and advised for huge pages (DS_HUGE_PAGES=0 turns the advice off). Movable, not copyable.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes, bool pinned = false);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool pinned() const { return pinned_; }

  // Gives the whole pages inside [offset, offset + bytes) back to the system; they read as zero afterwards. Not for pinned memory.
  void discard(size_t offset, size_t bytes);

  // Bytes of this buffer that are in memory now.
  size_t resident_bytes() const;

 private:
  void release() noexcept;

  void* data_ = nullptr;
  size_t bytes_ = 0;
  size_t mapped_bytes_ = 0;
  bool pinned_ = false;
};

}  // namespace ds::platform
