// SPDX-License-Identifier: Apache-2.0
#include "comm/transport.h"

#include <algorithm>
#include <mutex>

#include "base/error.h"
#include "comm/ledger.h"
#include "comm/registry.h"

namespace ds::comm {

Transport::Transport(int rank, int size, int64_t id, Device device, const Options& options)
    : rank_(rank), size_(size), id_(id), device_(device), options_(options), ledger_(std::make_unique<Ledger>()) {
  DS_CHECK_VALUE(options.max_channels >= 1 && options.max_channels <= kMaxChannels,
                 "max_channels must be in [1, " << kMaxChannels << "], got " << options.max_channels);
  DS_CHECK_VALUE(options.timeout_s > 0, "timeout_s must be positive, got " << options.timeout_s);
}

Transport::~Transport() = default;

Counter Transport::count(const std::string& phase) const {
  const auto all = ledger_->counts();
  const auto found = all.find(phase);
  return found == all.end() ? Counter{} : found->second;
}

std::map<std::string, Counter> Transport::counts() const { return ledger_->counts(); }
void Transport::reset_counts() { ledger_->reset_counts(); }
std::vector<CollectiveRecord> Transport::recent() const { return ledger_->recent(); }

void Transport::progress_all() {
  for (const auto& transport : Registry::all())
    transport->progress();
}

// ---- registry ------------------------------------------------------------------------------------------------------

namespace {
struct Entries {
  std::mutex mutex;
  std::vector<std::weak_ptr<Transport>> live;
};
Entries& entries() {
  static auto* all = new Entries;  // never destroyed: transports may outlive static destruction
  return *all;
}
}  // namespace

void Registry::add(const std::shared_ptr<Transport>& transport) {
  std::lock_guard<std::mutex> lock(entries().mutex);
  auto& live = entries().live;
  live.erase(std::remove_if(live.begin(), live.end(), [](const auto& w) { return w.expired(); }), live.end());
  live.push_back(transport);
}

std::vector<std::shared_ptr<Transport>> Registry::all() {
  std::lock_guard<std::mutex> lock(entries().mutex);
  std::vector<std::shared_ptr<Transport>> out;
  for (const auto& weak : entries().live)
    if (auto transport = weak.lock()) out.push_back(std::move(transport));
  return out;
}

}  // namespace ds::comm
