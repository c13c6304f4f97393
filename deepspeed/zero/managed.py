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
from deepspeed.zero import borders
from deepspeed.zero.guard import guard_class, is_guarded
from deepspeed.zero.status import ZeroParamStatus, ZeroParamType
from deepspeed.zero.tensors import attributes_with_graph, tensors_in

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


class _Hook:
    """A hook on a module, for as long as its ManagedModel lives. Copies and pickles of the module carry one that does nothing."""

    def __init__(self, owner=None, body=None):
        self._owner = weakref.ref(owner) if owner is not None else None
        self._body = body

    @borders.not_in_graphs
    def __call__(self, *args):
        owner = self._owner() if self._owner is not None else None
        if owner is not None and not owner.closed:
            self._body(owner, *args)

    def __reduce__(self):
        return _Hook, ()


def home_of(parameter):
    """The parameter's ParamHome while its manager is alive, else None."""
    home = getattr(parameter, "__dict__", {}).get("ds_home")
    return home if home is not None and home.alive else None


class ManagedModel:
    """The parameters of one model in one store."""

    def __init__(self, transports, device, shard_params, full_master=False):
        self.transports = transports
        self.device = device
        # One rank owns everything anyway: nothing to free, nothing to gather.
        self.shards_params = shard_params and transports.shard.size > 1
        self.sharded_api = shard_params
        self.store = lib().ParamStore(transports.world, transports.shard, transports.reduce, transports.replicate, str(device),
                                      self.shards_params, full_master)
        self.store.set_guard_classes(guard_class, ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE)
        self.scheduler = lib().UnitScheduler(self.store)
        self.reducer = None
        self.hooks = None
        self.params = []          # Python parameters by store index
        self.closed = False
        self.hooked_modules = 0   # that a unit is gathered for
        self.away = frozenset()   # kinds of states that the engine has put away (Note [Memory without values] in resting.py)
        self.resting = None       # the RestingStates that bring them back
        self._away_handles = []
        self._handles = []
        self.borrowed = []        # units that the running forward uses outside the modules they were planned for

    # ---- filling

    def add_unit(self, plan, dtype_of, trainable, keep_master, persistent_numel, broadcast=True, vacant=False):
        """Collective. Moves the plan's parameters in. `dtype_of(p)`: what p shall become; `trainable(p)`: whether it is stepped; vacant:
        their values count for nothing (only where parameters are sharded)."""
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
                                   [dtype_of(p) for p in plan.params], keep_master, broadcast and not from_store, persistent, vacant)
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

    # ---- hooks on modules

    def install_unit_hooks(self, plan, units):
        """Gathers units before the modules that use them run, and frees them after."""
        self._reinstall = (plan, units)
        enter, leave, done = {}, {}, {}
        modules = {}
        index_of = {id(p): unit for unit, u in zip(units, plan.units) for p in u.params}

        def note(table, module, unit):
            modules[id(module)] = module
            units_of = table.setdefault(id(module), [])
            if unit not in units_of:
                units_of.append(unit)

        for unit, u in zip(units, plan.units):
            if not self.shards_params or self.store.is_persistent(unit):
                continue
            for module in u.hooked:
                note(enter, module, unit)
            note(leave, u.hooked[-1], unit)
            note(leave, u.scope, unit)
            # Backward meets the unit's modules in reverse: it is done with all of them at the first one's inputs.
            note(done, u.hooked[0], unit)
            note(done, u.scope, unit)
        hooked_of = dict(zip(units, (u.hooked for u in plan.units)))
        for module, parameter in plan.uses:
            unit = index_of.get(id(parameter))
            if unit is None or not self.shards_params or self.store.is_persistent(unit):
                continue
            if any(module is inner for outer in hooked_of[unit] for inner in outer.modules()):
                continue  # runs inside a module that holds the unit anyway, and must not free it
            self.scheduler.share(unit)
            note(enter, module, unit)
            note(leave, module, unit)
            note(done, module, unit)
        self.hooked_modules = len(modules)
        for key, module in modules.items():
            self._hook_module(module, enter.get(key, []), leave.get(key, []), done.get(key, []))

    def _hook_module(self, module, enter, leave, done):
        """enter, leave: units gathered before and freed after the forward. done: units freed when backward reaches the inputs."""

        leaves = []     # inputs without a producer: they get a node when the forward first uses them

        def before(owner, module, args, kwargs):
            owner.refuse_while_away("forward", "lp_params")
            for unit in enter:
                owner.scheduler.enter(unit)
            leaves.clear()
            # Now, not after: the module may put tensors of its own making among its arguments (a cache of keys and values).
            if done and torch.is_grad_enabled() and owner.hooks is not None:
                inputs = [t for t in tensors_in(args) + tensors_in(kwargs) if t.requires_grad and not isinstance(t, torch.nn.Parameter)]
                leaves.extend(t for t in inputs if t.is_leaf)
                owner.hooks.watch_inputs(done, [t for t in inputs if not t.is_leaf])

        kept_by = [inner.__dict__ for inner in module.modules()]

        def after(owner, module, args, output):
            if torch.is_grad_enabled() and owner.hooks is not None:
                used = enter + [unit for unit in owner.borrowed if unit not in enter]
                if used:
                    results = tensors_in(output) + attributes_with_graph(kept_by)
                    owner.hooks.watch_outputs(used, [t for t in results if t.requires_grad])
                if leaves:
                    owner.hooks.watch_inputs(done, leaves)
            leaves.clear()
            for unit in leave:
                owner.scheduler.leave(unit)

        if enter or done:
            self._handles.append(module.register_forward_pre_hook(_Hook(self, before), with_kwargs=True))
        self._handles.append(module.register_forward_hook(_Hook(self, after)))

    def install_root_hooks(self, model):
        self._root = weakref.ref(model)
        borders.keep_out_of_graphs()

        def before(owner, module, args):
            owner.refuse_while_away("forward", "lp_params")
            owner.store.check_params()
            if owner.reducer is not None and torch.is_grad_enabled():
                owner.hooks.watch_parameters()
            owner.scheduler.begin_forward()

        def after(owner, module, args, kwargs, output):
            if output is not None and torch.is_grad_enabled() and owner.hooks is not None:
                results = [t for t in tensors_in(output) if t.requires_grad]
                if owner.borrowed:
                    owner.hooks.watch_outputs(owner.borrowed, results)
                owner.hooks.watch_root(results)
            owner.borrowed = []
            owner.scheduler.end_forward()

        def saves(owner, module, prefix, keep_vars):
            owner.refuse_while_away("state_dict()", "lp_params")
            if not keep_vars:
                _refuse_freed(module, "state_dict()", "engine.save_16bit_model(folder) writes the whole weights")

        def loads(owner, module, *rest):
            owner.refuse_while_away("load_state_dict()", "lp_params")
            _refuse_freed(module, "load_state_dict()", "engine.load_module_state_dict(state) takes whole weights")

        self._handles.append(model.register_state_dict_pre_hook(_Hook(self, saves)))
        self._handles.append(model.register_load_state_dict_pre_hook(_Hook(self, loads)))
        # In front of all other hooks of the root, and behind them; also when the forward raises.
        self._handles.append(model.register_forward_pre_hook(_Hook(self, before), prepend=True))
        self._handles.append(model.register_forward_hook(_Hook(self, after), with_kwargs=True, always_call=True))

    def reinstall_hooks(self):
        """Puts the hooks back that a caller took off."""
        plan, units = self._reinstall
        self.install_unit_hooks(plan, units)
        self.install_root_hooks(self._root())

    def remove_module_hooks(self):
        for handle in self._handles:
            handle.remove()
        self._handles = []

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
        self.away, self.resting = frozenset(kinds), resting
        if "lp_params" not in kinds:
            return

        def saves(owner, module, prefix, keep_vars):
            owner.refuse_while_away("state_dict()", "lp_params")

        def loads(owner, module, *rest):
            owner.refuse_while_away("load_state_dict()", "lp_params")

        for module in list(model.modules())[1:]:   # the model's own hooks ask always
            self._away_handles.append(module.register_state_dict_pre_hook(_Hook(self, saves)))
            self._away_handles.append(module.register_load_state_dict_pre_hook(_Hook(self, loads)))

    def bring_home(self):
        """All values are back."""
        resting, self.resting, self.away = self.resting, None, frozenset()
        resting.drop()
        for index, parameter in enumerate(self.params):
            if parameter is not None and self.store.flat_info(self.store.param_place(index)[1])["trainable"]:
                parameter.grad = None   # autograd left it there before the reducer refused; it would be added to the next one
        for handle in self._away_handles:
            handle.remove()
        self._away_handles = []

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
        self.remove_module_hooks()
        if self.hooks is not None:
            self.hooks.close()
        self.hooks = self.reducer = self.optimizer = self._reinstall = None
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
        self.remove_module_hooks()
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


def _refuse_freed(module, call, instead):
    freed = [name for name, p in module.named_parameters() if is_guarded(p)]
    if freed:
        raise RuntimeError(f"{call}: {len(freed)} parameters of the model, the first '{freed[0]}', are sharded by ZeRO-3 and not gathered "
                           f"on this rank: {instead}; or make the call on all ranks inside "
                           "`with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=...):`")


def _bind_methods(parameter):
    from deepspeed.zero import param_methods
    param_methods.bind(parameter)
