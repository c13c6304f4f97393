// SPDX-License-Identifier: Apache-2.0
// Memory that rests on a disk: one file a rank, without a name, gone with the process however that ends.
//
// Note [Mapped and streamed]. Every range is mapped, so whoever has its address reads and writes it like memory: the page cache is the memory
// it then takes, which the system writes back and takes away when it is short. What passes over whole ranges in order (an optimizer's step)
// goes past the page cache instead, by `engine` and `file` (see TileStream). The kernel keeps both views of a page the same as long as nobody
// uses the two at once: direct writes drop cached pages, direct reads write dirty ones first. `leave` ends the use through the mapping.
//
// Note [A second place]. A range may have a second place in the file, where new values are written while the range keeps the old ones. `exchange`
// makes the second place the range's own, by mapping it there; no byte moves.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "io/file_engine.h"

namespace ds::offload {

class TierFile : public std::enable_shared_from_this<TierFile> {
 public:
  // FileError naming `folder` where no file can be made in it.
  static std::shared_ptr<TierFile> create(const std::string& folder, const io::EngineOptions& options);
  TierFile(const TierFile&) = delete;
  TierFile& operator=(const TierFile&) = delete;

  // Zero-filled, page-aligned. The disk space, that of a second place too, is set aside now: FileError when there is none. Freed with the last copy,
  // which keeps the file.
  std::shared_ptr<void> allocate(int64_t bytes, bool second_place = false);

  // So much disk space for ranges to come, in whole pages each: FileError when there is none.
  void set_aside(int64_t bytes);

  // Where the range that `data` points into has it in the file; nothing when no range has.
  std::optional<int64_t> offset_of(const void* data) const;
  // The same in the range's second place; nothing when it has none.
  std::optional<int64_t> second_place_of(const void* data) const;
  // `data` begins a range.
  void exchange(void* data);

  // Pages touched through the mapping stop counting as memory of this process.
  void leave(void* data, int64_t bytes) const;
  void leave_all() const;

  io::FileEngine& engine() const { return *engine_; }
  const std::shared_ptr<io::EngineFile>& file() const { return file_; }
  const std::string& folder() const { return folder_; }
  int64_t bytes() const;   // of all ranges, second places too

 private:
  struct Range {
    int64_t offset;
    int64_t bytes;
    int64_t second = -1;   // offset of the second place; -1: none
  };
  TierFile(const std::string& folder, const io::EngineOptions& options);
  void free(char* data);
  // The file's space reaches up to `end`; the lock is held.
  void ensure_space(int64_t end);
  // The range that an address lies in and how far; the lock is held.
  std::optional<std::pair<Range, int64_t>> find(const void* data) const;

  const std::string folder_;
  std::unique_ptr<io::FileEngine> engine_;
  std::shared_ptr<io::EngineFile> file_;
  mutable std::mutex mutex_;
  std::map<char*, Range> ranges_;   // by address
  int64_t end_ = 0;
  int64_t space_end_ = 0;   // disk space is set aside up to here
};

}  // namespace ds::offload
