# SPDX-License-Identifier: Apache-2.0
"""Tensors of files that are computed with before they are read.

Note [Deferred]: a Deferred has the shape and dtype of a tensor, and a reader (range_views.py) in place of memory. Joining, cutting,
reshaping and converting it gives another Deferred that can still be read by ranges. Any other operation is kept with its operands and runs,
on whole tensors, when a range of its result is read; the last such result is kept, since a tensor is read range after range. What has to
know values reads at once; writing is an error. Reading is row-major: strides of a Deferred say nothing.
"""
import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from deepspeed.checkpoint import dtypes
from deepspeed.checkpoint.export.elements import FLOATS
from deepspeed.checkpoint.range_views import Cast, Joined, Narrowed, Reshaped, count

_aten = torch.ops.aten


class Deferred(torch.Tensor):
    """reader: shape, dtype, numel, read_into(begin, buffer). See Note [Deferred]."""

    @staticmethod
    def __new__(cls, reader):
        return torch.Tensor._make_wrapper_subclass(cls, tuple(reader.shape), dtype=dtypes.torch_dtype(reader.dtype), device="cpu")

    def __init__(self, reader):
        self.reader = reader

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        result = handler(*args, **kwargs) if handler is not None else None
        return result if result is not None else _otherwise(func, args, kwargs)

    def __repr__(self, **_):
        return f"Deferred({self.reader.dtype}, {list(self.reader.shape)})"


def materialise(tensor):
    """The values as a plain tensor."""
    reader = tensor.reader
    values = torch.empty(tuple(reader.shape), dtype=dtypes.torch_dtype(reader.dtype))
    if values.numel():
        reader.read_into(0, values.view(-1).view(torch.uint8).numpy())
    return values


# ---- operations that any range can be read through

def _same(tensor, *_, **__):
    return Deferred(tensor.reader)


def _reshaped(tensor, shape):
    shape = list(shape)
    if -1 in shape:
        at = shape.index(-1)
        shape[at] = tensor.numel() // max(1, count(shape[:at] + shape[at + 1:]))
    return Deferred(Reshaped(tensor.reader, shape))


def _converted(tensor, *, dtype=None, device=None, layout=None, pin_memory=None, non_blocking=False, memory_format=None):
    if (device is not None and torch.device(device).type != "cpu") or pin_memory:
        return materialise(tensor).to(device=device, dtype=dtype)
    name = dtypes.name_of(dtype) if dtype is not None else tensor.reader.dtype
    if name == tensor.reader.dtype:
        return _same(tensor)
    return Deferred(Cast(tensor.reader, name)) if name in FLOATS and tensor.reader.dtype in FLOATS else None


def _joined(tensors, dim=0):
    if not all(isinstance(t, Deferred) and t.dtype == tensors[0].dtype and t.dim() == tensors[0].dim() and t.dim() for t in tensors):
        return None
    return Deferred(Joined([t.reader for t in tensors], dim % tensors[0].dim()))


def _stacked(tensors, dim=0):
    if not all(isinstance(t, Deferred) for t in tensors):
        return None
    return _joined([_unsqueezed(t, dim) for t in tensors], dim % (tensors[0].dim() + 1))


def _unsqueezed(tensor, dim):
    shape = list(tensor.shape)
    shape.insert(dim % (tensor.dim() + 1), 1)
    return _reshaped(tensor, shape)


def _narrowed(tensor, dim, begin, length):
    return Deferred(Narrowed(tensor.reader, dim % tensor.dim(), begin, length))


def _sliced(tensor, dim=0, start=None, end=None, step=1):
    if step != 1:
        return None
    extent = tensor.shape[dim]
    start, end, _ = slice(start, end).indices(extent)
    return _narrowed(tensor, dim, start, max(0, end - start))


def _selected(tensor, dim, index):
    dim %= tensor.dim()
    shape = tensor.shape[:dim] + tensor.shape[dim + 1:]
    return _reshaped(_narrowed(tensor, dim, index % tensor.shape[dim], 1), shape)


