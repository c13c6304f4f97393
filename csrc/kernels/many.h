// SPDX-License-Identifier: Apache-2.0
// One CUDA launch over thousands of arrays: a table in device memory says what each block of threads works on.
//
// A table is `rows` entries of the operation's own type, then `chunks` ManyChunks. The host writes it (pinned memory, or any for `upload_table`),
// copies it to the device and launches. Chunks depend on the sizes of the arrays alone, so sums over them repeat bit for bit on any GPU.
#pragma once

#include <cstdint>
#include <vector>

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

struct ManyChunk {
  int32_t row, index;  // elements [index, index + 1) * chunk_numel of the row
};

struct ManyPlan {
  int64_t rows = 0, chunk_numel = 0, chunks = 0, chunks_offset = 0, bytes = 0;
};

// chunk_numel is a multiple of 1024, at most 2^16 and so that large arrays make some 8192 chunks. Rows without elements make none.
ManyPlan plan_many(const std::vector<int64_t>& numels, int64_t entry_bytes);
void write_chunks(const ManyPlan& plan, const std::vector<int64_t>& numels, void* table);

// CUDA: copies a table from any host memory through the parameters of kernels, about 32 kB a launch. Slower than a copy from pinned memory, but
// a CUDA graph that captures it keeps the bytes, not a pointer to host memory that may be freed.
void upload_table(const void* host, void* device, int64_t bytes, cudaStream_t stream);

}  // namespace ds::kernels
