# SPDX-License-Identifier: Apache-2.0
"""A model whose parameters live in the C++ store: sharded or replicated, gathered before use, freed after.

Note [Who holds whom]: the engine holds a ManagedModel; parameters, module hooks and graphs refer to it weakly. When the engine goes,
replicated values stay with the parameters; sharded ones stay with the modules, which hold the ManagedModel from then on, as they do after
zero.Init: the next engine (callers evaluate with one and train with another) takes them over.
"""
import atexit
import itertools
import sys
import weakref

import torch

from deepspeed._native import lib
from deepspeed.zero.guard import guard_class
from deepspeed.zero.module_hooks import ModuleHooks
from deepspeed.zero.status import ZeroParamStatus, ZeroParamType
from deepspeed.zero.tiers import IN_MEMORY

_next_id = itertools.count()


@atexit.register
def _leave_memory_to_peers():
    if "deepspeed._C" in sys.modules:
        lib().set_exiting()


def _nowhere():
    return None


class ParamHome:
    """Where one parameter is managed; `parameter.ds_home`."""

    __slots__ = ("_owner", "index", "unit", "name", "__weakref__")

    def __init__(self, owner, index, unit, name):
        self._owner = weakref.ref(owner)
        self.index, self.unit, self.name = index, unit, name

    @property
    def owner(self):
        owner = self._owner()
        if owner is None or owner.closed:
            raise RuntimeError(f"parameter '{self.name}': its engine was destroyed, and its sharded values with it")
        return owner

    def __reduce__(self):
        return _nowhere, ()  # a pickled or copied parameter belongs to no engine

    @property
    def alive(self):
        owner = self._owner()
        return owner is not None and not owner.closed

    @property
    def in_forward(self):
        """Whether the model runs right now."""
        return self.owner.scheduler.in_forward

    @property
    def gathered(self):
        return self.owner.store.is_gathered(self.unit)

    def refuse(self, function):
        raise RuntimeError(f"{function} was called on parameter '{self.name}', which is sharded by ZeRO-3 and not gathered on this rank: "
                           f"wrap the access in `with deepspeed.zero.GatheredParameters([parameter]):` on all ranks")

    def gather_for_use(self, function):
        """An operation outside the hooks meets the freed parameter."""
        owner = self.owner
        if not owner.scheduler.in_forward:
            self.refuse(function)
        owner.scheduler.enter(self.unit)
        if self.unit not in owner.borrowed:
            owner.borrowed.append(self.unit)

    def watch(self, outputs):
        owner = self.owner
        if owner.hooks is not None:
            owner.hooks.watch_outputs([self.unit], [t for t in outputs if t.requires_grad])


def home_of(parameter):
    """The parameter's ParamHome while its manager is alive, else None."""
    home = getattr(parameter, "__dict__", {}).get("ds_home")
    return home if home is not None and home.alive else None


