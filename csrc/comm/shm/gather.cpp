// SPDX-License-Identifier: Apache-2.0
// Gathers: each rank copies what it needs out of its peers' memory, when it waits for it.
#include "base/error.h"
#include "comm/checks.h"
#include "comm/shm/transport.h"

namespace ds::comm::shm {
namespace {

class Published : public Condition {
 public:
  Published(const ShmBuffer& buffer, uint64_t epoch) : Condition(buffer.core()->size), buffer_(buffer), epoch_(epoch) {}
  bool waits_for(int r) const override { return r != buffer_.core()->rank && buffer_.epoch_of(r) < epoch_; }

 private:
  const ShmBuffer& buffer_;
  const uint64_t epoch_;
};

class ShmGather : public Work {
 public:
  ShmGather(std::shared_ptr<ShmTransport> transport, std::shared_ptr<ShmBuffer> src, std::vector<GatherPiece> pieces,
            size_t offset, size_t stride, int64_t seq)
      : transport_(std::move(transport)), src_(std::move(src)), pieces_(std::move(pieces)), offset_(offset), stride_(stride),
        seq_(seq), epoch_(static_cast<uint64_t>(src_->epoch())) {}

  bool test() override {
    if (!transport_) return true;
    transport_->progress();
    if (!Published(*src_, epoch_).ready()) return false;
    copy();
    return true;
  }

  void wait() override {
    if (!transport_) return;
    Published published(*src_, epoch_);
    if (!published.ready()) transport_->wait_until(published, seq_);
    copy();
  }

 private:
  void copy() {
    check();
    for (const GatherPiece& piece : pieces_)
      src_->copy_from(piece.rank, piece.out, offset_ + static_cast<size_t>(piece.rank) * stride_ + piece.offset, piece.bytes);
    check();  // again: what was rewritten while we read would otherwise go unnoticed
    transport_->end(seq_);
    transport_.reset();
    src_.reset();
  }

  void check() {
    for (int r = 0; r < transport_->size(); ++r) {
      const uint64_t theirs = r == transport_->rank() ? epoch_ : src_->epoch_of(r);
      if ((theirs & ~kReleased) == epoch_) continue;  // released or not, it holds what I need until I release it too
      const std::string who = "rank " + std::to_string(r);
      transport_->fail(seq_, (theirs & kReleased) != 0 ? who + " released a buffer that rank " + std::to_string(transport_->rank()) +
                                                       " is gathering from"
                                                 : who + " published a buffer " + std::to_string(theirs) + " times before rank " +
                                                       std::to_string(transport_->rank()) + " had gathered version " +
                                                       std::to_string(epoch_));
    }
  }

  std::shared_ptr<ShmTransport> transport_;  // reset when done
  std::shared_ptr<ShmBuffer> src_;
  const std::vector<GatherPiece> pieces_;
  const size_t offset_;
  const size_t stride_;
  const int64_t seq_;
  const uint64_t epoch_;
};

}  // namespace

std::shared_ptr<Work> ShmTransport::all_gather(void* out, SymmetricBuffer& src, size_t src_offset, size_t src_stride,
                                               size_t bytes, const Tag& tag) {
  std::vector<GatherPiece> pieces(size_);
  for (int r = 0; r < size_; ++r) pieces[r] = {static_cast<char*>(out) + static_cast<size_t>(r) * bytes, r, 0, bytes};
  return all_gather_pieces(std::move(pieces), src, src_offset, src_stride, bytes, tag);
}

std::shared_ptr<Work> ShmTransport::all_gather_pieces(std::vector<GatherPiece> pieces, SymmetricBuffer& src, size_t src_offset,
                                                      size_t src_stride, size_t bytes, const Tag& tag) {
  check_gather(src, src_offset, src_stride, bytes, size_);
  check_pieces(pieces, bytes, size_);
  auto mine = own_buffer(src, "all_gather");
  const int64_t seq = ledger_->begin("all_gather", tag, static_cast<int64_t>(bytes) * size_, /*ordered=*/false);
  progress();
  return std::make_shared<ShmGather>(std::static_pointer_cast<ShmTransport>(shared_from_this()), std::move(mine), std::move(pieces),
                                     src_offset, src_stride, seq);
}

}  // namespace ds::comm::shm
