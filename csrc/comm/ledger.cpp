// SPDX-License-Identifier: Apache-2.0
#include "comm/ledger.h"

#include <chrono>
#include <cstring>
#include <sstream>
#include <unordered_set>

namespace ds::comm {

const char* intern(const std::string& phase) {
  static std::mutex mutex;
  static auto* texts = new std::unordered_set<std::string>;  // never destroyed: tags may be read during process exit
  std::lock_guard<std::mutex> lock(mutex);
  return texts->insert(phase).first->c_str();
}

double wall_clock_s() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

Counter& Ledger::counter(const char* phase) {
  for (auto& p : phases_)
    if (p.name == phase) return p.counter;
  for (auto& p : phases_)
    if (std::strcmp(p.name, phase) == 0) return p.counter;
  phases_.push_back({phase, {}});
  return phases_.back().counter;
}

int64_t Ledger::begin(const char* kind, const Tag& tag, int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  Counter& c = counter(tag.phase);
  c.number += 1;
  c.bytes += bytes;
  const int64_t seq = ++last_;
  CollectiveRecord& r = ring_[seq % kKept];
  r.seq = seq;
  r.kind = kind;
  r.tag = tag;
  if (r.tag.bytes == 0) r.tag.bytes = bytes;
  r.start_s = wall_clock_s();
  r.end_s = 0;
  r.state = CollectiveState::Issued;
  return seq;
}

void Ledger::end(int64_t seq, CollectiveState state) {
  std::lock_guard<std::mutex> lock(mutex_);
  CollectiveRecord& r = ring_[seq % kKept];
  if (r.seq != seq) return;
  r.end_s = wall_clock_s();
  r.state = state;
}

CollectiveRecord Ledger::record(int64_t seq) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const CollectiveRecord& r = ring_[seq % kKept];
  return r.seq == seq ? r : CollectiveRecord{};
}

std::vector<CollectiveRecord> Ledger::recent() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<CollectiveRecord> out;
  for (int64_t seq = last_ > kKept ? last_ - kKept + 1 : 1; seq <= last_; ++seq) out.push_back(ring_[seq % kKept]);
  return out;
}

std::map<std::string, Counter> Ledger::counts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::map<std::string, Counter> out;
  for (const auto& p : phases_)
    if (p.counter.number != 0) out[p.name] = p.counter;
  return out;
}

void Ledger::reset_counts() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& p : phases_) p.counter = Counter{};
}

std::string describe(const CollectiveRecord& r) {
  std::ostringstream out;
  if (r.seq == 0) return "a collective older than the flight record";
  out << r.kind << " #" << r.seq << " (";
  if (r.tag.step >= 0) out << "step " << r.tag.step << ", ";
  if (r.tag.phase[0] != '\0') out << "phase " << r.tag.phase << ", ";
  if (r.tag.unit >= 0) out << "unit " << r.tag.unit << ", ";
  out << r.tag.bytes << " bytes)";
  return out.str();
}

}  // namespace ds::comm
