// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli: reflected polynomial 0x82f63b78, register inverted before and after), the checksum of checkpoint files.
// Runs on the processor's own instruction where it has one (SSE4.2, ARMv8 CRC), chosen at run time, else on tables.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds::io {

// Continues `crc`, the value for what came before (0 at the start): crc32c(b, crc32c(a)) is the value of a followed by b.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// The same while copying: dst = src, which do not overlap.
uint32_t crc32c_copy(void* dst, const void* src, size_t bytes, uint32_t crc = 0);

// The table form, whatever the processor can do: the oracle of the tests.
uint32_t crc32c_tables(const void* data, size_t bytes, uint32_t crc = 0);

// "sse4.2", "armv8" or "tables".
const char* crc32c_kind();

}  // namespace ds::io
