// SPDX-License-Identifier: Apache-2.0
#include "host_cuda/grid.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host_cuda {
namespace {

constexpr size_t kStackBytes = 256 << 10;

// AddressSanitizer is told on which stack things go on.
#ifdef __SANITIZE_ADDRESS__
void start_switch_fiber(void** fake, const void* to, size_t bytes) { __sanitizer_start_switch_fiber(fake, to, bytes); }
void finish_switch_fiber(void* fake, const void** from, size_t* bytes) { __sanitizer_finish_switch_fiber(fake, from, bytes); }
#else
void start_switch_fiber(void**, const void*, size_t) {}
void finish_switch_fiber(void*, const void**, size_t*) {}
#endif

// One flow of control with a stack of its own. It is entered by ucontext once; from then on one jumps, which takes no system call.
class Fiber {
 public:
  // The flow that runs this; has no stack of its own.
  Fiber() = default;
  // Runs `entry`, which must not return, at the first switch to it.
  explicit Fiber(void (*entry)()) {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, entry, 0);
  }
  ~Fiber() {
    if (stack_ != nullptr) munmap(stack_, kStackBytes);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  static void change(Fiber& from, Fiber& to) {
    start_switch_fiber(&from.fake_stack_, to.stack_ == nullptr ? host_stack : to.stack_, to.stack_ == nullptr ? host_bytes : kStackBytes);
    if (_setjmp(from.place_) != 0) return finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
    if (to.entered_ || to.stack_ == nullptr) _longjmp(to.place_, 1);
    to.entered_ = true;
    setcontext(&to.context_);
  }
  // The first thing that `entry` does.
  static void entered() { finish_switch_fiber(nullptr, &host_stack, &host_bytes); }

 private:
  static const void* host_stack;  // as AddressSanitizer knows it
  static size_t host_bytes;
  void* stack_ = nullptr;
  void* fake_stack_ = nullptr;
  bool entered_ = false;
  ucontext_t context_;
  jmp_buf place_;
};

const void* Fiber::host_stack = nullptr;
size_t Fiber::host_bytes = 0;

Order chosen = Order::Ascending;
std::mt19937 dice;
unsigned most_blocks = 0;

void arrange(std::vector<unsigned>& order) {
  if (chosen == Order::Random) std::shuffle(order.begin(), order.end(), dice);
}
std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (chosen == Order::Descending) std::reverse(order.begin(), order.end());
  return order;
}

enum class State { Ready, AtBlock, AtWarp, Done };

struct Thread {
  State state = State::Ready;
  unsigned turns = 0;  // exchanges so far: two sets of places take turns
  unsigned mask = 0;
};

class Block {
 public:
  Block(unsigned threads, const std::function<void()>& body)
      : body_(body), threads_(threads), left_(2 * threads), warps_(in_order(threads / kLanes)), lanes_(in_order(kLanes)) {}

  void run();
  void wait(State state) {
    threads_[running_].state = state;
    Fiber::change(*fibers[running_], scheduler);
  }
  uint64_t exchange(unsigned mask, uint64_t bits, int from) {
    Thread& me = threads_[running_];
    const size_t side = me.turns++ % 2 * threads_.size();
    left_[side + running_] = bits;
    me.mask = mask;
    wait(State::AtWarp);
    return left_[side + running_ / kLanes * kLanes + static_cast<size_t>(from)];
  }
  size_t running() const { return running_; }

 private:
  static void live();
  void resume(size_t thread);
  bool release_warp(size_t warp);
  bool run_warp(size_t warp);
  bool release_block();
  [[noreturn]] void fail(const std::string& what) const;

  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  std::vector<uint64_t> left_;
  std::vector<unsigned> warps_, lanes_;  // in the order in which they go on
  size_t running_ = 0;

  static Fiber scheduler;
  static std::vector<std::unique_ptr<Fiber>> fibers;  // one a thread of a block, for all blocks that come
};

Fiber Block::scheduler;
std::vector<std::unique_ptr<Fiber>> Block::fibers;

Block* current = nullptr;

