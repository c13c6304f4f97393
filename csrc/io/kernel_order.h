// SPDX-License-Identifier: Apache-2.0
// What ThreadSanitizer does not see of io_uring: that an entry's answer comes after the entry, and that the kernel reads and writes the memory of
// a transfer. Told so, it finds threads that touch such memory while a transfer is under way. Nothing in other builds.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define DS_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define DS_TSAN 1
#endif
#endif

#ifdef DS_TSAN
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#endif

namespace ds::io {

// Everything done so far comes before taken_back(entry).
inline void given_to_kernel([[maybe_unused]] void* entry) {
#ifdef DS_TSAN
  __tsan_release(entry);
#endif
}

inline void taken_back([[maybe_unused]] void* entry) {
#ifdef DS_TSAN
  __tsan_acquire(entry);
#endif
}

// After taken_back(): between the two the kernel read `bytes` bytes, or wrote them.
inline void kernel_accessed([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool wrote) {
#ifdef DS_TSAN
  if (wrote) __tsan_write_range(data, bytes);
  else __tsan_read_range(data, bytes);
#endif
}

}  // namespace ds::io
