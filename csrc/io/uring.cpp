// SPDX-License-Identifier: Apache-2.0
#include "io/uring.h"

#ifdef DS_WITH_URING

#include <unistd.h>

#include <algorithm>
#include <thread>

#include "io/chunk.h"

namespace ds::io {
namespace {

constexpr int kKnownFiles = 256, kKnownBuffers = 64;

void fill_descending(std::vector<int>& free, int count, int stride) {
  for (int i = count - stride; i >= 0; i -= stride) free.push_back(i);
}

}  // namespace

Uring::Uring() : process_(getpid()) {}

bool Uring::is_ours() const { return getpid() == process_; }

int Uring::open(int entries) {
  const int code = io_uring_queue_init(static_cast<unsigned>(entries), &ring_, 0);
  if (code != 0) return code;
  const int refusal = trial();
  if (refusal != 0) {
    io_uring_queue_exit(&ring_);
    return refusal;
  }
  make_tables();
  open_ = true;
  return 0;
}

int Uring::trial() {
  io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
  const bool usable = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_READ) && io_uring_opcode_supported(probe, IORING_OP_WRITE);
  if (probe != nullptr) io_uring_free_probe(probe);
  if (!usable) return -ENOSYS;
  // Sandboxes may allow a ring to be made and refuse its use.
  io_uring_prep_nop(io_uring_get_sqe(&ring_));
  const int submitted = io_uring_submit(&ring_);
  if (submitted != 1) return submitted < 0 ? submitted : -EPERM;
  io_uring_cqe* entry = nullptr;
  int code;
  do {
    code = io_uring_wait_cqe(&ring_, &entry);
  } while (code == -EINTR);
  if (code == 0) io_uring_cqe_seen(&ring_, entry);
  return code;
}

// Linux 5.19; without it nothing is ever registered.
void Uring::make_tables() {
  if (io_uring_register_files_sparse(&ring_, kKnownFiles) == 0) fill_descending(free_files_, kKnownFiles, 2);
  if (io_uring_register_buffers_sparse(&ring_, kKnownBuffers) == 0) fill_descending(free_buffers_, kKnownBuffers, 1);
}

void Uring::close() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!open_) return;
  io_uring_queue_exit(&ring_);
  open_ = false;
  pieces_.clear();
}

int Uring::flush() {
  int calls = 0;
  // What the kernel refuses or leaves here it does for the moment (a signal, no memory): it stays prepared until it is taken.
  for (; io_uring_sq_ready(&ring_) > 0; ++calls) {
    if (io_uring_submit(&ring_) < 0) std::this_thread::yield();
  }
  return calls;
}

int Uring::add_files(int cached_fd, int direct_fd) {
  if (!open_ || free_files_.empty()) return -1;
  const int index = free_files_.back();
  const int descriptors[] = {cached_fd, direct_fd};
  if (io_uring_register_files_update(&ring_, static_cast<unsigned>(index), descriptors, 2) != 2) return -1;
  free_files_.pop_back();
  return index;
}

void Uring::remove_files(int index) {
  if (!open_) return;
  const int none[] = {-1, -1};
  // A place that cannot be emptied is not used again.
  if (io_uring_register_files_update(&ring_, static_cast<unsigned>(index), none, 2) == 2) free_files_.push_back(index);
}

std::vector<int> Uring::add_buffer(char* data, int64_t bytes) {
  std::vector<int> indices;
  if (!open_ || data == nullptr) return indices;
  for (int64_t at = 0; at < bytes; at += kMaxChunkBytes) {
    iovec range{data + at, static_cast<size_t>(std::min(kMaxChunkBytes, bytes - at))};
    if (free_buffers_.empty() ||
        io_uring_register_buffers_update_tag(&ring_, static_cast<unsigned>(free_buffers_.back()), &range, nullptr, 1) != 1) {
      remove_buffers(indices);
      return {};
    }
    indices.push_back(free_buffers_.back());
    free_buffers_.pop_back();
    pieces_.push_back({data + at, data + at + range.iov_len, indices.back()});
  }
  return indices;
}

void Uring::remove_buffers(const std::vector<int>& indices) {
  if (!open_) return;
  for (int index : indices) {
    pieces_.erase(std::remove_if(pieces_.begin(), pieces_.end(), [index](const Piece& p) { return p.index == index; }), pieces_.end());
    iovec none{nullptr, 0};
    if (io_uring_register_buffers_update_tag(&ring_, static_cast<unsigned>(index), &none, nullptr, 1) == 1) free_buffers_.push_back(index);
  }
}

int Uring::find_buffer(const char* data, int64_t bytes) const {
  for (const Piece& piece : pieces_) {
    if (data >= piece.begin && data + bytes <= piece.end) return piece.index;
  }
  return -1;
}

UringMark::~UringMark() {
  if (!uring->is_ours()) return;
  const std::lock_guard<std::mutex> lock(uring->mutex);
  uring->remove_files(index);
}

UringBuffer::UringBuffer(std::shared_ptr<Uring> uring, char* data, int64_t bytes) : uring_(std::move(uring)) {
  if (!uring_->is_ours()) return;
  const std::lock_guard<std::mutex> lock(uring_->mutex);
  indices_ = uring_->add_buffer(data, bytes);
}

UringBuffer::~UringBuffer() {
  if (!uring_->is_ours()) return;
  const std::lock_guard<std::mutex> lock(uring_->mutex);
  uring_->remove_buffers(indices_);
}

}  // namespace ds::io

#endif
