# SPDX-License-Identifier: Apache-2.0
"""Where the inputs of a checkpointed function rest between forward and backward.

Note [What moves]: activations, that is tensors that need a gradient and are not parameters, are split over the model parallel ranks or
copied to the host, as configure() says. Everything else is held as it is: what needs no gradient (masks, tables, positions) is one tensor
that all layers share, so a copy for each of them would cost memory instead of saving it. What is held may not be changed in place before
backward, and autograd raises if it was; what has moved is a copy, and the caller may.
"""
import contextlib
from typing import NamedTuple

import torch

from deepspeed.checkpointing.configuration import options, state
from deepspeed.checkpointing.geometry import Geometry, from_row, geometry_of, row_of
from deepspeed.checkpointing.host import HostCopies


class _Value(NamedTuple):
    """No tensor: held here."""
    value: object


class _Held(NamedTuple):
    """A tensor held by autograd, at a place in the list that it saves."""
    place: int
    requires_grad: bool


class _Moved(NamedTuple):
    """A tensor that rests as a row of elements, or this rank's part of one."""
    place: int
    geometry: Geometry
    copied: int  # its number among those on the host; -1 when it is not


def _moving(value, ranks):
    """How the argument lies in memory if it is to move, else None."""
    if type(value) is not torch.Tensor or value.layout is not torch.strided or not value.requires_grad or value.numel() < ranks:
        return None
    if value.is_conj() or value.is_neg():  # its memory holds other numbers than it
        return None
    to_host = options().checkpoint_in_cpu and value.device.type != "cpu"
    return geometry_of(value) if ranks > 1 or to_host else None


class SavedInputs:
    """The arguments of one call. `tensors` is what autograd is to save, and restore() is to be given back."""

    def __init__(self, arguments, function):
        chosen = options()
        ranks = state().ranks()
        self._ranks = ranks
        self._rests, self.tensors = [], []
        self._copies = None
        for index, value in enumerate(arguments):
            geometry = _moving(value, ranks.size)
            if geometry is not None:
                self._move(index, value, geometry, function, chosen)
            elif isinstance(value, torch.Tensor):
                self._rests.append(_Held(len(self.tensors), value.requires_grad))
                self.tensors.append(value)
            else:
                self._rests.append(_Value(value))

    def _move(self, index, value, geometry, function, chosen):
        row = row_of(value, geometry)
        part = self._ranks.part_of(row)
        numel = self._ranks.part_numel(geometry.row_numel)
        to_host = chosen.checkpoint_in_cpu and geometry.device.type != "cpu"
        device = torch.device("cpu") if to_host else geometry.device
        if chosen.contiguous_checkpointing:
            resting = state().slots.take(index, numel, geometry.dtype, device, to_host, chosen.num_checkpoints)
        else:
            resting = torch.empty(numel, dtype=geometry.dtype, device=device, pin_memory=to_host)
        if self._ranks.size > 1:
            padded = torch.zeros(numel, dtype=part.dtype, device=part.device) if part.numel() < numel else part
            if padded is not part:
                padded[:part.numel()].copy_(part)
            self._ranks.compare(row, padded, f"argument {index} of {_name(function)} {list(geometry.shape)}")
            part = padded
        if to_host:
            self._copies = self._copies or HostCopies(state().line)
            self._copies.put(part, resting)
        else:
            resting.copy_(part)
        self._rests.append(_Moved(len(self.tensors), geometry, self._copies.count - 1 if to_host else -1))
        self.tensors.append(resting)

    @contextlib.contextmanager
    def settled(self):
        """Around the first run. After it the caller may change or free its tensors."""
        try:
            yield
        finally:
            if self._copies is not None:
                self._copies.settle()

    def restore(self, tensors, detach):
        """The arguments for the second run; those that needed a gradient need one again. detach: whether those that were held come
        without their history; those that have moved never have any."""
        from_host = self._copies.bring() if self._copies is not None else ()
        arguments = []
        for rest in self._rests:
            if isinstance(rest, _Value):
                arguments.append(rest.value)
            elif isinstance(rest, _Held):
                held = tensors[rest.place]
                arguments.append(held.detach().requires_grad_(rest.requires_grad) if detach else held)
            else:
                row = from_host[rest.copied] if rest.copied >= 0 else tensors[rest.place]
                if self._ranks.size > 1:
                    row = self._ranks.gather(row, rest.geometry.row_numel)
                elif rest.copied < 0:
                    row = row.clone()  # the function may write into it, and a second backward reads it again
                arguments.append(from_row(row, rest.geometry).requires_grad_())
        return arguments


def _name(function):
    return getattr(function, "__name__", type(function).__name__)
