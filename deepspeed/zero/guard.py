# SPDX-License-Identifier: Apache-2.0
"""The class a parameter wears while its values are elsewhere.

Its shape, dtype and flags are always answered. Anything that needs values gathers the parameter when a managed module
is running (a weight used by another module, say a tied head), and raises an error that names it otherwise.
"""
import functools

import torch

from deepspeed.zero.stand_in import ShardBytes, converted, is_stand_in, represented, stand_in
from deepspeed.zero.tensors import tensors_in

_T = torch.Tensor


def _metadata_functions():
    getters = ("shape", "dtype", "device", "requires_grad", "grad", "is_leaf", "ndim", "layout", "grad_fn", "is_sparse", "is_cuda",
               "is_cpu", "is_meta", "is_quantized", "names", "retains_grad", "output_nr", "_backward_hooks", "_version", "is_mkldnn",
               "is_nested", "itemsize", "nbytes", "name", "_post_accumulate_grad_hooks", "is_xpu", "is_mps", "is_xla", "is_ipu",
               "is_hpu", "is_mtia", "is_vulkan", "is_maia", "is_sparse_csr", "grad_dtype")
    functions = set()
    for name in getters:
        attribute = getattr(_T, name, None)
        if attribute is None:
            continue
        functions.add(attribute.__get__)
        if name in ("requires_grad", "grad", "_backward_hooks"):
            functions.add(attribute.__set__)
    for name in ("size", "numel", "nelement", "dim", "ndimension", "stride", "is_floating_point", "is_complex", "is_signed",
                 "element_size", "__hash__", "requires_grad_", "is_contiguous", "storage_offset", "__len__", "get_device",
                 "register_hook", "register_post_accumulate_grad_hook", "is_shared", "has_names", "is_inference", "type"):
        if hasattr(_T, name):
            functions.add(getattr(_T, name))
    # New tensors of the same shape: optimizers make their state so.
    functions.update(getattr(torch, f"{kind}_like") for kind in ("empty", "zeros", "ones", "full", "rand", "randn"))
    functions.update(getattr(_T, f"new_{kind}") for kind in ("empty", "zeros", "ones", "full"))
    functions.update((torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.is_same_size,
                      torch._has_compatible_shallow_copy_type))
    return frozenset(functions)


_METADATA = _metadata_functions()
_CONVERSIONS = frozenset(getattr(_T, name) for name in ("to", "float", "double", "half", "bfloat16", "cpu", "cuda") if hasattr(_T, name))
_DATA_SET = _T.data.__set__
_DATA_GET = _T.data.__get__
_REPR = _T.__repr__
_FORMAT = _T.__format__
_DETACH = _T.detach
_NUMPY = _T.numpy


def _describe(parameter):
    with torch._C.DisableTorchFunctionSubclass():
        home = parameter.__dict__.get("ds_home")
        name = home.name if home is not None else "?"
        return f"Parameter '{name}' {tuple(parameter.shape)} {parameter.dtype}, sharded by ZeRO-3, values not gathered"


def _changes_nothing(func, parameter, args, kwargs):
    """Whether a conversion asks for the dtype and device that the parameter has."""
    name = func.__name__
    dtype, device = None, None
    if name == "to":
        if any(isinstance(a, torch.Tensor) for a in args):
            return False
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if kwargs.get("copy"):
            return False
    elif name in ("cpu", "cuda"):
        device = torch.device(name, *args[:1]) if name == "cuda" and args else torch.device(name)
    else:
        dtype = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}[name]
    mine = parameter.device
    same_device = device is None or (device.type == mine.type and (device.index in (None, mine.index) or mine.type == "cpu"))
    return same_device and dtype in (None, parameter.dtype)


def _guarded_in(value, found):
    if isinstance(value, Guarded):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _guarded_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _guarded_in(item, found)
    return found


def _is_nothing(data):
    """What `.data` of a freed parameter gives, padded by nothing, say: setting it changes nothing."""
    return not isinstance(data, Guarded) and data.dim() == 1 and data.numel() == 0


def _far(tensor):
    """Whether the values are neither here nor fetched by the forward that runs."""
    home = tensor.__dict__["ds_home"]
    return not home.gathered and not home.in_forward


def _opened_in_init(freed):
    """Under zero.Init the parameters become whole, and what is written into them counts."""
    from deepspeed.zero.init import open_parameters
    return open_parameters(freed)


class Guarded:
    """Mixed into the own class of every freed parameter."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _REPR:
            return _describe(args[0])
        if func == _FORMAT:
            return format(_describe(args[0]), *args[1:])
        if func in _CONVERSIONS and _changes_nothing(func, args[0], args[1:], kwargs):
            return args[0]
        if func == _DATA_SET and (args[0] is args[1] or _is_nothing(args[1])):
            return None
        freed = _guarded_in((args, kwargs), [])
        stands_in = any(is_stand_in(tensor) for tensor in freed)
        if _opened_in_init([tensor for tensor in freed if not tensor.__dict__["ds_home"].gathered]):
            return func(*represented(args), **represented(kwargs)) if stands_in else func(*args, **kwargs)
        if func == _DATA_GET:  # a new wrapper at each access: equal, never the same
            with torch._C.DisableTorchFunctionSubclass():
                return torch.empty(0, dtype=args[0].dtype, device=args[0].device)
        if func == _DETACH and not args[0].__dict__["ds_home"].in_forward:
            return stand_in(args[0], guard_class(torch.Tensor))
        if (func == _NUMPY or func in _CONVERSIONS) and is_stand_in(args[0]) and _far(args[0]):
            if func != _NUMPY:
                return converted(args[0], func, args[1:], kwargs, guard_class(torch.Tensor))
            if args[0].__dict__["ds_home"].owner.hooks is None:
                return ShardBytes(args[0], args[1:], kwargs)
        units = []
        for parameter in freed:
            home = parameter.__dict__["ds_home"]
            if not home.gathered:  # an earlier one may have brought it back
                home.gather_for_use(getattr(func, "__name__", str(func)))
                units.append(home)
        if stands_in:
            args, kwargs = represented(args), represented(kwargs)
        out = func(*args, **kwargs)
        if torch.is_grad_enabled():
            for home in units:
                home.watch(tensors_in(out))
        return out

    def __deepcopy__(self, memo):
        raise RuntimeError(f"{_describe(self)}: gather it first, with deepspeed.zero.GatheredParameters([...])")

    def __reduce_ex__(self, protocol):
        raise RuntimeError(f"{_describe(self)}: gather it first, with deepspeed.zero.GatheredParameters([...])")


@functools.lru_cache(maxsize=None)
def guard_class(cls):
    """The guarded twin of a parameter class."""
    if issubclass(cls, Guarded):
        return cls
    return type(cls.__name__, (Guarded, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def is_guarded(parameter):
    return isinstance(parameter, Guarded)
