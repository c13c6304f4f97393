# SPDX-License-Identifier: Apache-2.0
"""What happens when modules of a managed model run, are saved or are loaded: units are gathered and freed, autograd is watched, and what cannot
be had is refused by name."""
import weakref

import torch

from deepspeed.zero import borders
from deepspeed.zero.guard import is_guarded
from deepspeed.zero.tensors import attributes_with_graph, tensors_in


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


class ModuleHooks:
    """The hooks of one ManagedModel, which owns this. Their bodies are given it as `owner`."""

    def __init__(self, owner):
        self._owner = weakref.ref(owner)
        self.plan = None          # the units' plan, while there are hooks
        self.handles = []
        self.hooked = 0           # modules that a unit is gathered for
        self._part_handles = []

    def _hook(self, body):
        return _Hook(self._owner(), body)

    def install_units(self, plan, units):
        """Gathers units before the modules that use them run, and frees them after."""
        self.plan, self._units, owner = plan, units, self._owner()
        enter, leave, done = {}, {}, {}
        modules = {}
        index_of = {id(p): unit for unit, u in zip(units, plan.units) for p in u.params}

        def note(table, module, unit):
            modules[id(module)] = module
            units_of = table.setdefault(id(module), [])
            if unit not in units_of:
                units_of.append(unit)

        for unit, u in zip(units, plan.units):
            if not owner.shards_params or owner.store.is_persistent(unit):
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
            if unit is None or not owner.shards_params or owner.store.is_persistent(unit):
                continue
            if any(module is inner for outer in hooked_of[unit] for inner in outer.modules()):
                continue  # runs inside a module that holds the unit anyway, and must not free it
            owner.scheduler.share(unit)
            note(enter, module, unit)
            note(leave, module, unit)
            note(done, module, unit)
        self.hooked = len(modules)
        for key, module in modules.items():
            self.hook_module(module, enter.get(key, []), leave.get(key, []), done.get(key, []))

    def hook_module(self, module, enter, leave, done):
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
            self.handles.append(module.register_forward_pre_hook(self._hook(before), with_kwargs=True))
        self.handles.append(module.register_forward_hook(self._hook(after)))

    def install_root(self, model):
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
            _refuse_to_save(owner, module)
            if not keep_vars:
                _refuse_freed(module, "state_dict()", "engine.save_16bit_model(folder) writes the whole weights")

        def loads(owner, module, *rest):
            _refuse_to_load(owner, module)
            _refuse_freed(module, "load_state_dict()", "engine.load_module_state_dict(state) takes whole weights")

        self.handles.append(model.register_state_dict_pre_hook(self._hook(saves)))
        self.handles.append(model.register_load_state_dict_pre_hook(self._hook(loads)))
        # In front of all other hooks of the root, and behind them; also when the forward raises.
        self.handles.append(model.register_forward_pre_hook(self._hook(before), prepend=True))
        self.handles.append(model.register_forward_hook(self._hook(after), with_kwargs=True, always_call=True))

    def reinstall(self):
        """Puts the hooks back that a caller took off."""
        self.install_units(self.plan, self._units)
        self.install_root(self._root())

    def remove(self):
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def guard_parts(self, model):
        """No part of the model can be saved or loaded until unguard_parts(); the root's own hooks ask always."""
        for module in list(model.modules())[1:]:
            self._part_handles.append(module.register_state_dict_pre_hook(self._hook(_refuse_to_save)))
            self._part_handles.append(module.register_load_state_dict_pre_hook(self._hook(_refuse_to_load)))

    def unguard_parts(self):
        for handle in self._part_handles:
            handle.remove()
        self._part_handles = []


def _refuse_to_save(owner, module, *rest):
    owner.refuse_while_away("state_dict()", "lp_params")


def _refuse_to_load(owner, module, *rest):
    owner.refuse_while_away("load_state_dict()", "lp_params")


def _refuse_freed(module, call, instead):
    freed = [name for name, p in module.named_parameters() if is_guarded(p)]
    if freed:
        raise RuntimeError(f"{call}: {len(freed)} parameters of the model, the first '{freed[0]}', are sharded by ZeRO-3 and not gathered "
                           f"on this rank: {instead}; or make the call on all ranks inside "
                           "`with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=...):`")
