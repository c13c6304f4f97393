// SPDX-License-Identifier: Apache-2.0
// Note [Past the caches]. An array so large that whoever reads it will not find it in a cache is best written to memory directly: its lines
// are not read first, and what is cached stays. Kernels do so where a row begins at a multiple of kStreamBytes. Such stores are weakly
// ordered: who hands the array to another thread puts a full fence in between (for_chunks of csrc/ops does).
//
// Note [From memory]. Arrays that no cache holds are asked for before they are needed where a kernel sweeps a row twice: during the second
// sweep memory would have nothing to do. Where a cache does hold them that costs a tenth.
#pragma once

#include <cstdint>

namespace ds::kernels {

constexpr uintptr_t kStreamBytes = 64;
inline bool is_streamable(const void* p) { return reinterpret_cast<uintptr_t>(p) % kStreamBytes == 0; }

// Where a kernel writes; a plain pointer is an array like any other.
struct Output {
  Output(void* data_, bool past_caches_ = false) : data(data_), past_caches(past_caches_) {}
  void* data;
  bool past_caches;  // a hint, see the note
};

}  // namespace ds::kernels
