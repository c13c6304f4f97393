// SPDX-License-Identifier: Apache-2.0
// CUDA ranks over the group's own collectives, on one communication stream of ours.
//
// Note [Streams]. At issue an event of the caller's current stream makes the communication stream wait: whatever the caller
// enqueued into the source is seen. The collective is launched synchronously in c10d's sense (asyncOp = false), that is on
// the stream that is current, ours. wait() makes the caller's then-current stream wait for the work's event; the host never
// blocks. A work that is dropped does the same in its destructor, so the allocator may reuse the memory right after.
// Temporaries are allocated and freed with the communication stream current, hence reused in its order: no record_stream.
//
// Streams and events are c10's device-generic ones: this file needs no CUDA toolkit.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "comm/c10d_transport.h"
#include "comm/checks.h"
#include "comm/device_memory.h"
#include "comm/ledger.h"
#include "comm/stream_work.h"

namespace ds::comm {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::F32: return at::kFloat;
    case DType::F16: return at::kHalf;
    case DType::BF16: return at::kBFloat16;
    case DType::F64: return at::kDouble;
    case DType::I64: return at::kLong;
    case DType::I32: return at::kInt;
    case DType::I16: return at::kShort;
    case DType::I8: return at::kChar;
    case DType::U8: return at::kByte;
    case DType::BOOL: return at::kBool;
  }
  DS_FAIL("reduce_scatter: not a DType: " << static_cast<int>(dtype));
}

class NcclTransport : public C10dTransport {
 public:
  NcclTransport(c10::intrusive_ptr<c10d::ProcessGroup> pg, at::Device device, at::Device host_device, int64_t id,
                std::vector<Peer> peers, const Options& options)
      : C10dTransport(std::move(pg), device, host_device, id, std::move(peers), options),
        memory_(device),
        stream_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, /*isHighPriority=*/true)) {}

  const char* name() const override { return "nccl"; }

  std::shared_ptr<SymmetricBuffer> make_buffer(size_t bytes, const std::string& folder) override { return memory_.allocate(bytes, folder); }

  std::shared_ptr<Work> all_gather(void* out, SymmetricBuffer& src, size_t offset, size_t stride, size_t bytes,
                                   const Tag& tag) override {
    return gather(out, {}, src, offset, stride, bytes, tag);
  }

  std::shared_ptr<Work> all_gather_pieces(std::vector<GatherPiece> pieces, SymmetricBuffer& src, size_t offset, size_t stride,
                                          size_t bytes, const Tag& tag) override {
    return gather(nullptr, std::move(pieces), src, offset, stride, bytes, tag);
  }

  std::shared_ptr<ReduceWork> reduce_scatter(SymmetricBuffer& bucket, size_t offset, size_t part_bytes, int channel, DType dtype,
                                             ReduceSink sink, const Tag& tag) override {
    check_reduce(bucket, offset, part_bytes, channel, options_.max_channels, dtype, size_);
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    const int64_t seq = ledger_->begin("reduce_scatter", tag, static_cast<int64_t>(part_bytes) * size_);
    auto work = std::make_shared<StreamWork>(torch_device_, bucket.shared_from_this());
    after_current_stream(stream_);
    {
      c10::StreamGuard guard(stream_);
      at::Tensor sum = at::empty({static_cast<int64_t>(part_bytes)}, at::TensorOptions().dtype(at::kByte).device(torch_device_));
      if (part_bytes != 0) {
        at::Tensor output = sum.view(scalar_type(dtype));
        at::Tensor input = view(static_cast<char*>(bucket.data()) + offset, part_bytes * size_).view(scalar_type(dtype));
        c10d::ReduceScatterOptions options;
        options.asyncOp = false;
        launch([&] { return pg_->_reduce_scatter_base(output, input, options); }, seq);
      }
      work->mark_read(stream_);
      const void* src = sum.data_ptr();
      sink(&src, 1);
      work->mark_reached(stream_);
    }
    ledger_->end(seq);
    return work;
  }

  void broadcast(void* data, size_t bytes, int src, const Tag& tag) override {
    DS_CHECK_VALUE(src >= 0 && src < size_, "broadcast: source rank " << src << " of " << size_);
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    const int64_t seq = ledger_->begin("broadcast", tag, static_cast<int64_t>(bytes));
    StreamWork work(torch_device_, nullptr);
    after_current_stream(stream_);
    {
      c10::StreamGuard guard(stream_);
      if (bytes != 0) {
        std::vector<at::Tensor> tensors{view(data, bytes)};
        c10d::BroadcastOptions options;
        options.rootRank = src;
        options.asyncOp = false;
        launch([&] { return pg_->broadcast(tensors, options); }, seq);
      }
      work.mark_reached(stream_);
    }
    work.wait();
    ledger_->end(seq);
  }

 private:
  at::Tensor view(void* data, size_t bytes) { return byte_view(data, bytes, torch_device_, nullptr); }

  // c10d's wait on the communication stream: orders that stream, not the host, after NCCL's.
  template <class Launch>
  void launch(const Launch& call, int64_t seq) {
    try {
      if (auto work = call()) work->wait();
    } catch (const c10::Error& error) {
      carrier_failed(seq, error.what_without_backtrace());
    }
  }

  // With pieces: into a temporary, then piece by piece on the communication stream. Without: straight into `out`.
  std::shared_ptr<Work> gather(void* out, const std::vector<GatherPiece>& pieces, SymmetricBuffer& src, size_t offset,
                               size_t stride, size_t bytes, const Tag& tag) {
    check_gather(src, offset, stride, bytes, size_);
    check_pieces(pieces, bytes, size_);
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    const int64_t seq = ledger_->begin("all_gather", tag, static_cast<int64_t>(bytes) * size_);
    auto work = std::make_shared<StreamWork>(torch_device_, src.shared_from_this());
    char* own = static_cast<char*>(src.data()) + offset + rank_ * stride;
    after_current_stream(stream_);
    {
      c10::StreamGuard guard(stream_);
      at::Tensor all = out != nullptr ? view(out, bytes * size_)
                                      : at::empty({static_cast<int64_t>(bytes) * size_},
                                                  at::TensorOptions().dtype(at::kByte).device(torch_device_));
      if (bytes != 0) {
        at::Tensor input = view(own, bytes);
        c10d::AllgatherOptions options;
        options.asyncOp = false;
        launch([&] { return pg_->_allgather_base(all, input, options); }, seq);
      }
      work->mark_read(stream_);
      for (const auto& piece : pieces) {
        const char* from = static_cast<const char*>(all.data_ptr()) + piece.rank * bytes + piece.offset;
        const bool in_place = piece.rank == rank_ && piece.out == own + piece.offset;
        if (!in_place) memory_.copy(piece.out, from, piece.bytes);
      }
      work->mark_reached(stream_);
    }
    ledger_->end(seq);
    return work;
  }

  DeviceMemory memory_;
  const c10::Stream stream_;
};

}  // namespace

std::shared_ptr<Transport> make_nccl_transport(c10::intrusive_ptr<c10d::ProcessGroup> pg, at::Device device,
                                               at::Device host_device, int64_t id, std::vector<Peer> peers,
                                               const Options& options) {
  return std::make_shared<NcclTransport>(std::move(pg), device, host_device, id, std::move(peers), options);
}

}  // namespace ds::comm
