// SPDX-License-Identifier: Apache-2.0
// Argument checks that every transport makes in the same words.
#pragma once

#include "base/error.h"
#include "comm/transport.h"

namespace ds::comm {

// `bytes` at `offset` lie inside a buffer of `limit` bytes, without overflow.
inline void check_range(size_t offset, size_t bytes, size_t limit, const char* what) {
  DS_CHECK_VALUE(offset <= limit && bytes <= limit - offset,
                 what << ": bytes [" << offset << ", " << offset << " + " << bytes << ") are outside a buffer of " << limit);
}

// Every rank's part, since strides are the same everywhere.
inline void check_gather(const SymmetricBuffer& src, size_t offset, size_t stride, size_t bytes, int size) {
  check_range(offset, bytes, src.bytes(), "all_gather");
  DS_CHECK_VALUE(size == 1 || stride <= (src.bytes() - offset - bytes) / static_cast<size_t>(size - 1),
                 "all_gather: " << size << " parts of " << bytes << " bytes, stride " << stride << ", at " << offset
                                << " do not fit in a buffer of " << src.bytes() << " bytes");
}

inline void check_pieces(const std::vector<GatherPiece>& pieces, size_t bytes, int size) {
  for (const auto& piece : pieces) {
    DS_CHECK_VALUE(piece.rank >= 0 && piece.rank < size, "all_gather: piece of rank " << piece.rank << " of " << size);
    check_range(piece.offset, piece.bytes, bytes, "all_gather: piece");
  }
}

inline void check_reduce(const SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel, int channels, DType dtype,
                         int size) {
  DS_CHECK_VALUE(channel >= 0 && channel < channels, "reduce_scatter: channel " << channel << " of " << channels);
  DS_CHECK_VALUE(part_bytes % dtype_size(dtype) == 0,
                 "reduce_scatter: part of " << part_bytes << " bytes is no whole number of " << dtype_name(dtype));
  DS_CHECK_VALUE(part_bytes <= bucket.bytes() / static_cast<size_t>(size),
                 "reduce_scatter: " << size << " parts of " << part_bytes << " bytes exceed a bucket of " << bucket.bytes());
  check_range(offset, part_bytes * static_cast<size_t>(size), bucket.bytes(), "reduce_scatter");
}

}  // namespace ds::comm
