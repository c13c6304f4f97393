# SPDX-License-Identifier: Apache-2.0
"""zero.Init: a model that is sharded while it is built, so that no rank ever holds all of it.

A module's parameters are sharded when the module is put into its parent (torch tells by its registration hooks), the
outermost module's when the context ends. Rank 0's values count.

Note [Open parameters]: inside the context a sharded parameter that anybody touches, by torch.nn.init.*, arithmetic or `.data`,
becomes whole and stays so, since what was taken out of it (a view, `.data`) may be written later. The least recently opened ones
are cut again, with rank 0's values, when open ones exceed a budget; the rest when the context ends. All ranks touch the same
parameters in the same order, so this is collective without being said.

Note [Vacant]: while transformers builds a model whose weights it reads or initialises afterwards, it switches its initialisation off. What
such a model's larger modules are built with is nobody's, and is neither copied nor sent.

Note [Beginnings]: a room above (checkpoint, which reads weights for transformers) has something to prepare before the outermost context
begins. It cannot be imported from here, so it is named in deepspeed/_entries.py.
"""
import sys
import weakref
from collections import OrderedDict

import torch
from torch.nn.modules import module as torch_module

from deepspeed import comm
from deepspeed._entries import call_entries
from deepspeed.config import load_config
from deepspeed.device import get_accelerator
from deepspeed.device.host_memory import blocks_from_system, trim_heap
from deepspeed.zero.managed import ManagedModel, home_of
from deepspeed.zero.tiers import IN_MEMORY, tiers_of
from deepspeed.zero.transports import open_transports
from deepspeed.zero.units import UnitPlan

_OPEN_BUDGET_BYTES = 64 << 20

_active = []        # contexts entered, outermost first
_open_units = OrderedDict()   # (id of the owner, unit) -> (ParamHome, bytes), least recently opened first
_VACANT_NUMEL = 1 << 16   # modules with fewer elements keep what they were built with
_TRIM_NUMEL = 1 << 22   # sharded elements after which the heap is returned to the system
_transports = {}    # (group name, device) -> transports; contexts come and go, opening them costs a rendezvous


def _open(group, device):
    key = (group.group_name if group is not None else "", str(device))
    if key not in _transports:
        _transports[key] = open_transports(device, group)
    return _transports[key]


