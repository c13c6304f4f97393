// SPDX-License-Identifier: Apache-2.0
#include "zero/unit_scheduler.h"

#include <algorithm>

namespace ds::zero {
namespace {
constexpr const char* kForward = "gather_forward";
constexpr const char* kBackward = "gather_backward";
}  // namespace

UnitScheduler::UnitScheduler(ParamStore& store) : store_(store) {
  matching_ = store.groups().shard->needs_matching_order() && store.world() > 1;
}

bool UnitScheduler::sharded(int unit) const {
  const Unit& u = store_.units()[unit];
  return store_.options().shard_params && !u.persistent && u.alive_params > 0;
}

bool UnitScheduler::held(int unit) const {
  return matching_ && static_cast<size_t>(unit) < shared_.size() && shared_[unit] != 0;
}

void UnitScheduler::share(int unit) {
  if (shared_.size() <= static_cast<size_t>(unit)) shared_.resize(unit + 1, 0);
  shared_[unit] = 1;
}

void UnitScheduler::begin_forward() {
  if (forward_depth_++ > 0) return;
  forward_next_ = 0;
  entered_.assign(store_.units().size(), 0);
}

void UnitScheduler::end_forward() {
  if (forward_depth_ == 0 || --forward_depth_ > 0) return;
  if (matching_ && !in_backward_) start_up_to(static_cast<int>(store_.units().size()) - 1);
  for (size_t u = 0; u < store_.units().size(); ++u) leave(static_cast<int>(u));
}

// Starts every unit that comes before `unit`, and frees those this rank does not use: their transfer was for the others.
void UnitScheduler::start_up_to(int unit) {
  for (; forward_next_ <= unit; ++forward_next_) {
    const int u = forward_next_;
    if (!sharded(u)) continue;
    store_.gather(u, kForward, /*prefetch=*/true);
    if (u < unit && !(static_cast<size_t>(u) < entered_.size() && entered_[u])) leave(u);
  }
}

void UnitScheduler::start_down_to(int unit) {
  for (; backward_next_ >= unit; --backward_next_) {
    const int u = backward_next_;
    if (!sharded(u) || held(u)) continue;
    store_.gather(u, kBackward, /*prefetch=*/true);
    if (u > unit) leave_backward(u);
  }
}

void UnitScheduler::use(int unit, const char* phase) {
  store_.gather(unit, phase);
  if (static_cast<size_t>(unit) < entered_.size()) entered_[unit] = 1;
}

void UnitScheduler::enter(int unit) {
  if (!sharded(unit) || store_.units()[unit].state == UnitState::Gathered) return;
  const bool ordered = matching_ && forward_depth_ > 0 && !in_backward_ && unit >= forward_next_;
  if (ordered) start_up_to(unit);
  use(unit, kForward);
  // Start the next one while this one computes.
  int next = unit + 1;
  while (next < static_cast<int>(store_.units().size()) && !sharded(next)) ++next;
  // In backward this is a part that is computed again: what follows it has been used already.
  if (next < static_cast<int>(store_.units().size()) && !in_backward_) store_.expect(next);
  if (!matching_ || in_backward_) return;
  if (next < static_cast<int>(store_.units().size()) && next == std::max(forward_next_, next) && forward_depth_ > 0) {
    store_.gather(next, kForward, /*prefetch=*/true);
    forward_next_ = next + 1;
  }
}

void UnitScheduler::leave(int unit) {
  const Unit& u = store_.units()[unit];
  if (keep_) return;
  if (!u.held_for_backward && !(forward_depth_ > 0 && held(unit))) store_.release(unit);
}

void UnitScheduler::begin_backward() {
  if (in_backward_) return;
  in_backward_ = true;
  backward_next_ = static_cast<int>(store_.units().size()) - 1;
  for (int u = backward_next_; u >= 0; --u) {
    if (!sharded(u) || !held(u)) continue;
    store_.gather(u, kBackward, /*prefetch=*/true);
    store_.units()[u].held_for_backward = true;
  }
}

void UnitScheduler::enter_backward(int unit) {
  if (!sharded(unit)) return;
  if (matching_ && in_backward_ && unit <= backward_next_ && !held(unit)) start_down_to(unit);
  store_.gather(unit, kBackward);
  store_.units()[unit].held_for_backward = true;
  int next = unit - 1;
  while (next >= 0 && (!sharded(next) || held(next))) --next;
  if (next >= 0) store_.expect(next);
  if (!matching_ || !in_backward_ || held(unit)) return;
  if (next >= 0 && next <= backward_next_) {
    store_.gather(next, kBackward, /*prefetch=*/true);
    backward_next_ = next - 1;
  }
}

void UnitScheduler::leave_backward(int unit) {
  if (keep_ || (in_backward_ && held(unit))) return;
  store_.units()[unit].held_for_backward = false;
  store_.release(unit);
}

void UnitScheduler::start_rest() {
  if (!matching_ || !in_backward_) return;
  for (; backward_next_ >= 0; --backward_next_) {
    if (sharded(backward_next_) && !held(backward_next_)) store_.gather(backward_next_, kBackward, /*prefetch=*/true);
  }
}

void UnitScheduler::end_backward() {
  if (matching_ && in_backward_) start_down_to(0);
  in_backward_ = false;
  forward_depth_ = 0;
  if (keep_asked_) {
    keep_asked_ = false;
    return;
  }
  drop_kept();
}

void UnitScheduler::keep() { keep_ = keep_asked_ = true; }

void UnitScheduler::drop_kept() {
  keep_ = false;
  store_.release_all();
}

void UnitScheduler::shadow_forward() {
  begin_forward();
  end_forward();
}

void UnitScheduler::shadow_backward() {
  begin_backward();
  end_backward();
}

}  // namespace ds::zero
