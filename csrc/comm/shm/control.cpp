// SPDX-License-Identifier: Apache-2.0
#include "comm/shm/control.h"

#include <algorithm>
#include <cstring>

namespace ds::comm::shm {
namespace {

template <size_t n>
void put_text(std::atomic<uint64_t> (&words)[n], const char* text) {
  char bytes[n * 8] = {};
  std::strncpy(bytes, text, sizeof(bytes) - 1);
  for (size_t i = 0; i < n; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * i, 8);
    words[i].store(word, std::memory_order_relaxed);
  }
}

template <size_t n>
std::string get_text(const std::atomic<uint64_t> (&words)[n]) {
  char bytes[n * 8 + 1] = {};
  for (size_t i = 0; i < n; ++i) {
    const uint64_t word = words[i].load(std::memory_order_relaxed);
    std::memcpy(bytes + 8 * i, &word, 8);
  }
  return bytes;
}

}  // namespace

void show_activity(ControlBlock& own, const CollectiveRecord& record, bool blocked) {
  Activity& a = own.activity;
  const auto relaxed = std::memory_order_relaxed;
  a.seq.store(static_cast<uint64_t>(record.seq), relaxed);
  a.step.store(record.tag.step, relaxed);
  a.unit.store(record.tag.unit, relaxed);
  a.bytes.store(record.tag.bytes, relaxed);
  put_text(a.kind, record.kind);
  put_text(a.phase, record.tag.phase);
  a.blocked.store(blocked ? 1 : 0, relaxed);
}

std::string read_activity(const ControlBlock& peer) {
  const Activity& a = peer.activity;
  const auto relaxed = std::memory_order_relaxed;
  if (a.seq.load(relaxed) == 0) return "has not been in a collective yet";
  const std::string kind = get_text(a.kind), phase = get_text(a.phase);
  CollectiveRecord record;
  record.seq = static_cast<int64_t>(a.seq.load(relaxed));
  record.kind = kind.c_str();
  record.tag = {a.step.load(relaxed), phase.c_str(), static_cast<int>(a.unit.load(relaxed)), a.bytes.load(relaxed)};
  const bool blocked = a.blocked.load(relaxed) != 0;
  return (blocked ? "waits in " : "is not waiting; its last wait was for ") + describe(record);
}

}  // namespace ds::comm::shm
