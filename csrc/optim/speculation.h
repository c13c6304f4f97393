// SPDX-License-Identifier: Apache-2.0
// Updates that are computed while backward still runs.
//
// Note [Speculative updates]
// A slice could be updated as soon as its gradient is final. But only the norm of all gradients says by which factor they are clipped, and whether
// the step is skipped. So the update is computed beside backward with the factor that is foreseen, into second places (see SliceRest): weights and
// states keep their values. The step then compares: where factor, hyperparameters, gradient, weights and states are still those the update was computed
// from, places are exchanged; elsewhere the result is forgotten and the slice updated as ever. Either way the bits are those of a step after backward,
// and nobody sees a new value before the step. (Speculation, then validation: X. Lian et al., SuperOffload, 2025.)
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "optim/hyper.h"
#include "platform/worker.h"

namespace ds::optim {

// A step as it is foreseen.
struct Foreseen {
  std::vector<Hyper> groups;
  float grad_scale = 1.0f;
};

class Speculation {
 public:
  // A slice whose gradient is final.
  struct Ready {
    size_t slice;
    at::Tensor grad;
  };
  // Computes what slices become, on a thread of the Speculation: all that have become ready while it was at the ones before.
  using Work = std::function<void(const std::vector<Ready>&, const Foreseen&)>;

  explicit Speculation(Work work) : work_(std::move(work)) {}

  // Forgets what came before.
  void foresee(Foreseen step);
  void drop();
  bool active() const;

  // The result holds as long as nobody writes to `sources` or the gradient through torch, and until it is revoked. Nothing happens while no step is
  // foreseen. From any thread.
  void begin(const Ready& ready, std::vector<at::Tensor> sources);
  void revoke(size_t slice);

  // Returns when what has begun is computed; throws what the work has thrown.
  void wait() { worker_.drain(); }
  // Waits for what has begun, and tells for which slices the results hold if the step is this one. Nothing is foreseen any more. Throws what the
  // work has thrown.
  std::vector<size_t> settle(const std::vector<Hyper>& groups, float grad_scale);

 private:
  struct Begun {
    std::vector<at::Tensor> sources;
    std::vector<uint32_t> versions;
  };
  void work();

  const Work work_;
  mutable std::mutex mutex_;
  std::shared_ptr<const Foreseen> step_;   // null: none
  std::vector<Ready> ready_;   // those whose work has not begun
  std::map<size_t, Begun> begun_;
  platform::Worker worker_;   // the last member: its tasks use the others
};

}  // namespace ds::optim