void Block::live() {
  Fiber::entered();
  for (;;) {
    current->body_();
    current->wait(State::Done);
  }
}

void Block::resume(size_t thread) {
  running_ = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  Fiber::change(scheduler, *fibers[thread]);
}

void Block::fail(const std::string& what) const {
  std::ostringstream message;
  message << what << " in block " << blockIdx.x << ":";
  for (size_t begin = 0; begin < threads_.size();) {
    size_t end = begin;
    while (end < threads_.size() && threads_[end].state == threads_[begin].state) ++end;
    const char* const names[] = {"could go on", "wait for the block", "wait for their warp", "are done"};
    message << " threads " << begin << "-" << end - 1 << " " << names[static_cast<int>(threads_[begin].state)] << ";";
    begin = end;
  }
  fibers.clear();  // some are in the midst of a kernel
  throw std::logic_error(message.str());
}

bool Block::release_warp(size_t warp) {
  const auto begin = threads_.begin() + static_cast<std::ptrdiff_t>(warp * kLanes), end = begin + kLanes;
  const auto waits = [](const Thread& t) { return t.state == State::AtWarp; };
  if (std::none_of(begin, end, waits)) return false;
  if (std::any_of(begin, end, [](const Thread& t) { return t.state == State::Done; })) fail("a warp exchanges values after lanes of it have left");
  if (!std::all_of(begin, end, waits)) return false;
  const auto differs = [&](const Thread& t) { return t.mask != 0xffffffffu || t.turns != begin->turns; };
  if (std::any_of(begin, end, differs)) fail("a warp's mask leaves lanes out");
  std::for_each(begin, end, [](Thread& t) { t.state = State::Ready; });
  return true;
}

// Up to where it waits for the block: as far ahead of the others as a warp can get.
bool Block::run_warp(size_t warp) {
  bool moved = false;
  do {
    arrange(lanes_);
    for (unsigned lane : lanes_) {
      if (threads_[warp * kLanes + lane].state != State::Ready) continue;
      resume(warp * kLanes + lane);
      moved = true;
    }
  } while (release_warp(warp));
  return moved;
}

// As the hardware does it: whoever has left is not waited for.
bool Block::release_block() {
  const auto is_there = [](const Thread& t) { return t.state == State::AtBlock || t.state == State::Done; };
  if (!std::all_of(threads_.begin(), threads_.end(), is_there)) return false;
  bool any = false;
  for (Thread& t : threads_) {
    if (t.state != State::AtBlock) continue;
    t.state = State::Ready;
    any = true;
  }
  return any;
}

void Block::run() {
  while (fibers.size() < threads_.size()) fibers.push_back(std::make_unique<Fiber>(&Block::live));
  const auto is_done = [](const Thread& t) { return t.state == State::Done; };
  while (!std::all_of(threads_.begin(), threads_.end(), is_done)) {
    arrange(warps_);
    bool moved = false;
    for (unsigned warp : warps_) moved = run_warp(warp) || moved;
    if (!release_block() && !moved) fail("no thread can go on");
  }
}

}  // namespace

void set_order(Order order, uint32_t seed) {
  chosen = order;
  dice.seed(seed);
}

void limit_grid(unsigned blocks) { most_blocks = blocks; }

void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  if (grid.y * grid.z * block.y * block.z != 1 || block.x % kLanes != 0 || block.x == 0 || block.x > 1024 || grid.x == 0) {
    throw std::logic_error("a grid is one row of blocks, a block one row of whole warps");
  }
  if (most_blocks > 0) grid.x = std::min(grid.x, most_blocks);
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> blocks = in_order(grid.x);
  arrange(blocks);
  for (unsigned b : blocks) {
    blockIdx = {b, 0, 0};
    Block one(block.x, body);
    current = &one;
    one.run();
  }
}

int lane() { return static_cast<int>(threadIdx.x % kLanes); }
void wait_for_block() { current->wait(State::AtBlock); }
uint64_t exchange_bits(unsigned mask, uint64_t bits, int from) { return current->exchange(mask, bits, from); }

}  // namespace host_cuda