class Init:
    """Context in which modules are sharded as they are constructed; `Init(module=m)` shards an existing one.

    config_dict_or_path: the training configuration, for dtype; dtype: overrides it (torch dtype). data_parallel_group: the ranks
    to shard over. enabled=False makes it a plain context. Where the configuration has zero_optimization.offload_param with device nvme, the
    shards go into files at once; remote_device "nvme" asks that it has. The remaining arguments are those of the known package and choose
    implementations that do not exist here. Collective: every rank builds the same model.
    """

    def __init__(self, module=None, data_parallel_group=None, mem_efficient_linear=True, remote_device=None, pin_memory=False,
                 config_dict_or_path=None, config=None, enabled=True, dtype=None, mpu=None, zero_param_parallel_group=None,
                 zero_quantized_weights=False, zero_quantized_nontrainable_weights=False, sequence_data_parallel_group=None,
                 param_swapper=None, tensor_overrides=None):
        self.enabled = enabled
        if not enabled:
            return
        if remote_device not in (None, "none", "cpu", "nvme"):
            raise ValueError(f"zero.Init: remote_device={remote_device!r}; known are \"none\", \"cpu\" and \"nvme\"")
        if zero_quantized_weights or zero_quantized_nontrainable_weights:
            raise NotImplementedError("zero.Init: quantised weights are not built yet; leave zero_quantized_weights off")
        comm.init_distributed()
        name = get_accelerator().device_name()
        self.device = torch.device("cpu") if name == "cpu" else torch.device(get_accelerator().current_device_name())
        source = config_dict_or_path if config_dict_or_path is not None else config
        config = load_config(source, device=name, batch_required=False) if source is not None else None
        self.dtype = dtype or self._dtype_of(config)
        self.tiers = tiers_of(config, self.device, with_optimizer=False) if config is not None else IN_MEMORY
        if remote_device == "nvme" and not self.tiers.moves_parameters:
            raise ValueError("zero.Init: remote_device=\"nvme\" needs config_dict_or_path with zero_optimization.offload_param, "
                             "its device \"nvme\" and its nvme_path")
        self.group = data_parallel_group or (mpu.get_data_parallel_group() if mpu is not None else None)
        self._owner = None
        self._hooks = []
        self._seen = {}
        self._freed_numel = 0
        self._modes = []
        if module is not None:
            self._shard_tree(module)
            self._hand_over()

    @staticmethod
    def _dtype_of(cfg):
        if cfg is None:
            return None
        return torch.bfloat16 if cfg.bf16.enabled else torch.float16 if cfg.fp16.enabled else None

    # ---- sharding

    def _managed(self):
        if self._owner is None or self._owner.closed:
            self._owner = ManagedModel(_open(self.group, self.device), self.device, shard_params=True, tiers=self.tiers)
        return self._owner

    def _shard(self, module):
        """The parameters that the module registers itself."""
        own = {}
        for name, parameter in module._parameters.items():
            if parameter is not None and home_of(parameter) is None and parameter.numel() and not any(parameter is p for p in own.values()):
                own[name] = parameter
        if not own:
            return
        owner = self._managed()
        plan = UnitPlan(type(module).__name__, list(own), list(own.values()), [], module, sum(p.numel() for p in own.values()))
        owner.add_unit(plan, self._target, lambda p: False, keep_master=False, persistent_numel=-1,
                       vacant=plan.numel >= _VACANT_NUMEL and _values_come_later())
        module.__dict__["_ds_zero_owner"] = owner   # as long as a module lives, its shards do
        self._freed_numel += plan.numel
        if self._freed_numel >= _TRIM_NUMEL:
            self._freed_numel = 0
            trim_heap()

    def _target(self, parameter):
        return self.dtype if self.dtype is not None and parameter.is_floating_point() else parameter.dtype

    def _shard_tree(self, module):
        for child in module.modules():
            self._shard(child)

    def _hand_over(self):
        self._seen = {}
        if self._owner is not None and not self._owner.closed:
            self._owner.store.trim_pool()
        self._owner = None
        trim_heap()

    # ---- the context

    def __enter__(self):
        if self.enabled:
            if not _active:
                self._attach()
            _active.append(self)
        return self

    def __exit__(self, kind, error, trace):
        if not self.enabled:
            return False
        _active.remove(self)
        if _active:
            return False   # the outermost context does the work
        self._detach()
        close_parameters(keep_values=kind is None)
        if kind is None:
            for reference in list(self._seen.values()):
                module = reference()
                if module is not None:
                    self._shard(module)
        self._hand_over()
        return False

    def _attach(self):
        call_entries("zero.Init begins")
        def on_parameter(module, name, parameter):
            self._seen[id(module)] = weakref.ref(module)

        def on_module(module, name, child):
            if isinstance(child, torch.nn.Module):
                self._shard_tree(child)

        self._hooks = [torch_module.register_module_parameter_registration_hook(on_parameter),
                       torch_module.register_module_module_registration_hook(on_module)]
        blocks_from_system(True)
        self._previous_dtype = torch.get_default_dtype()
        if self.dtype is not None:
            torch.set_default_dtype(self.dtype)
        if self.device.type != "cpu":
            self._modes = [self.device.__enter__()]

    def _detach(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        blocks_from_system(False)
        torch.set_default_dtype(self._previous_dtype)
        if self._modes:
            self.device.__exit__(None, None, None)
            self._modes = []


# Callers replace this function, and compare `fn` with the _orig_* below, to change how tensors are made under Init. Nothing is
# made through it here unless they have: plain constructors already follow the context's dtype and device.
def zero_wrapper_for_fp_tensor_constructor(fn, target_fp_dtype, target_device=None):
    """`fn` with its floating-point results in `target_fp_dtype` on `target_device`."""

    def construct(*args, **kwargs):
        if target_device is not None and kwargs.get("device") is None:
            kwargs["device"] = target_device
        tensor = fn(*args, **kwargs)
        return tensor.to(target_fp_dtype) if tensor.is_floating_point() else tensor

    return construct


_orig_torch_tensor, _orig_torch_empty, _orig_torch_zeros, _orig_torch_ones = torch.tensor, torch.empty, torch.zeros, torch.ones
_orig_torch_full, _orig_torch_arange, _orig_torch_eye, _orig_torch_randn = torch.full, torch.arange, torch.eye, torch.randn


def _values_come_later():
    """See Note [Vacant]."""
    model = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    method = getattr(model, "init_weights", None)
    return bool(_active) and method is not None and method.__qualname__ != f"{model.__qualname__}.init_weights"


def in_init():
    """Whether a zero.Init context is running."""
    return bool(_active)


def open_parameters(freed):
    """Makes freed parameters whole until further notice; false, with nothing done, outside a context. See Note [Open parameters]."""
    if not _active:
        return False
    for parameter in freed:
        home = parameter.__dict__["ds_home"]
        store, key = home.owner.store, (id(home.owner), home.unit)
        if key in _open_units:
            continue
        store.gather(home.unit, "gather_init")
        store.pin(home.unit)
        _open_units[key] = (home, sum(store.full(flat).nbytes for flat in store.unit_flats(home.unit)))
    while len(_open_units) > 1 and sum(size for _, size in _open_units.values()) > _OPEN_BUDGET_BYTES:
        _close_unit(_open_units.popitem(last=False)[1][0], True)
    return True


def _close_unit(home, keep_values):
    if not home.alive:
        return
    store = home.owner.store
    if keep_values:
        store.broadcast_full(home.unit, 0)
        store.write_back(home.unit)
    store.unpin(home.unit)
    store.release(home.unit, True)


def close_parameters(keep_values=True):
    while _open_units:
        _close_unit(_open_units.popitem(last=False)[1][0], keep_values)


def shutdown_init_context():
    """Suspends running contexts, so that modules built now are plain; returns what restore_init_context() takes."""
    suspended = list(_active)
    if suspended:
        suspended[0]._detach()
        _active.clear()
        close_parameters()
    return suspended


def restore_init_context(suspended=None):
    """Resumes what shutdown_init_context() suspended."""
    if suspended:
        _active.extend(suspended)
        suspended[0]._attach()
