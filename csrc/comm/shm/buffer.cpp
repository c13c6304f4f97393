// SPDX-License-Identifier: Apache-2.0
#include "comm/shm/buffer.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace ds::comm::shm {
namespace {

constexpr size_t kKeepMapped = size_t{8} << 20;  // of a peer's part of one buffer
constexpr size_t kChunk = size_t{4} << 20;

std::unique_ptr<Mapping> map_site(const Core& core, int r, const BufferSite& site, const std::shared_ptr<File>& file) {
  return std::make_unique<Mapping>(file, site.heap_offset, extent(site.bytes), /*writable=*/r == core.rank);
}

}  // namespace

BufferSite ShmBuffer::reserve(Core& core, size_t bytes, bool in_heap) {
  BufferSite site{};
  site.bytes = bytes;
  site.heap_offset = in_heap ? core.heap().allocate(bytes) : 0;
  site.place = static_cast<uint64_t>(core.take_place(&site.generation));
  return site;
}

ShmBuffer::ShmBuffer(std::shared_ptr<Core> core, uint64_t id, const std::vector<BufferSite>& sites, std::vector<std::shared_ptr<File>> files)
    : SymmetricBuffer(nullptr, sites[core->rank].bytes, Device::Cpu, 0), core_(std::move(core)), id_(id), sites_(sites),
      in_file_(!files.empty()), touched_(sites.size()) {
  for (int r = 0; r < core_->size; ++r) parts_.push_back(map_site(*core_, r, sites_[r], in_file_ ? files[r] : core_->member(r).file));
  data_ = parts_[core_->rank]->data();
}

namespace {
std::atomic<bool> exiting_flag{false};
}

void set_exiting() { exiting_flag.store(true); }
bool exiting() { return exiting_flag.load(); }

ShmBuffer::~ShmBuffer() {
  // A process that ends normally leaves its last values readable: a peer may still be in its last evaluation.
  if (!core_->in_owner() || exiting()) return;
  const BufferSite& mine = sites_[core_->rank];
  const uint64_t last = place_word(mine.generation, kReleased | static_cast<uint64_t>(epoch_));
  core_->own().places[mine.place].word.store(last, std::memory_order_seq_cst);
  core_->notify();
  // Who has not released it may still read my part: the last one gives everybody's memory back. Two who both think they are
  // the last do no harm, since a heap never hands a range out again.
  if (!in_file_ && released_by_all())
    for (int r = 0; r < core_->size; ++r) core_->member(r).file->discard(sites_[r].heap_offset, extent(sites_[r].bytes));
  core_->free_place(static_cast<int>(mine.place));
}

bool ShmBuffer::released_by_all() const {
  for (int r = 0; r < core_->size; ++r)
    if ((epoch_of(r) & kReleased) == 0) return false;
  return true;
}

void ShmBuffer::publish() {
  const BufferSite& mine = sites_[core_->rank];
  if (++epoch_ == 1 && !in_file_) parts_[core_->rank]->collapse();  // filled by now, and gathered from again and again
  core_->own().places[mine.place].word.store(place_word(mine.generation, static_cast<uint64_t>(epoch_)), std::memory_order_release);
  core_->notify();
}

uint64_t ShmBuffer::epoch_of(int r) const {
  const uint64_t word = core_->of(r).places[sites_[r].place].word.load(std::memory_order_seq_cst);
  return word >> kEpochBits == sites_[r].generation ? word & kGone : kGone;
}

void ShmBuffer::copy_from(int r, void* out, size_t offset, size_t bytes) {
  const char* src = parts_[r]->data() + offset;
  if (out == src || bytes == 0) return;
  if (r == core_->rank) {
    std::memmove(out, src, bytes);
    return;
  }
  for (size_t at = 0; at < bytes; at += kChunk) {
    const size_t n = std::min(kChunk, bytes - at);
    std::memcpy(static_cast<char*>(out) + at, src + at, n);
    was_read(r, offset + at, n);
  }
}

void ShmBuffer::was_read(int r, size_t offset, size_t bytes) {
  if (r == core_->rank || bytes == 0) return;
  Touched& touched = touched_[r];
  const bool none = touched.end == 0;
  touched.begin = none ? offset : std::min(touched.begin, offset);
  touched.end = std::max(touched.end, offset + bytes);
  if (touched.end - touched.begin > kKeepMapped) {
    parts_[r]->drop(touched.begin, touched.end - touched.begin);
    touched = {};
  }
}

}  // namespace ds::comm::shm
