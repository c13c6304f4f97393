// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli: reflected polynomial 0x82f63b78, register inverted before and after), the checksum of checkpoint files.
// Runs on wide carry-less products where the processor has them (AVX-512 with VPCLMULQDQ), else on its own instruction (SSE4.2, ARMv8 CRC), else
// on tables; chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ds::io {

// Continues `crc`, the value for what came before (0 at the start): crc32c(b, crc32c(a)) is the value of a followed by b.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// The same while copying: dst = src, which do not overlap.
uint32_t crc32c_copy(void* dst, const void* src, size_t bytes, uint32_t crc = 0);

// The forms that this machine can run, the one in use first ("vpclmulqdq", "sse4.2", "armv8", "tables"); and one of them, for tests.
std::vector<std::string> crc32c_forms();
uint32_t crc32c_by(const std::string& form, const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace ds::io
