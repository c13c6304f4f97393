// SPDX-License-Identifier: Apache-2.0
// Where parameters live: units of flats, sharded or replicated, gathered before use and freed after.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/transport.h"
#include "optim/slice_rest.h"
#include "optim/staging_ring.h"
#include "plan/layout.h"
#include "plan/resting.h"
#include "platform/worker.h"
#include "zero/buffer_pool.h"

namespace ds::zero {

// Note [A parameter's storage]
// Every managed parameter keeps one StorageImpl for life. Gathering points it into the unit's full buffer, freeing
// points it at nothing; sizes and strides never change. Views that autograd saved share the StorageImpl, so they come
// back with the next gather. Nobody but ParamStore::bind touches these pointers.
// A tensor that a user takes out of a GatheredParameters block (on CPU `p.detach().cpu()` is one) shares the StorageImpl too
// and may be read any time later. So at the end of such a block the StorageImpl stays with them, and the parameter gets a
// new one.

struct Param {
  at::Tensor tensor;
  std::string name;
  int flat = -1;
  int slot = -1;
  std::vector<int64_t> sizes, strides;   // strides: empty when contiguous
  bool dropped = false;   // taken over by another store (the module was wrapped again)
  bool stays_frozen = false;   // to be trained as its optimizer sees it, but it was frozen when the engine was built
  uint32_t version = 0;   // of the tensor, when its values were last in step with the shard and the master
};

enum class UnitState { Sharded, Gathering, Gathered };

struct Flat {
  int unit = -1;
  at::ScalarType dtype = at::kFloat;
  bool trainable = false;
  plan::FlatLayout layout;
  std::vector<int> params;                           // one per slot
  std::shared_ptr<comm::SymmetricBuffer> home;       // sharded: holds my shard; replicated: holds the full flat
  int64_t home_offset_bytes = 0;
  at::Tensor shard;                                  // my part, [shard_numel], a view of home
  at::Tensor full;                                   // [world * shard_numel]; undefined while freed
  at::Tensor master;                                 // fp32 or split (int16), my part (or all, full_master), when more exact than the shard
  at::Tensor buffer;                                 // pool memory behind `full` (sharded stores only)
  bool state_rests = false;                          // its master, states and gradient slice rest where the options say
  std::shared_ptr<comm::Work> gathering;
};

struct Unit {
  std::string name;
  std::vector<int> flats;
  UnitState state = UnitState::Sharded;
  bool persistent = false;      // small enough to stay gathered for ever
  bool held_for_backward = false;
  int pins = 0;                 // GatheredParameters blocks that hold it open
  int alive_params = 0;
};

struct UnitRequest {
  std::string name;
  std::vector<at::Tensor> params;
  std::vector<std::string> names;
  std::vector<bool> trainable;
  std::vector<at::ScalarType> dtypes;   // what each parameter shall become
  bool keep_master = false;             // derive an fp32 master from the original values of trainable parameters
  bool broadcast = true;                // rank 0's values win; false when all ranks hold the same already
  bool persistent = false;
  bool state_rests = true;              // where the store has a rest for masters, states and gradient slices of this unit
  bool vacant = false;                  // the values are nobody's: somebody fills the shards later; nothing is copied or sent
};

struct StoreOptions {
  bool shard_params = false;
  bool full_master = false;      // masters cover the whole flat: every rank steps everything (stage 0)
  int64_t align_numel = 64;
  std::shared_ptr<optim::SliceRest> rest;   // where masters, optimizer states and gradient slices lie; null: memory of the device
  std::shared_ptr<optim::SliceRest> parameter_rest;   // where shards lie that the carrier cannot gather from; null: in homes
  std::string folder;            // where parameters rest in files; empty: memory
  int64_t most_in_memory = 0;    // with a folder: elements of this rank's parameters that rest in memory all the same
  bool split_master = false;     // masters of bfloat16 parameters are their low bits (optim/split_master.h), beside the weights at rest
};

// Bytes this rank holds now: parameters at rest (shards, or all of them when replicated), masters, and the buffers of gathered
// units, free ones included.
struct StoreBytes {
  int64_t parameters = 0;
  int64_t parameters_in_files = 0;   // of these
  int64_t master_weights = 0;
  int64_t gathered_units = 0;
};

// Which ranks share what: `world` is everyone who must agree, `shard` the ranks a flat is cut over, `replicate` the
// ranks that hold the same shard (null when there is just one). `reduce` joins the ranks of `shard` once more where the
// carrier demands one order for all collectives: gradients may finish in another order on another rank, gathers do not.
struct Groups {
  std::shared_ptr<comm::Transport> world;
  std::shared_ptr<comm::Transport> shard;
  std::shared_ptr<comm::Transport> reduce;
  std::shared_ptr<comm::Transport> replicate;
};

class ParamStore {
 public:
  // Called with a unit whose parameters became usable (true) or unusable (false), possibly from an autograd thread.
  using BindCallback = std::function<void(int unit, bool available)>;

  ParamStore(Groups groups, at::Device device, StoreOptions options);

  // Collective. Moves the parameters into the store and returns the unit's index. The parameters' own memory is
  // released as they are moved; never more than one unit exists twice.
  int add_unit(UnitRequest request);

