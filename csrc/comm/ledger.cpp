// SPDX-License-Identifier: Apache-2.0
#include "comm/ledger.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <unordered_set>
#include <utility>

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

int64_t Ledger::begin(const char* kind, const Tag& tag, int64_t bytes, bool ordered) {
  std::lock_guard<std::mutex> lock(mutex_);
  Counter& c = counter(tag.phase);
  c.number += 1;
  c.bytes += bytes;
  const int64_t seq = ++last_;
  CollectiveRecord& r = ring_[seq % kKept];
  r.seq = seq;
  r.order = ordered ? ++last_order_ : 0;
  r.kind = kind;
  r.tag = tag;
  if (r.tag.bytes == 0) r.tag.bytes = bytes;
  r.start_s = wall_clock_s();
  r.end_s = r.waited_s = 0;
  r.state = CollectiveState::Issued;
  return seq;
}

void Ledger::end(int64_t seq, CollectiveState state) {
  std::lock_guard<std::mutex> lock(mutex_);
  CollectiveRecord& r = ring_[seq % kKept];
  if (r.seq != seq) return;
  if (r.state != CollectiveState::Issued) return;  // a failure is told by every frame it passes
  r.end_s = wall_clock_s();
  r.state = state;
  ++ended_;
  if (tallying_) tally(r);
  if (trace_.size() < trace_limit_) trace_.push_back(r);
}

void Ledger::tally(const CollectiveRecord& r) {
  const double seconds = r.end_s - r.start_s;
  const Tally none{r.kind, r.tag.phase, r.tag.bytes, 0, 0, seconds, seconds, 0};
  Tally& t = tallies_.try_emplace({r.kind, r.tag.phase, r.tag.bytes}, none).first->second;
  ++t.number;
  t.seconds += seconds;
  t.shortest_s = std::min(t.shortest_s, seconds);
  t.longest_s = std::max(t.longest_s, seconds);
  t.waited_s += r.waited_s;
}

void Ledger::keep_tallies(bool on) {
  std::lock_guard<std::mutex> lock(mutex_);
  tallying_ = on;
  tallies_.clear();
}

std::vector<Tally> Ledger::tallies() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Tally> out;
  for (const auto& entry : tallies_) out.push_back(entry.second);
  return out;
}

void Ledger::keep_trace(size_t limit) {
  std::lock_guard<std::mutex> lock(mutex_);
  trace_limit_ = limit;
  trace_.clear();
}

std::vector<CollectiveRecord> Ledger::take_trace() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(trace_, {});
}

Ledger::Blocked::Blocked(Ledger& ledger, int64_t seq) : ledger_(ledger), seq_(seq), since_s_(wall_clock_s()) {
  std::lock_guard<std::mutex> lock(ledger_.mutex_);
  ledger_.blocked_.emplace_back(seq_, since_s_);
}

Ledger::Blocked::~Blocked() {
  std::lock_guard<std::mutex> lock(ledger_.mutex_);
  CollectiveRecord& r = ledger_.ring_[seq_ % kKept];
  if (r.seq == seq_) r.waited_s += wall_clock_s() - since_s_;
  auto& all = ledger_.blocked_;
  const auto mine = std::find(all.begin(), all.end(), std::make_pair(seq_, since_s_));
  if (mine != all.end()) all.erase(mine);
}

std::vector<BlockedIn> Ledger::blocked() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<BlockedIn> out;
  for (const auto& [seq, since_s] : blocked_) {
    const CollectiveRecord& r = ring_[seq % kKept];
    if (r.seq == seq) out.push_back({r, since_s});
  }
  return out;
}

int64_t Ledger::events() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return last_ + ended_;
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
