// SPDX-License-Identifier: Apache-2.0
// Sleeping on a word of memory shared between processes.
#pragma once

#include <atomic>
#include <cstdint>

namespace ds::comm::shm {

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free,
              "words in memory shared between processes must not hide a lock");

// Returns at a wake, when *word != expected, after timeout_ns, or spuriously.
void futex_wait(std::atomic<uint32_t>* word, uint32_t expected, int64_t timeout_ns);
void futex_wake_all(std::atomic<uint32_t>* word);

inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

}  // namespace ds::comm::shm
