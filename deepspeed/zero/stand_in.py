# SPDX-License-Identifier: Apache-2.0
"""Note [Stand-ins]: `detach()` of a freed parameter, which state_dict() calls on every parameter of a module, asks for no value yet. It
returns a stand-in: a tensor of the same shape that wears the guard too, refers to the parameter, and takes that parameter's values when
somebody asks for them, if they are there by then. Conversions of a stand-in are stand-ins too and are made up for when the values are
asked for. For a model that no engine runs yet (an engine's model refuses state_dict()), `numpy().tobytes()` alone is answered without
the values: callers hash a state_dict to tell models apart, where no rank may wait for another, so they get the bytes that this rank holds,
and a warning. Whatever else they would do with the array raises what `numpy()` raises otherwise: a shard is never taken for the weights.
"""
import torch

from deepspeed.telemetry import logger

_MARK = "_ds_stands_in"      # the conversions that were asked for so far: ((function, args, kwargs), ...)
_DETACH = torch.Tensor.detach


def is_stand_in(tensor):
    return _MARK in getattr(tensor, "__dict__", {})


def _marked(tensor, home, conversions, guarded):
    tensor.ds_home = home
    tensor.__dict__[_MARK] = conversions
    tensor.__class__ = guarded
    return tensor


def stand_in(parameter, guarded):
    """`guarded`: the guarded class of a plain tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        found = _DETACH(parameter)
    return _marked(found, parameter.__dict__["ds_home"], parameter.__dict__.get(_MARK, ()), guarded)


def converted(tensor, function, args, kwargs, guarded):
    """The stand-in of a stand-in's conversion; an empty tensor tells what dtype and device that has, and lends its empty storage."""
    with torch._C.DisableTorchFunctionSubclass():
        example = function(torch.empty(0, dtype=tensor.dtype, device=tensor.device), *args, **kwargs)
        found = torch.ops.inductor._reinterpret_tensor(example, tensor.shape, tensor.stride(), 0)   # set_() would allocate
    return _marked(found, tensor.__dict__["ds_home"], (*tensor.__dict__[_MARK], (function, args, kwargs)), guarded)


def _convert(value, tensor):
    for function, args, kwargs in tensor.__dict__[_MARK]:
        value = function(value, *args, **kwargs)
    return value


def represented(value):
    """`value` with the parameters themselves, as they are now, in the place of their stand-ins."""
    if is_stand_in(value):
        home = value.__dict__["ds_home"]
        return _convert(home.owner.params[home.index].detach(), value)
    if type(value) in (list, tuple):
        return type(value)(represented(item) for item in value)
    if type(value) is dict:
        return {key: represented(item) for key, item in value.items()}
    return value


class ShardBytes:
    """In the place of an array: this rank's bytes, for hashing, and nothing else."""

    def __init__(self, tensor, args, kwargs):
        self.__dict__.update(_tensor=tensor, _arguments=(args, kwargs))

    def tobytes(self, *order):
        tensor, (args, kwargs) = self._tensor, self._arguments
        home = tensor.__dict__["ds_home"]
        mine = home.owner.local_slice(home.owner.params[home.index])
        logger.warning_once(f"numpy().tobytes() of '{home.name}' in the state_dict() of a model that is sharded by ZeRO-3: this rank's "
                            f"{mine.numel()} of its {tensor.numel()} values, and likewise for the others, good for hashing only. Inside "
                            "`with deepspeed.zero.GatheredParameters(...)` on all ranks they are whole")
        return _convert(mine.detach().clone(), tensor).numpy(*args, **kwargs).tobytes(*order)

    def __getattr__(self, name):
        self._refuse()

    def _refuse(self, *_, **__):
        self._tensor.__dict__["ds_home"].refuse("numpy")


# What Python and numpy look up in the class.
for _name in ("array", "array_interface", "array_struct", "array_ufunc", "array_function", "len", "iter", "getitem", "setitem", "contains",
              "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "matmul", "neg", "abs", "bool", "float",
              "int", "index", "setattr", "copy", "deepcopy", "reduce_ex"):
    setattr(ShardBytes, f"__{_name}__", property(ShardBytes._refuse) if _name in ("array_interface", "array_struct") else ShardBytes._refuse)
