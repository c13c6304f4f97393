// SPDX-License-Identifier: Apache-2.0
// The io_uring backend. Callers and the reaper fill the submission side under one mutex; only the reaper, a thread that sleeps
// in the kernel, takes completions. At most queue_depth chunks are in flight, so neither ring can overflow.
#include "io/chunk.h"

#ifdef DS_WITH_URING

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "io/kernel_order.h"
#include "io/uring.h"

namespace ds::io {
namespace {

constexpr unsigned kReapedAtOnce = 64;

class UringEngine final : public FileEngine {
 public:
  explicit UringEngine(const EngineOptions& options) : FileEngine(options), uring_(std::make_shared<Uring>()) {}

  // 0 or a negated errno.
  int start_ring() {
    const int code = uring_->open(options_.queue_depth + 1);  // + 1: the stop signal
    if (code == 0) reaper_ = std::thread([this] { reap(); });
    return code;
  }

  ~UringEngine() override {
    if (!reaper_.joinable()) return;
    if (forked()) {
      reaper_.detach();  // it is in another process, and so is what the ring has under way
      return;
    }
    {
      std::unique_lock<std::mutex> lock(uring_->mutex);
      idle_.wait(lock, [this] { return in_flight_ == 0 && queue_.empty(); });
      io_uring_sqe* entry = io_uring_get_sqe(uring_->ring());
      io_uring_prep_nop(entry);
      io_uring_sqe_set_data(entry, nullptr);
      uring_->flush();
    }
    reaper_.join();
    uring_->close();
  }

  const char* name() const override { return "io_uring"; }

  std::unique_ptr<KnownBuffer> register_buffer(void* data, int64_t bytes) override {
    return std::make_unique<UringBuffer>(uring_, static_cast<char*>(data), bytes);
  }

  EngineCounts counts() const override {
    const std::lock_guard<std::mutex> lock(uring_->mutex);
    return counts_;
  }

 protected:
  void submit(const std::vector<std::shared_ptr<Request>>& requests) override {
    const std::lock_guard<std::mutex> lock(uring_->mutex);
    for (const auto& request : requests) queue_.push(request, options_);
    fill();
  }

  std::unique_ptr<FileMark> mark(const EngineFile& file) const override {
    const std::lock_guard<std::mutex> lock(uring_->mutex);
    const int index = uring_->add_files(file.file().fd(), file.direct_fd());
    return index < 0 ? nullptr : std::make_unique<UringMark>(uring_, index);
  }

 private:
  // From here to reap(): the mutex is held.
  void fill() {
    const bool may_begin = options_.overlap || in_flight_ == 0;
    while (may_begin && in_flight_ < options_.queue_depth && !queue_.empty()) {
      issue(new Chunk(queue_.pop()));
      ++in_flight_;
      if (options_.single_submit) counts_.system_calls += uring_->flush();
    }
    counts_.system_calls += uring_->flush();
  }

  // Files and buffers are looked up here and not earlier: what is registered cannot go before the kernel has the entry, because
  // that takes the mutex, too.
  void issue(Chunk* chunk) {
    io_uring_sqe* entry = io_uring_get_sqe(uring_->ring());  // never null: the ring is as deep as in_flight_ can get
    const auto bytes = static_cast<unsigned>(faults_ ? faults_->issue(*chunk) : chunk->bytes);
    const auto offset = static_cast<uint64_t>(chunk->offset);
    const auto* mark = static_cast<const UringMark*>(chunk->file().mark());
    const bool known_file = mark != nullptr && mark->uring == uring_;
    const int fd = known_file ? mark->index + (chunk->direct ? 1 : 0) : chunk->fd();
    const int buffer = uring_->find_buffer(chunk->data, chunk->bytes);
    if (buffer >= 0) {
      (chunk->is_write() ? io_uring_prep_write_fixed(entry, fd, chunk->data, bytes, offset, buffer)
                         : io_uring_prep_read_fixed(entry, fd, chunk->data, bytes, offset, buffer));
    } else if (chunk->is_write()) {
      io_uring_prep_write(entry, fd, chunk->data, bytes, offset);
    } else {
      io_uring_prep_read(entry, fd, chunk->data, bytes, offset);
    }
    if (known_file) io_uring_sqe_set_flags(entry, IOSQE_FIXED_FILE);
    io_uring_sqe_set_data(entry, chunk);
    given_to_kernel(chunk);
    ++counts_.chunks;
    counts_.known_buffer += buffer >= 0;
    counts_.known_file += known_file;
  }

  void settle(Chunk* chunk, int64_t result, std::vector<std::unique_ptr<Chunk>>& finished) {
    if (chunk->complete(result)) {
      --in_flight_;
      finished.emplace_back(chunk);
    } else {
      issue(chunk);
    }
  }

  void reap() {
    std::vector<std::pair<Chunk*, int64_t>> answers;
    std::vector<std::unique_ptr<Chunk>> finished;
    bool stop = false;
    while (!stop) {
      stop = take_answers(answers);
      {
        const std::lock_guard<std::mutex> lock(uring_->mutex);
        for (const auto& [chunk, result] : answers) settle(chunk, result, finished);
        fill();
        if (in_flight_ == 0) idle_.notify_all();
      }
      finished.clear();  // without the mutex: this may drop the last reference to a file
    }
  }

  // True: the stop signal was among them, which comes last.
  bool take_answers(std::vector<std::pair<Chunk*, int64_t>>& answers) {
    answers.clear();
    io_uring_cqe* entries[kReapedAtOnce];
    if (io_uring_wait_cqe(uring_->ring(), entries) != 0) return false;  // interrupted by a signal
    const unsigned count = io_uring_peek_batch_cqe(uring_->ring(), entries, kReapedAtOnce);
    bool stop = false;
    for (unsigned i = 0; i < count; ++i) {
      auto* chunk = static_cast<Chunk*>(io_uring_cqe_get_data(entries[i]));
      if (chunk == nullptr) stop = true;
      else answers.emplace_back(chunk, entries[i]->res);
    }
    io_uring_cq_advance(uring_->ring(), count);
    for (const auto& [chunk, result] : answers) {
      taken_back(chunk);
      if (result > 0) kernel_accessed(chunk->data, static_cast<size_t>(result), /*wrote=*/!chunk->is_write());
    }
    if (faults_) {
      for (auto& [chunk, result] : answers) result = faults_->answer(*chunk, result);
    }
    return stop;
  }

  const std::shared_ptr<Uring> uring_;
  std::condition_variable idle_;
  ChunkQueue queue_;
  int in_flight_ = 0;
  EngineCounts counts_;
  std::thread reaper_;
};

}  // namespace

std::unique_ptr<FileEngine> make_uring_engine(const EngineOptions& options) {
  auto engine = std::make_unique<UringEngine>(options);
  if (engine->start_ring() != 0) return nullptr;
  return engine;
}

}  // namespace ds::io

#else

namespace ds::io {
std::unique_ptr<FileEngine> make_uring_engine(const EngineOptions&) { return nullptr; }
}  // namespace ds::io

#endif
