// SPDX-License-Identifier: Apache-2.0
// Gradients from autograd's hooks to the fp32 slice each rank owns.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "optim/slice_rest.h"
#include "zero/bucket_arena.h"
#include "zero/host_sums.h"
#include "zero/param_store.h"

namespace ds::zero {

// Note [The life of a gradient]
// autograd finishes a parameter's gradient -> a C++ hook copies it into the flat's bucket and drops it -> when all of a
// flat's gradients are in (or backward is over: what is missing counts as zero) the bucket is reduce-scattered, in one
// static order -> the sink adds the ranks' contributions to my slice, in rank order, times post_scale, into the fp32
// accumulator, and takes its squared norm in the same pass.
// A `round` is one such pass over all flats; it ends with flush(). Gradients that come when their flat has been issued
// already in this round (a parameter used in several reentrant checkpoints), or while reduction is deferred (no_sync),
// wait in the flat's carry and join the next round.

struct ReducerOptions {
  std::optional<at::ScalarType> comm_dtype;   // default: the flat's own
  double pre_scale = 1.0;                     // applied when a gradient is copied into its bucket
  bool replicate_grads = false;               // stage 0: everybody needs all reduced gradients in the end
  std::shared_ptr<optim::SliceRest> rest;     // where the accumulators lie; null: memory
};

// The first bad value of a round, for the message about an overflow.
struct BadGradient {
  int param = -1;   // store index
  int rank = -1;    // who contributed it; -1 when the transport only delivers sums
};

class GradReducer {
 public:
  GradReducer(ParamStore& store, ReducerOptions options);
  GradReducer(const GradReducer&) = delete;

  // Called from the hooks, with the parameter's finished gradient.
  void on_grad(int param, const at::Tensor& grad);
  // Ends the round: issues whatever has not been issued and waits for all sinks. Nothing to do outside a round unless
  // `force` (a rank without data takes part with zeros).
  void flush(bool force = false);
  bool in_round() const { return in_round_; }
  // Forgets the round, with gradients that have not been added yet, on this rank alone: peers that are in it wait for it.
  void abandon();

  // While deferred, gradients go to the carry and nothing is communicated.
  void set_deferred(bool deferred) { deferred_ = deferred; }
  bool deferred() const { return deferred_; }
  bool has_carry() const;
  void flush_carry();

  // Collective, between steps: the type in which gradients travel from now on; none: each flat's own.
  void set_comm_dtype(std::optional<at::ScalarType> dtype);
  // Factor on the sum over ranks, for rounds begun from now on.
  void set_post_scale(double scale) { post_scale_ = scale; }
  // Why a backward may not start now ("" = it may); thrown from the first hook of the round.
  void set_refusal(std::string reason) { refusal_ = std::move(reason); }

  // ready(flat): while the rounds are final, a flat's sum is complete; changed(flat): it has been added to or edited after that. From any thread.
  using Listener = std::function<void(int flat)>;
  void set_listeners(Listener ready, Listener changed);
  // From now on, until zero(): the update follows when the round is over.
  void set_final(bool final) { final_ = final; }

  // Hybrid sharding: adds the slices of all replicas, in rank order. Once a step, when nobody holds a carry any more: what is
  // accumulated afterwards would be added to a sum that each replica has. Collective over all ranks; one replica: nothing to do.
  void add_replicas();
  // {sum of squares, number of non-finite values} of everybody's slices, and how many ranks hold a carry. Collective over
  // the ranks a flat is cut over.
  std::vector<double> reduce_stats();
  // After reduce_stats() at stage 0: makes the full gradients valid on every rank.
  void gather_grads();
  // Forgets the accumulated gradients.
  void zero();
  BadGradient find_bad() const { return bad_; }
  // Parameters (store indices) that got no gradient on this rank in the last round.
  const std::vector<int>& unused() const { return unused_; }
  // Trained parameters (store indices) that did not require a gradient in any round since zero(): they are not to be stepped.
  // The same on every rank that sets requires_grad alike. Valid after reduce_stats().
  std::vector<int> frozen() const;

  // The fp32 accumulator of a flat: my slice, or all of it with replicate_grads. Undefined before the first gradient.
  at::Tensor grad(int flat);
  at::Tensor grad_slice(int flat) { return flats_.at(flat).slice; }
  bool has_grad(int flat) const { return flats_.at(flat).has_grad; }
  // The caller has written into the accumulator: reduce_stats() takes the squared norm of my slice anew. Not collective.
  void mark_edited(int flat);
  void ensure_accumulators();
  // Every reduced gradient is ready (or zero) on this rank after this.
  void ensure_grads();
  int64_t accumulator_bytes() const;
  int64_t bucket_bytes() const { return arena_ ? arena_->bytes() : 0; }

 private:
  struct FlatState {
    bool trainable = false;
    at::ScalarType comm_dtype = at::kFloat;
    int order = -1;                 // place in the static order of issue
    std::vector<uint8_t> arrived;   // per slot, this round
    std::vector<uint8_t> awaited;   // per slot, this round: the parameter requires a gradient
    std::vector<uint8_t> required;  // per slot: awaited in some round since zero()
    int missing = 0;
    bool open = false;              // a bucket (region or spill) is being filled
    bool issued = false;            // this round
    Region region;
    at::Tensor bucket;              // [layout.numel()] in comm_dtype: a view of the region, or the spill itself
    std::shared_ptr<comm::ReduceWork> work;
    std::shared_ptr<comm::SymmetricBuffer> home;   // replicate_grads: full accumulator
    int64_t home_offset = 0;
    at::Tensor full, slice;         // fp32
    at::Tensor stats;               // double[2]
    bool has_grad = false;
    bool edited = false;            // stats no longer belong to slice
    bool told = false;              // that the sum is complete
    at::Tensor carry;               // fp32 [layout.numel()], defined while something waits
    double carry_scale = 1.0;       // the post_scale that belongs to the carry; the round it joins may have another
  };

  void begin_round();
  void note_required();
  void open_bucket(int flat);
  bool to_region(int flat);
  bool may_wait() const;
  void write_slot(int flat, int slot, const at::Tensor& grad);
  void add_to_carry(int flat, int slot, const at::Tensor& grad);
  void fill_missing(int flat);
  bool issue(int flat);
  void issue_ready();
  void sink(int flat, const void* const* srcs, int nsrc);
  void add(int flat, const void* const* srcs, int nsrc, double scale);
  void note_changed(int flat);
  void note_bad(int flat, const void* const* srcs, int nsrc);
  void finish_round();
  void leave(FlatState& s);

  ParamStore& store_;
  ReducerOptions options_;
  std::vector<FlatState> flats_;
  std::vector<int> order_;            // flats in order of issue
  size_t next_ = 0;                   // first of order_ not yet issued in this round
  std::unique_ptr<BucketArena> arena_;
  Listener on_ready_, on_changed_;
  bool final_ = false;
  bool in_round_ = false;
  std::atomic<int64_t> round_{0};     // how many have been abandoned: what comes of them later is not added
  bool flushing_ = false;
  bool deferred_ = false;
  double post_scale_ = 1.0;
  double round_scale_ = 1.0;
  std::string refusal_;
  BadGradient bad_;
  std::vector<int> unused_;
  std::recursive_mutex mutex_;        // hooks may come from several autograd threads
  std::unique_ptr<HostSums> host_sums_;   // accumulators on the host, gradients on a device; the last member: its thread uses the others
};

}  // namespace ds::zero
