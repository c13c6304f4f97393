# SPDX-License-Identifier: Apache-2.0
"""Master values in two halves: bfloat16 weights and, beside them, the 16 bits that make them float32 (bf16.split_master).

The bits are those of a float32 master, and the weight is the master rounded to nearest, ties away from zero: csrc/kernels/optim/forms.h,
Note [split master].
"""
import torch

from deepspeed._native import lib

_aten = torch.ops.aten


class SplitValues(torch.Tensor):
    """A float32 tensor that is made when somebody computes with it, and so reads like any other.

    Writing into it in place, whole or by a slice of a one-dimensional one, writes both halves. Other views of it are copies. It has no memory of its
    own: what looks at addresses takes made().
    """

    @staticmethod
    def __new__(cls, weights, low_bits, shape=None, stride=None, whole=None):
        """weights: bfloat16, low_bits: int16, both [numel] in the order of memory of a dense tensor of this shape and these strides. whole: the
        tensors they were cut from in here, where torch does not note that parts are views."""
        shape = tuple(weights.shape) if shape is None else tuple(shape)
        stride = torch.empty(shape, device="meta").stride() if stride is None else tuple(stride)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=torch.float32, device=low_bits.device)
        self.weights, self.low_bits, self._whole = weights, low_bits, whole or (weights, low_bits)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    def made(self):
        """The values as a tensor of their own."""
        values = torch.empty_strided(self.shape, self.stride(), dtype=torch.float32, device=self.device)
        self.read_into(torch.as_strided(values, (values.numel(),), (1,)))
        return values

    def read_into(self, flat):
        """flat: [numel], float32, contiguous; tile by tile."""
        lib().read_split(self.weights, self.low_bits, flat)

    def write(self, values):
        """values: a tensor of any dtype that expands to this shape."""
        values = values.expand(self.shape)
        if self.dim() != 1:
            values = torch.empty_strided(self.shape, self.stride(), dtype=values.dtype, device=values.device).copy_(values)
            values = torch.as_strided(values, (values.numel(),), (1,), values.storage_offset())
        lib().write_split(values, self.weights, self.low_bits)
        self.mark_written()

    def mark_written(self):
        """The versions of the tensors that others hold tell that their values have changed."""
        torch.autograd.graph.increment_version(self._whole)

    def _part(self, begin, end):
        return SplitValues(self.weights[begin:end], self.low_bits[begin:end], whole=self._whole)

    def _shaped(self, shape, stride=None):
        return SplitValues(self.weights, self.low_bits, shape, stride, self._whole)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        view = _VIEWS.get(func)
        if view is not None and isinstance(args[0], cls):
            result = view(*args, **(kwargs or {}))
            if result is not None:
                return result
        if func is _aten.copy_.default:
            return _copy(*args[:2])
        made = {}

        def plain(value):
            if not isinstance(value, cls):
                return value
            if id(value) not in made:
                made[id(value)] = (value, value.made())
            return made[id(value)][1]

        result = func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs or {}))
        for number, argument in enumerate(func._schema.arguments):
            given = args[number] if number < len(args) else (kwargs or {}).get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for value in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(value, cls):
                    value.write(made[id(value)][1])
                    result = value if result is made[id(value)][1] else result
        return result

    def numpy(self, *, force=False):
        return self.made().numpy(force=force)

    def tolist(self):
        return self.made().tolist()

    def __repr__(self):
        return f"SplitValues({self.made()!r})"

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.made())

    def __reduce_ex__(self, protocol):
        return self.made().__reduce_ex__(protocol)


def _copy(into, values):
    if isinstance(into, SplitValues):
        into.write(values.made() if isinstance(values, SplitValues) else values)
    elif into.dtype == torch.float32 and into.dim() == 1 and into.is_contiguous() and into.shape == values.shape:
        values.read_into(into)
    else:
        into.copy_(values.made())
    return into


def _slice(values, dim=0, start=None, end=None, step=1):
    if values.dim() != 1 or step != 1:
        return None
    begin, end, _ = slice(start, end).indices(values.numel())
    return values._part(begin, max(begin, end))


def _viewed(values, shape):
    return values._shaped(torch.empty(values.shape, device="meta").view(shape).shape) if values.is_contiguous() else None


def _strided(values, shape, stride, offset=None):
    like = torch.empty_strided(shape, stride, dtype=torch.float32, device="meta")
    whole = like.numel() == values.numel() and like.untyped_storage().nbytes() == 4 * like.numel() and not offset
    return values._shaped(shape, stride) if whole else None


_VIEWS = {
    _aten.detach.default: lambda values: values._shaped(values.shape, values.stride()),
    _aten.alias.default: lambda values: values._shaped(values.shape, values.stride()),
    _aten.slice.Tensor: _slice,
    _aten.view.default: _viewed,
    _aten._unsafe_view.default: _viewed,
    _aten.as_strided.default: _strided,
}


def plain(values):
    """The tensor itself, or what a SplitValues stands for."""
    return values.made() if isinstance(values, SplitValues) else values


@torch.no_grad()
def follow(master, written, before=None):
    """The master takes over weights somebody has written. Where they still are the rounded master, to even or away from zero, nobody has, and its
    further digits stay. before: weights of a split master from before, where those have been written over."""
    if not isinstance(master, SplitValues):
        master.copy_(torch.where(master.to(written.dtype) == written, master, written.float()))
        return
    written = written.to(master.device)
    before = (master.weights if before is None else before).to(master.device)
    rounded = SplitValues(before, master.low_bits).made().to(written.dtype)
    kept = (written == rounded) | (written == before)
    master.low_bits.masked_fill_(~kept, 0)
    master.weights.copy_(torch.where(kept, before, written))
    master.mark_written()
