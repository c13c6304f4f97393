// SPDX-License-Identifier: Apache-2.0
// When units are gathered and freed during a forward and a backward.
#pragma once

#include <cstdint>
#include <vector>

#include "zero/param_store.h"

namespace ds::zero {

// Note [The same list on every rank]
// Where the carrier needs all ranks to gather in one order (needs_matching_order), a forward gathers every unit in
// ascending order and a backward in descending order, whether this rank uses it or not: entering a unit first starts
// all units that come before it. A unit that several modules share (tied weights) would break that order at its second
// use: it stays gathered to the end of the forward, is the first to be gathered in backward, and stays to its end. Other
// units that are entered again, or out of order, are gathered once more; every rank that runs the same code does the
// same. A carrier that pulls (shared memory) skips all of that.
class UnitScheduler {
 public:
  explicit UnitScheduler(ParamStore& store);

  // More than one module uses the unit. The same calls on every rank.
  void share(int unit);

  // A forward of the outermost module begins / ends. Ends are safe to repeat.
  void begin_forward();
  void end_forward();
  // Before / after a module that uses the unit runs.
  void enter(int unit);
  void leave(int unit);

  void begin_backward();
  void enter_backward(int unit);
  void leave_backward(int unit);
  // Before this rank waits for its last reductions: starts what its backward has not used. A rank whose graph did would wait for
  // these gathers, and this rank for that one's reductions.
  void start_rest();
  void end_backward();

  // The running backward builds a graph of its own (create_graph), whose nodes need the weights too: units stay gathered until
  // a backward that builds none ends, or until drop_kept().
  void keep();
  void drop_kept();
  bool in_forward() const { return forward_depth_ > 0; }

  // A rank without data follows the others: gathers and frees what a forward and a backward would.
  void shadow_forward();
  void shadow_backward();

 private:
  bool sharded(int unit) const;
  bool held(int unit) const;      // shared, and the carrier wants one order
  void start_up_to(int unit);     // ascending
  void start_down_to(int unit);   // descending
  void use(int unit, const char* phase);

  ParamStore& store_;
  bool matching_ = false;
  int forward_depth_ = 0;
  int forward_next_ = 0;          // first unit the running forward has not started
  int backward_next_ = -1;        // last unit the running backward has not started
  bool in_backward_ = false;
  bool keep_ = false;
  bool keep_asked_ = false;       // by the running backward
  std::vector<uint8_t> entered_;  // used since the pass began
  std::vector<uint8_t> shared_;   // by unit; shorter than the list of units: the rest is not
};

}  // namespace ds::zero