class ManagedModel:
    """The parameters of one model in one store."""

    def __init__(self, transports, device, shard_params, full_master=False, tiers=IN_MEMORY, split_master=False):
        self.transports = transports
        self.device = device
        self.tiers = tiers
        # One rank that has everything in memory owns it anyway: nothing to free, nothing to gather.
        self.shards_params = shard_params and (transports.shard.size > 1 or tiers.moves_parameters)
        self.sharded_api = shard_params
        self.store = lib().ParamStore(transports.world, transports.shard, transports.reduce, transports.replicate, str(device),
                                      self.shards_params, full_master, rest=tiers.rest, parameter_rest=tiers.parameter_rest,
                                      folder=tiers.parameter_folder, most_in_memory=tiers.parameters_in_memory, split_master=split_master)
        self.store.set_guard_classes(guard_class, ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE)
        self.scheduler = lib().UnitScheduler(self.store)
        self.reducer = None
        self.hooks = None
        self.optimizer = None
        self.params = []          # Python parameters by store index
        self.closed = False
        self.away = frozenset()   # kinds of states that the engine has put away (Note [Memory without values] in resting.py)
        self.resting = None       # the RestingStates that bring them back
        self.module_hooks = ModuleHooks(self)
        self.borrowed = []        # units that the running forward uses outside the modules they were planned for

    # ---- filling

    def add_unit(self, plan, dtype_of, trainable, keep_master, persistent_numel, broadcast=True, vacant=False, state_rests=True):
        """Collective. Moves the plan's parameters in. `dtype_of(p)`: what p shall become; `trainable(p)`: whether it is stepped; vacant:
        their values count for nothing (only where parameters are sharded); state_rests: masters, states and gradients rest where `tiers` say."""
        previous = [home_of(p) for p in plan.params]
        for home in filter(None, previous):
            home.owner.refuse_while_away("moving parameters to another engine", "lp_params", "hp_params")
            home.owner.store.gather(home.unit, "gather_move")
        from_store = all(previous) and bool(previous)
        persistent = self.shards_params and plan.numel <= persistent_numel
        first = len(self.params)
        for parameter in plan.params:
            if parameter.is_meta:
                raise RuntimeError(f"parameter '{plan.names[plan.params.index(parameter)]}' is on the meta device and has no values: "
                                   "materialise it, or build the model under deepspeed.zero.Init")
        unit = self.store.add_unit(plan.name, plan.params, plan.names, [trainable(p) for p in plan.params],
                                   [dtype_of(p) for p in plan.params], keep_master, broadcast and not from_store, persistent, vacant, state_rests)
        order = [slot[0] for flat in self.store.unit_flats(unit) for slot in self.store.flat_info(flat)["slots"]]
        # The store numbers parameters flat by flat; find each one's number by its name.
        number = {self.store.param_name(index): index for index in order}
        self.params.extend([None] * len(order))
        for owner in dict.fromkeys(home.owner for home in previous if home is not None):
            owner.transports.shard.barrier("moved")  # a peer may still be reading the slices that are dropped next
        for parameter, name, home in zip(plan.params, plan.names, previous):
            if home is not None:
                home.owner.forget(home, parameter)
            index = number[name]
            self.params[index] = parameter
            parameter.ds_home = ParamHome(self, index, unit, name)
        assert len(self.params) == first + len(plan.params)
        if self.sharded_api:
            self._describe_unit(unit, plan.params)
        return unit

    def _describe_unit(self, unit, params):
        """The ds_* attributes callers know, and the guard."""
        if self.shards_params:
            self.store.set_guard(unit, params)
        for parameter in params:
            if not hasattr(parameter, "ds_id"):
                parameter.ds_id = next(_next_id)
            parameter.ds_shape = torch.Size(parameter.shape)
            parameter.ds_numel = parameter.numel()
            parameter.ds_persist = not self.shards_params or self.store.is_persistent(unit)
            parameter.ds_param_type = ZeroParamType.PARTITIONED
            parameter.ds_process_group = None
            parameter.ds_secondary_tensor = None
            parameter.ds_active_sub_modules = set()
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            parameter.ds_tensor = self.local_slice(parameter)
            parameter.ds_tensor.ds_numel = parameter.ds_tensor.numel()
            parameter.ds_tensor.final_location = None
            _bind_methods(parameter)
        if self.shards_params:
            self.store.rebind(unit)

    def forget(self, home, parameter):
        """Another store takes the parameter over."""
        self.store.drop_param(home.index, parameter)
        self.params[home.index] = None
        if all(p is None for p in self.params):
            self.close()

    # ---- slices

    def place(self, parameter):
        """(flat, begin in the parameter, begin in my shard, numel) of this rank's slice."""
        home = parameter.ds_home
        _, flat, _ = self.store.param_place(home.index)
        begin, shard_begin, numel = self.store.slice_of(home.index, self.store.rank)
        return flat, begin, shard_begin, numel

    def local_slice(self, parameter):
        flat, _, begin, numel = self.place(parameter)
        return self.store.shard(flat).narrow(0, begin, numel)

    def gather_slices(self, parameter, mine):
        """Collective. The full flat tensor of which `mine` is this rank's slice (same dtype on all ranks)."""
        return self.store.gather_slices(parameter.ds_home.index, mine.detach())

    def leave_files(self):
        """What was read or written of state that rests in files takes no memory of this process any more."""
        if self.tiers.moves_parameters:
            self.store.leave_files()
        if self.tiers.rest is not None:
            self.tiers.rest.leave_all()

    def rests_elsewhere(self, tensor):
        """Whether it lies where the configuration says, not where the model runs."""
        return any(rest is not None and rest.holds(tensor) for rest in (self.tiers.rest, self.tiers.parameter_rest))

    # ---- states that are away

    def refuse_while_away(self, call, *kinds):
        """kinds: what the call reads or changes; none: all."""
        if self.away:
            text = self.refusal_while_away(call, *kinds)
            if text:
                raise RuntimeError(text)

    def refusal_while_away(self, call, *kinds):
        gone = sorted(self.away.intersection(kinds) if kinds else self.away)
        return f"{call}: {', '.join(gone)} are away since offload_states(): call reload_states() first" if gone else ""

    def put_away(self, kinds, resting, model):
        """`resting` is about to free states of these kinds. The weights of no part of the model can be saved or loaded then."""
        if self.optimizer is not None:
            self.optimizer.expect_step(False)
        self.away, self.resting = frozenset(kinds), resting
        if "lp_params" in kinds:
            self.module_hooks.guard_parts(model)

    def bring_home(self):
        """All values are back."""
        resting, self.resting, self.away = self.resting, None, frozenset()
        resting.drop()
        self.module_hooks.unguard_parts()

    def refuse_to_unfreeze(self, parameters):
        """Those that are frozen now have no place among gradients and masters: requiring a gradient later is an error."""
        for parameter in parameters:
            home = home_of(parameter)
            if home is not None and not parameter.requires_grad:
                self.store.stay_frozen(home.index)

    def watch_backward(self, reducer):
        """Connects autograd; `reducer` None: nothing is trained, but backward still needs gathered parameters."""
        self.reducer = reducer
        self.hooks = lib().AutogradHooks(self.store, reducer, self.scheduler)
        if reducer is not None:
            self.hooks.watch_parameters()

    # ---- end

    def settle(self, model):
        """The engine goes: what it did to the model comes off, and the model holds its sharded values itself. Not collective."""
        if self.closed:
            return
        if self.resting is not None:   # of an engine that was dropped; destroy() has brought them back on all ranks
            self.resting.bring_back(False)
            self.bring_home()
            self.store.publish_all()
        if not self.shards_params:
            self.close()
            return
        self.module_hooks.remove()
        if self.hooks is not None:
            self.hooks.close()
        self.hooks = self.reducer = self.optimizer = self.module_hooks.plan = None
        self._let_go()
        self.store.drop_masters()
        self.store.trim_pool()
        hold_by_modules(self, model)

    def _let_go(self):
        for unit in range(self.store.units):
            while self.store.pins(unit):
                self.store.unpin(unit)
        self.store.release_all()

    def close(self):
        """Takes everything off the model. Sharded values are gone after this; replicated ones stay in place."""
        if self.closed:
            return
        self.closed = True
        self.module_hooks.remove()
        if self.hooks is not None:
            self.hooks.close()
        self.hooks = self.reducer = None
        if self.shards_params:
            self._let_go()
        self.store.clear_guards()
        self.params = []

    def __del__(self):
        if not getattr(self, "closed", True):
            try:
                self.close()
            except Exception:  # the interpreter may be half gone; nothing is lost that still had an owner
                pass


def hold_by_modules(managed, model):
    """As long as one of the modules lives, the shards of all do."""
    for module in model.modules():
        if any(p is not None and home_of(p) is not None and home_of(p).owner is managed for p in module._parameters.values()):
            module.__dict__["_ds_zero_owner"] = managed


def _bind_methods(parameter):
    from deepspeed.zero import param_methods
    param_methods.bind(parameter)