def _split(tensor, size, dim=0):
    extent = tensor.shape[dim]
    return _split_sizes(tensor, [min(size, extent - at) for at in range(0, extent, size)] if size else [extent], dim)


def _split_sizes(tensor, sizes, dim=0):
    at, parts = 0, []
    for size in sizes:
        parts.append(_narrowed(tensor, dim, at, size))
        at += size
    return parts


def _unbound(tensor, dim=0):
    return [_selected(tensor, dim, index) for index in range(tensor.shape[dim])]


_HANDLERS = {
    _aten.alias.default: _same, _aten.detach.default: _same, _aten.clone.default: _same, _aten.lift_fresh.default: _same,
    _aten._to_copy.default: _converted, _aten.view.default: _reshaped, _aten._unsafe_view.default: _reshaped,
    _aten._reshape_alias.default: lambda tensor, shape, strides: _reshaped(tensor, shape), _aten.unsqueeze.default: _unsqueezed,
    _aten.cat.default: _joined, _aten.stack.default: _stacked, _aten.slice.Tensor: _sliced, _aten.select.int: _selected,
    _aten.split.Tensor: _split, _aten.split_with_sizes.default: _split_sizes, _aten.unbind.int: _unbound,
}


# ---- all others

class _Call:
    """An operation that waits for somebody to read its result."""

    _last = (None, None)   # the call that ran last, with what it gave

    def __init__(self, func, args, kwargs):
        self._func, self._args, self._kwargs = func, args, kwargs

    def results(self):
        if _Call._last[0] is not self:
            _Call._last = (None, None)
            _Call._last = (self, tree_flatten(_run(self._func, self._args, self._kwargs))[0])
        return _Call._last[1]


def forget_results():
    """Frees what Note [Deferred] keeps."""
    _Call._last = (None, None)


class _Result:
    def __init__(self, call, index, like):
        self._call, self._index = call, index
        self.shape, self.dtype, self.numel = tuple(like.shape), dtypes.name_of(like.dtype), like.numel()

    def read_into(self, begin, buffer):
        target = torch.frombuffer(buffer, dtype=dtypes.torch_dtype(self.dtype))
        target.copy_(self._call.results()[self._index].reshape(-1)[begin:begin + target.numel()])


def held(tensor):
    """The reader of a plain tensor."""
    return _Result(_Holder(tensor), 0, tensor)


class _Holder:
    def __init__(self, tensor):
        self._tensor = tensor

    def results(self):
        return [self._tensor]


def _run(func, args, kwargs):
    return func(*tree_map_only(Deferred, materialise, args), **tree_map_only(Deferred, materialise, kwargs))


def _otherwise(func, args, kwargs):
    operands = tree_flatten((args, kwargs))[0]
    if any(isinstance(given, Deferred) and argument.alias_info is not None and argument.alias_info.is_write
           for argument, given in zip(func._schema.arguments, args)):
        raise RuntimeError(f"{func} writes into a tensor that has not been read from its file")
    plain = any(isinstance(item, torch.Tensor) and not isinstance(item, Deferred) for item in operands)
    if func._schema.is_mutable or plain or kwargs.get("device") is not None:
        return _run(func, args, kwargs)

    def blank(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    try:
        likes = func(*tree_map_only(Deferred, blank, args), **tree_map_only(Deferred, blank, kwargs))
    except (NotImplementedError, RuntimeError):
        return _run(func, args, kwargs)   # its result's shape, or a number, depends on values
    flat = tree_flatten(likes)[0]
    if not flat or not all(isinstance(item, torch.Tensor) for item in flat):
        return _run(func, args, kwargs)
    call = _Call(func, args, kwargs)
    results = iter([Deferred(_Result(call, index, like)) for index, like in enumerate(flat)])
    return tree_map_only(torch.Tensor, lambda _: next(results), likes)
