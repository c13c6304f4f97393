// SPDX-License-Identifier: Apache-2.0
// The words ranks watch in each other's memory: the head of every rank's heap.
//
// Note [Single writer]. Every word of a rank's block is written by that rank alone, except `bell`, which its peers ring.
// A reduction s of a channel is offered by posted >= s and read by done >= s: a rank's sink reads all ranks at once, so one
// counter tells each of the others that its bucket s has been read by this rank.
//
// Note [Bell]. A rank that blocks raises `sleepers`, reads `bell`, looks once more at what it waits for and sleeps while the
// bell has that value. A rank that changes a word looks at everybody's `sleepers` afterwards. Sequentially consistent fences
// on both sides make one of them see the other.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "comm/ledger.h"
#include "comm/registry.h"

namespace ds::comm::shm {

inline constexpr uint64_t kMagic = 0x314d484353440aULL;
inline constexpr int kRing = 64;            // reductions of one channel that may be offered and not yet read by all
inline constexpr int kMaxBuffers = 1024;    // live at a time
inline constexpr size_t kRoundBytes = size_t{256} << 10;
inline constexpr size_t kTokenBytes = 16;

// An offered reduction: where my parts start in my heap.
struct Offer {
  uint64_t buffer;  // the buffer's id, the same on all ranks
  uint64_t offset;  // in the buffer
  uint64_t part_bytes;
  uint64_t dtype;
};

struct Channel {
  alignas(64) std::atomic<uint64_t> posted;
  alignas(64) std::atomic<uint64_t> done;
  alignas(64) Offer ring[kRing];
};

// Small collectives go in rounds. A rank enters round s + 2 only after everybody has posted s + 1, that is, has read s: two
// places suffice.
struct Round {
  uint64_t kind;
  uint64_t bytes;
};

// What the rank does, for the others' stall messages. Relaxed words: a torn reading is only an odd message.
struct Activity {
  std::atomic<uint64_t> seq;
  std::atomic<int64_t> step;
  std::atomic<int64_t> unit;
  std::atomic<int64_t> bytes;
  std::atomic<uint64_t> blocked;  // 1 while it waits in this collective
  std::atomic<uint64_t> kind[3];
  std::atomic<uint64_t> phase[4];
};

enum class RankState : uint32_t { Open, Closed, Failed };

// Epoch of a buffer in its place, with the place's generation: a place is reused when its buffer is gone. A released buffer
// keeps its last epoch, beside a flag.
struct Place {
  alignas(64) std::atomic<uint64_t> word;
};
inline constexpr uint64_t kEpochBits = 40;
inline constexpr uint64_t kReleased = uint64_t{1} << (kEpochBits - 1);
inline constexpr uint64_t kGone = (uint64_t{1} << kEpochBits) - 1;  // released, and the place has a new owner
inline uint64_t place_word(uint64_t generation, uint64_t epoch) { return generation << kEpochBits | epoch; }

struct ControlBlock {
  uint64_t magic;
  uint8_t token[kTokenBytes];
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleepers;
  alignas(64) std::atomic<uint32_t> state;  // RankState
  char reason[256];                         // written before state becomes Failed
  alignas(64) Activity activity;
  alignas(64) std::atomic<uint64_t> round;
  Round rounds[2];
  Channel channels[kMaxChannels];
  Place places[kMaxBuffers];
  alignas(4096) char round_data[2][kRoundBytes];
};

// The block as this process sees it, its own or a peer's.
void show_activity(ControlBlock& own, const CollectiveRecord& record, bool blocked);
std::string read_activity(const ControlBlock& peer);  // "waits in all_gather #3 (...)" or "is not in a collective; its last was ..."

}  // namespace ds::comm::shm