  // Makes the unit's parameters usable. With `prefetch` it only starts the transfer.
  void gather(int unit, const char* phase, bool prefetch = false);
  // Frees a gathered unit unless it is persistent, pinned or replicated. With `part_from_holders`, tensors that share a
  // parameter's memory keep it, with the values it has now (see the Note); otherwise they lose it until the next gather.
  void release(int unit, bool part_from_holders = false);
  void release_all();
  // Parameters whose `.data` somebody has set to a tensor of his own point into the unit again; with `keep` the new values come
  // with them. Throws, after repairing all, when one had another shape.
  bool take_replaced(int unit, bool keep);
  void pin(int unit) { ++units_.at(unit).pins; }
  void unpin(int unit);

  // Collective over the shard group: rank `src`'s full values of this gathered unit become everyone's.
  void broadcast_full(int unit, int src);
  // Collective. Copies the full values of a gathered unit into my shard (and master), and tells the peers.
  void write_back(int unit);
  // Throws, naming the parameter, when somebody has given one data of another shape, or trains one that stays_frozen.
  void check_params() const;
  bool requires_grad(int param) const { return !params_[param].dropped && params_[param].tensor.requires_grad(); }
  // Between reduction and update: what take_replaced finds in gathered units counts, and so do values written in place (as
  // load_state_dict does) since the last update. Local. Writing through `.data` leaves no trace and is not seen. Whether there was any.
  bool adopt_written();
  // What has been written so far is in the shards and masters already.
  void forget_written();
  // The master of a flat, from its own values.
  void make_master(int flat);
  // The pages of parameters in files leave this process's memory.
  void leave_files();
  // Parameters in files: starts to read what gather(unit) will need.
  void expect(int unit);
  bool in_file(int flat) const;
  // The shard lies on the host and full parameters do not.
  bool shard_apart(int flat) const { return options_.parameter_rest && !flats_.at(flat).home; }
  // After my shards changed: makes them visible to the peers, then refreshes every unit that stays gathered.
  void publish_all();
  void refresh_full();

  // Collective over the shard group: the parameter's full flat values, of which `mine` is this rank's slice.
  at::Tensor gather_slices(int param, const at::Tensor& mine);

  // Takes a parameter out; the unit's memory goes when the last has left.
  void drop_param(int param);

  const Groups& groups() const { return groups_; }
  const StoreOptions& options() const { return options_; }
  at::Device device() const { return device_; }
  std::vector<Unit>& units() { return units_; }
  std::vector<Flat>& flats() { return flats_; }
  std::vector<Param>& params() { return params_; }
  int world() const { return groups_.shard->size(); }
  int rank() const { return groups_.shard->rank(); }
  void set_bind_callback(BindCallback callback) { on_bind_ = std::move(callback); }
  void set_step(int64_t step) { step_ = step; }
  comm::Tag tag(const char* phase, int unit, int64_t bytes) const { return {step_, phase, unit, bytes}; }
  int64_t gathered_bytes() const;
  StoreBytes bytes() const;
  BufferPool& pool() { return pool_; }
  // Bump allocation out of shared chunks, so that few collective allocations are needed.
  std::pair<std::shared_ptr<comm::SymmetricBuffer>, int64_t> allocate_home(int64_t bytes, const std::string& folder = {});

 private:
  int add_flat(int unit, const UnitRequest& request, const std::vector<int>& members);
  void clear_padding(Flat& flat);
  void fill_flat(Flat& flat, const UnitRequest& request, const std::vector<int>& members);
  void adopt_params(Flat& flat);
  void adopt_param(Flat& flat, Param& p);
  void bind(Unit& unit, bool available);
  void copy_back(Unit& unit);
  bool is_split(const Flat& flat) const;
  at::Tensor mine_of(const Flat& flat, const at::Tensor& full) const;   // my part of values of all of the flat
  at::Tensor master_of(const Flat& flat, const at::Tensor& values);
  void start_gather(Flat& flat, const char* phase, const std::shared_ptr<c10::Event>& free_since);
  std::shared_ptr<comm::Work> start_upload(Flat& flat, const std::shared_ptr<c10::Event>& free_since);
  void leave_file(Flat& flat);
  bool in_file(const Flat& flat) const;
  void adopt_values(Flat& flat, Param& p);
  void part_from_holders(Unit& unit);
  void finish_gather(Unit& unit);

  Groups groups_;
  at::Device device_;
  StoreOptions options_;
  BufferPool pool_;
  std::vector<Unit> units_;
  std::vector<Flat> flats_;
  std::vector<Param> params_;
  struct Chunk {
    std::shared_ptr<comm::SymmetricBuffer> buffer;
    int64_t used_bytes = 0;
  };
  Chunk memory_chunk_, file_chunk_;
  plan::MemoryQuota in_memory_;   // of parameters whose homes are in files
  std::unique_ptr<optim::StagingRing> uploads_;   // of shards that lie on the host
  std::optional<c10::Stream> upload_stream_;      // on an accelerator
  BindCallback on_bind_;
  int64_t step_ = 0;
  platform::Worker uploader_;                     // the last member: its tasks use the others
};

}  // namespace ds::zero
