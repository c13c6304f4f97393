// SPDX-License-Identifier: Apache-2.0
#include "platform/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "base/checked.h"
#include "base/error.h"
#include "platform/env.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4  // Linux 5.7
#endif

namespace ds::platform {
namespace {

PinHooks g_pin_hooks;

uintptr_t align_up(uintptr_t address, size_t alignment) { return (address + alignment - 1) / alignment * alignment; }

// Anonymous mapping whose start is a multiple of `alignment`: maps too much, then trims both ends.
void* map_aligned(size_t bytes, size_t alignment) {
  const size_t reserve = bytes + (alignment > kPageBytes ? alignment : 0);
  void* base = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  DS_CHECK(base != MAP_FAILED, "cannot allocate " << bytes << " bytes: " << std::strerror(errno) << " (errno " << errno << ")");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = align_up(begin, alignment);
  if (aligned > begin) munmap(base, aligned - begin);
  const uintptr_t end = begin + reserve;
  if (end > aligned + bytes) munmap(reinterpret_cast<void*>(aligned + bytes), end - aligned - bytes);
  return reinterpret_cast<void*>(aligned);
}

struct Range {
  uintptr_t begin, end;
};

Range whole_huge_pages(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {align_up(begin, kHugePageBytes), (begin + bytes) / kHugePageBytes * kHugePageBytes};
}

// Most of it is in memory: making it one page makes little else resident.
bool is_mostly_resident(uintptr_t page) {
  unsigned char pages[kHugePageBytes / kPageBytes];
  if (mincore(reinterpret_cast<void*>(page), kHugePageBytes, pages) != 0) return false;
  return 2 * std::count_if(std::begin(pages), std::end(pages), [](unsigned char p) { return (p & 1u) != 0; }) >= std::end(pages) - std::begin(pages);
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  const Range range = whole_huge_pages(data, bytes);
  if (range.begin < range.end && *env_bool("DS_HUGE_PAGES")) madvise(reinterpret_cast<void*>(range.begin), range.end - range.begin, MADV_HUGEPAGE);
}

void collapse_huge_pages(void* data, size_t bytes) {
  advise_huge_pages(data, bytes);
  const Range range = whole_huge_pages(data, bytes);
  if (range.begin >= range.end || !*env_bool("DS_HUGE_PAGES")) return;
  for (uintptr_t page = range.begin; page < range.end; page += kHugePageBytes) {
    if (is_mostly_resident(page) && madvise(reinterpret_cast<void*>(page), kHugePageBytes, MADV_COLLAPSE) != 0 && errno == EINVAL) return;
  }
}

bool discard_pages(void* data, size_t bytes) {
  const uintptr_t begin = align_up(reinterpret_cast<uintptr_t>(data), kPageBytes);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPageBytes * kPageBytes;
  if (begin >= end) return true;
  // What is not shared refuses to be removed from a file.
  return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_REMOVE) == 0 ||
         madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED) == 0;
}

namespace {

void advise_pages(const void* data, size_t bytes, int advice) {
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPageBytes * kPageBytes;
  const uintptr_t end = align_up(reinterpret_cast<uintptr_t>(data) + bytes, kPageBytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

}  // namespace

void unmap_pages(void* data, size_t bytes) { advise_pages(data, bytes, MADV_DONTNEED); }

void prefetch_pages(const void* data, size_t bytes) { advise_pages(data, bytes, MADV_WILLNEED); }

void exchange_pages(void* a, void* b, size_t bytes) {
  if (bytes == 0) return;
  // Where pages are moved from stays mapped, so that no other thread is given the address meanwhile.
  const auto move = [bytes](void* from, void* to, int more) {
    return mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | more, to) != MAP_FAILED;
  };
  void* between = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  DS_CHECK(between != MAP_FAILED, "cannot map " << bytes << " bytes: " << std::strerror(errno) << " (errno " << errno << ")");
  if (!move(a, between, MREMAP_DONTUNMAP)) {
    munmap(between, bytes);
    std::swap_ranges(static_cast<char*>(a), static_cast<char*>(a) + bytes, static_cast<char*>(b));
    return;
  }
  if (!move(b, a, MREMAP_DONTUNMAP)) {
    const int code = errno;
    DS_CHECK(move(between, a, 0), "memory was lost while it was moved: " << std::strerror(errno) << " (errno " << errno << ")");
    DS_FAIL("cannot move " << bytes << " bytes of pages: " << std::strerror(code) << " (errno " << code << ")");
  }
  DS_CHECK(move(between, b, 0), "memory was lost while it was moved: " << std::strerror(errno) << " (errno " << errno << ")");
}

void set_pin_hooks(const PinHooks& hooks) { g_pin_hooks = hooks; }

bool can_pin() { return g_pin_hooks.pin != nullptr; }

Buffer::Buffer(size_t bytes, bool pinned) : bytes_(bytes) {
  DS_CHECK_VALUE(!pinned || can_pin(), "pinned memory was asked for, but no device is present that could use it");
  DS_CHECK_VALUE(bytes <= (size_t{1} << 47), "a buffer of " << bytes << " bytes is larger than the address space");
  if (bytes == 0) return;
  const bool huge = bytes >= kHugePageBytes;
  if (huge) env_bool("DS_HUGE_PAGES");  // throws if it is no bool: before anything is mapped
  mapped_bytes_ = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), kPageBytes));
  data_ = map_aligned(mapped_bytes_, huge ? kHugePageBytes : kPageBytes);
  advise_huge_pages(data_, mapped_bytes_);
  if (!pinned) return;
  pinned_ = g_pin_hooks.pin(data_, mapped_bytes_);
  if (!pinned_) {
    release();
    DS_FAIL("the system refused to pin " << bytes << " bytes of host memory");
  }
}

Buffer::~Buffer() { release(); }

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)),
      mapped_bytes_(std::exchange(other.mapped_bytes_, 0)), pinned_(std::exchange(other.pinned_, false)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    mapped_bytes_ = std::exchange(other.mapped_bytes_, 0);
    pinned_ = std::exchange(other.pinned_, false);
  }
  return *this;
}

void Buffer::release() noexcept {
  if (data_ == nullptr) return;
  if (pinned_ && g_pin_hooks.unpin != nullptr) g_pin_hooks.unpin(data_);
  munmap(data_, mapped_bytes_);
  data_ = nullptr;
}

void Buffer::discard(size_t offset, size_t bytes) {
  DS_CHECK_VALUE(offset <= bytes_ && bytes <= bytes_ - offset,
                 "discard of [" << offset << ", +" << bytes << ") is outside a buffer of " << bytes_ << " bytes");
  DS_CHECK(!pinned_, "pinned memory cannot be given back page by page");
  const size_t begin = align_up(offset, kPageBytes);
  // The last page may be partly ours and partly padding; it counts as whole when the range reaches the buffer's end.
  const size_t end = offset + bytes == bytes_ ? mapped_bytes_ : (offset + bytes) / kPageBytes * kPageBytes;
  if (end <= begin) return;
  DS_CHECK(madvise(static_cast<char*>(data_) + begin, end - begin, MADV_DONTNEED) == 0,
           "cannot give pages back: " << std::strerror(errno));
}

size_t Buffer::resident_bytes() const {
  if (data_ == nullptr) return 0;
  std::vector<unsigned char> pages(mapped_bytes_ / kPageBytes);
  DS_CHECK(mincore(data_, mapped_bytes_, pages.data()) == 0, "mincore failed: " << std::strerror(errno));
  size_t resident = 0;
  for (unsigned char page : pages) resident += (page & 1u) * kPageBytes;
  return resident;
}

}  // namespace ds::platform
