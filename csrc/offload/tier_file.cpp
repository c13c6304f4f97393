// SPDX-License-Identifier: Apache-2.0
#include "offload/tier_file.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "base/checked.h"
#include "base/error.h"
#include "platform/memory.h"

namespace ds::offload {
namespace {
constexpr int64_t kAlign = static_cast<int64_t>(platform::kPageBytes);
}

std::shared_ptr<TierFile> TierFile::create(const std::string& folder, const io::EngineOptions& options) {
  return std::shared_ptr<TierFile>(new TierFile(folder, options));
}

TierFile::TierFile(const std::string& folder, const io::EngineOptions& options)
    : folder_(folder), engine_(io::FileEngine::create(options)), file_(engine_->adopt(platform::File::scratch(folder))) {}

std::shared_ptr<void> TierFile::allocate(int64_t bytes, bool second_place) {
  DS_CHECK_VALUE(bytes >= 0, "cannot allocate " << bytes << " bytes in a file");
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), kAlign);
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t total = second_place ? 2 * size : size;
  ensure_space(end_ + total);
  void* data = ::mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_->file().fd(), end_);
  if (data == MAP_FAILED) DS_FAIL_FILE("mapping " + std::to_string(size) + " bytes", file_->path(), errno);
  ::madvise(data, static_cast<size_t>(size), MADV_DONTDUMP);
  ranges_[static_cast<char*>(data)] = {end_, size, second_place ? end_ + size : -1};
  end_ += total;
  return {data, [self = shared_from_this()](void* p) { self->free(static_cast<char*>(p)); }};
}

void TierFile::set_aside(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ensure_space(end_ + bytes);
}

void TierFile::ensure_space(int64_t end) {
  const int64_t begin = std::max(end_, space_end_);
  if (end <= begin) return;
  file_->file().reserve(begin, end - begin);
  space_end_ = end;
}

void TierFile::free(char* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ranges_.find(data);
  ::munmap(data, static_cast<size_t>(found->second.bytes));
  // A request: where the system cannot punch it out, the space is given back with the file.
  for (const int64_t offset : {found->second.offset, found->second.second}) {
    if (offset >= 0) ::fallocate(file_->file().fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, found->second.bytes);
  }
  ranges_.erase(found);
}

std::optional<std::pair<TierFile::Range, int64_t>> TierFile::find(const void* data) const {
  auto* const address = static_cast<char*>(const_cast<void*>(data));
  auto after = ranges_.upper_bound(address);
  if (after == ranges_.begin()) return std::nullopt;
  const auto& [begin, range] = *--after;
  const int64_t inside = address - begin;
  if (inside >= range.bytes) return std::nullopt;
  return std::pair{range, inside};
}

std::optional<int64_t> TierFile::offset_of(const void* data) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = find(data);
  return found ? std::optional(found->first.offset + found->second) : std::nullopt;
}

std::optional<int64_t> TierFile::second_place_of(const void* data) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = find(data);
  return found && found->first.second >= 0 ? std::optional(found->first.second + found->second) : std::nullopt;
}

void TierFile::exchange(void* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ranges_.find(static_cast<char*>(data));
  DS_CHECK(found != ranges_.end() && found->second.second >= 0, "exchange: not the beginning of a range with a second place");
  Range& range = found->second;
  const auto size = static_cast<size_t>(range.bytes);
  if (::mmap(data, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, file_->file().fd(), range.second) == MAP_FAILED) {
    DS_FAIL_FILE("mapping " + std::to_string(range.bytes) + " bytes", file_->path(), errno);
  }
  ::madvise(data, size, MADV_DONTDUMP);
  std::swap(range.offset, range.second);
}

void TierFile::leave(void* data, int64_t bytes) const { platform::unmap_pages(data, static_cast<size_t>(bytes)); }

void TierFile::leave_all() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [data, range] : ranges_) platform::unmap_pages(data, static_cast<size_t>(range.bytes));
}

int64_t TierFile::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = 0;
  for (const auto& [data, range] : ranges_) total += range.second >= 0 ? 2 * range.bytes : range.bytes;
  return total;
}

}  // namespace ds::offload
