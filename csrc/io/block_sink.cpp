// SPDX-License-Identifier: Apache-2.0
#include "io/block_sink.h"

#include <algorithm>
#include <utility>

#include "io/crc32c.h"
#include "platform/memory.h"

namespace ds::io {
namespace {

class SumSink final : public BlockSink {
 public:
  explicit SumSink(int64_t block_bytes) : BlockSink(block_bytes) {}

 private:
  uint32_t take(const char* data, int64_t bytes, uint32_t sum) override { return crc32c(data, static_cast<size_t>(bytes), sum); }
};

class DirectSink final : public BlockSink {
 public:
  DirectSink(FileEngine& engine, std::shared_ptr<EngineFile> file, int64_t block_bytes, int64_t buffers)
      : BlockSink(block_bytes), engine_(engine), file_(std::move(file)), memory_(static_cast<size_t>(buffers * block_bytes)),
        under_way_(static_cast<size_t>(buffers)) {}

  ~DirectSink() override {
    for (const auto& request : under_way_) {
      if (!request) continue;
      try {
        request->wait();
      } catch (const Error&) {   // drain() was not reached: the error that stopped it is the one that counts
      }
    }
  }

 private:
  uint32_t take(const char* data, int64_t bytes, uint32_t sum) override {
    std::shared_ptr<Request>& before = under_way_[slot_];
    if (filled_ == 0 && before) {
      before->wait();
      before.reset();
    }
    return crc32c_copy(block() + filled_, data, static_cast<size_t>(bytes), sum);
  }

  void end_block() override {
    under_way_[slot_] = engine_.write(file_, at_, block(), filled_);
    slot_ = (slot_ + 1) % under_way_.size();
  }

  void drain() override {
    for (auto& request : under_way_) {
      if (request) request->wait();
      request.reset();
    }
  }

  char* block() { return static_cast<char*>(memory_.data()) + static_cast<int64_t>(slot_) * block_bytes_; }

  FileEngine& engine_;
  const std::shared_ptr<EngineFile> file_;
  platform::Buffer memory_;
  std::vector<std::shared_ptr<Request>> under_way_;   // by slot
  size_t slot_ = 0;
};

// Note [Write, then sum]: the system's copy brings a window of the caller's memory into the nearer cache, where summing it costs a
// third of what it costs from memory. Windows begin at multiples of their size, so that no page is written twice.
class CachedSink final : public BlockSink {
 public:
  CachedSink(std::shared_ptr<EngineFile> file, int64_t block_bytes) : BlockSink(block_bytes), file_(std::move(file)), window_(kWindowBytes) {}

 private:
  static constexpr int64_t kWindowBytes = 256 << 10, kWorthACallBytes = 64 << 10;

  uint32_t take(const char* data, int64_t bytes, uint32_t sum) override {
    while (bytes > 0) {
      const int64_t n = std::min(bytes, kWindowBytes - (written_ + staged_) % kWindowBytes);
      if (staged_ == 0 && n >= kWorthACallBytes) {
        file_->file().write(data, static_cast<size_t>(n), written_);
        written_ += n;
        sum = crc32c(data, static_cast<size_t>(n), sum);
      } else {
        sum = crc32c_copy(static_cast<char*>(window_.data()) + staged_, data, static_cast<size_t>(n), sum);
        staged_ += n;
        if ((written_ + staged_) % kWindowBytes == 0) drain();
      }
      data += n;
      bytes -= n;
    }
    return sum;
  }

  void drain() override {
    if (staged_ == 0) return;
    file_->file().write(window_.data(), static_cast<size_t>(staged_), written_);
    written_ += staged_;
    staged_ = 0;
  }

  const std::shared_ptr<EngineFile> file_;
  platform::Buffer window_;   // of pieces too small for a call of their own
  int64_t written_ = 0, staged_ = 0;
};

}  // namespace

void BlockSink::write(const char* data, int64_t bytes) {
  while (bytes > 0) {
    const int64_t n = std::min(bytes, block_bytes_ - filled_);
    sum_ = take(data, n, sum_);
    filled_ += n;
    data += n;
    bytes -= n;
    if (filled_ == block_bytes_) close_block();
  }
}

void BlockSink::close_block() {
  sums_.push_back(sum_);
  end_block();
  at_ += filled_;
  filled_ = 0;
  sum_ = 0;
}

std::vector<uint32_t> BlockSink::finish() {
  if (filled_ > 0) close_block();
  drain();
  return std::move(sums_);
}

std::unique_ptr<BlockSink> make_sum_sink(int64_t block_bytes) { return std::make_unique<SumSink>(block_bytes); }

std::unique_ptr<BlockSink> make_direct_sink(FileEngine& engine, std::shared_ptr<EngineFile> file, int64_t block_bytes, int64_t buffers) {
  return std::make_unique<DirectSink>(engine, std::move(file), block_bytes, buffers);
}

std::unique_ptr<BlockSink> make_cached_sink(std::shared_ptr<EngineFile> file, int64_t block_bytes) {
  return std::make_unique<CachedSink>(std::move(file), block_bytes);
}

}  // namespace ds::io
