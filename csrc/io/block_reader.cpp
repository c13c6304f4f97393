// SPDX-License-Identifier: Apache-2.0
#include "io/block_reader.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "base/checked.h"
#include "io/chunk.h"
#include "io/crc32c.h"
#include "platform/memory.h"

namespace ds::io {
namespace {

constexpr int64_t kBuffers = 16;

float load(const char* p, DType from) {
  if (from == DType::F32) {
    float f;
    std::memcpy(&f, p, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  return from == DType::BF16 ? bf16_to_float(h) : f16_to_float(h);
}

template <DType From, DType To>
void convert_run(const char* src, char* dst, int64_t numel) {
  constexpr int64_t in = static_cast<int64_t>(dtype_size(From)), out = static_cast<int64_t>(dtype_size(To));
  for (int64_t i = 0; i < numel; ++i) {
    const float value = load(src + i * in, From);
    if constexpr (To == DType::F32) {
      std::memcpy(dst + i * out, &value, 4);
    } else {
      const uint16_t h = To == DType::BF16 ? float_to_bf16(value) : float_to_f16(value);
      std::memcpy(dst + i * out, &h, 2);
    }
  }
}

template <DType From>
void convert_from(const char* src, char* dst, DType to, int64_t numel) {
  switch (to) {
    case DType::F32: convert_run<From, DType::F32>(src, dst, numel); return;
    case DType::F16: convert_run<From, DType::F16>(src, dst, numel); return;
    case DType::BF16: convert_run<From, DType::BF16>(src, dst, numel); return;
    default: DS_FAIL_VALUE("cannot convert " << dtype_name(From) << " to " << dtype_name(to));
  }
}

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof(text), "%08x", value);
  return text;
}

}  // namespace

void convert_elements(const void* src, DType from, void* dst, DType to, int64_t numel) {
  if (from == to) {
    std::memcpy(dst, src, static_cast<size_t>(numel) * dtype_size(from));
    return;
  }
  const char* in = static_cast<const char*>(src);
  char* out = static_cast<char*>(dst);
  switch (from) {
    case DType::F32: convert_from<DType::F32>(in, out, to, numel); return;
    case DType::F16: convert_from<DType::F16>(in, out, to, numel); return;
    case DType::BF16: convert_from<DType::BF16>(in, out, to, numel); return;
    default: DS_FAIL_VALUE("cannot convert " << dtype_name(from) << " to " << dtype_name(to));
  }
}

BlockReader::BlockReader(FileEngine& engine, const std::string& path, int64_t file_bytes, int64_t block_bytes, std::vector<uint32_t> sums)
    : engine_(engine), file_(engine.open(path, platform::File::Mode::Read)), file_bytes_(file_bytes), block_bytes_(block_bytes),
      sums_(std::move(sums)) {
  DS_CHECK_VALUE(block_bytes > 0 && block_bytes % kDirectAlignment == 0 && block_bytes <= kMaxChunkBytes,
                 "block_bytes must be a multiple of " << kDirectAlignment << " in (0, " << kMaxChunkBytes << "], got " << block_bytes);
  DS_CHECK_VALUE(file_bytes >= 0 && static_cast<int64_t>(sums_.size()) == ceil_div(file_bytes, block_bytes),
                 path << ": " << sums_.size() << " checksums for " << file_bytes << " bytes in blocks of " << block_bytes);
  const int64_t found = file_->file().size();
  if (found != file_bytes) {
    DS_THROW_(ChecksumError, path << " has " << found << " bytes, " << file_bytes << " were written: it was truncated or replaced");
  }
}

void BlockReader::check(int64_t block, const char* data, int64_t bytes) const {
  const uint32_t sum = crc32c(data, static_cast<size_t>(bytes)), want = sums_[static_cast<size_t>(block)];
  if (sum == want) return;
  DS_THROW_(ChecksumError, file_->path() << " is damaged: bytes [" << block * block_bytes_ << ", " << block * block_bytes_ + bytes
                                         << ") have the checksum " << hex(sum) << ", " << hex(want) << " was written");
}

void BlockReader::read(std::vector<ReadRange> ranges) {
  std::set<int64_t> touched;
  for (const ReadRange& r : ranges) {
    const auto width = static_cast<int64_t>(dtype_size(r.from));
    DS_CHECK_VALUE(r.offset >= 0 && r.numel >= 0 && r.offset <= file_bytes_ && r.numel <= (file_bytes_ - r.offset) / width,
                   "range [" << r.offset << ", +" << r.numel << " x " << width << ") is outside " << file_->path() << " of " << file_bytes_);
    DS_CHECK_VALUE(r.offset % width == 0, "range at " << r.offset << " of " << file_->path() << " is not aligned to its elements");
    if (r.numel == 0) continue;
    const int64_t last = (r.offset + r.numel * width - 1) / block_bytes_;
    for (int64_t block = r.offset / block_bytes_; block <= last; ++block) touched.insert(block);
  }
  std::sort(ranges.begin(), ranges.end(), [](const ReadRange& a, const ReadRange& b) { return a.offset < b.offset; });
  take_blocks(std::vector<int64_t>(touched.begin(), touched.end()), ranges);
}

void BlockReader::verify() {
  std::vector<int64_t> all(sums_.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  take_blocks(all, {});
}

void BlockReader::take_blocks(const std::vector<int64_t>& blocks, const std::vector<ReadRange>& ranges) {
  const auto count = static_cast<int64_t>(blocks.size());
  const int64_t slots = std::min(kBuffers, count);
  const platform::Buffer memory(static_cast<size_t>(std::max<int64_t>(slots, 1) * block_bytes_));
  std::vector<std::shared_ptr<Request>> under_way(static_cast<size_t>(slots));
  // Declared after the memory, so that an error does not free what the system still writes into.
  struct Wait {
    std::vector<std::shared_ptr<Request>>& requests;
    ~Wait() {
      for (auto& request : requests) {
        if (!request) continue;
        try {
          request->wait();
        } catch (const Error&) {   // the first error is already on its way
        }
      }
    }
  } const wait{under_way};

  const auto at = [&](int64_t i) { return static_cast<char*>(memory.data()) + i % slots * block_bytes_; };
  const auto size = [&](int64_t i) { return std::min(block_bytes_, file_bytes_ - blocks[static_cast<size_t>(i)] * block_bytes_); };
  const auto start = [&](int64_t i) {
    under_way[static_cast<size_t>(i % slots)] = engine_.read(file_, blocks[static_cast<size_t>(i)] * block_bytes_, at(i), size(i));
  };
  for (int64_t i = 0; i < slots; ++i) start(i);
  size_t first = 0;   // ranges before it are filled
  std::vector<size_t> open;
  for (int64_t i = 0; i < count; ++i) {
    under_way[static_cast<size_t>(i % slots)]->wait();
    const int64_t begin = blocks[static_cast<size_t>(i)] * block_bytes_, end = begin + size(i);
    check(blocks[static_cast<size_t>(i)], at(i), size(i));
    while (first < ranges.size() && ranges[first].offset < end) {
      if (ranges[first].numel > 0) open.push_back(first);
      ++first;
    }
    std::vector<size_t> still;
    for (size_t index : open) {
      const ReadRange& r = ranges[index];
      const auto width = static_cast<int64_t>(dtype_size(r.from));
      const int64_t r_end = r.offset + r.numel * width;
      const int64_t from = std::max(begin, r.offset), to = std::min(end, r_end);
      char* dst = static_cast<char*>(r.dst) + (from - r.offset) / width * static_cast<int64_t>(dtype_size(r.to));
      convert_elements(at(i) + (from - begin), r.from, dst, r.to, (to - from) / width);
      if (r_end > end) still.push_back(index);
    }
    open = std::move(still);
    if (i + slots < count) start(i + slots);
  }
}

}  // namespace ds::io
