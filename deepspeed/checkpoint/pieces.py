# SPDX-License-Identifier: Apache-2.0
"""What of a model each rank holds: slices by (parameter name, kind, begin), to be written or to be filled.

Every rank that holds a value could write it; `share_of` says which part of a parameter is whose, the same cut at every stage, so that
all ranks write about equally much.
"""
from typing import NamedTuple

import torch

from deepspeed.checkpoint import dtypes
from deepspeed.checkpoint.names import ModelNames, order_of
from deepspeed.zero.managed import home_of
from deepspeed.zero.split_master import SplitValues

RESERVED = ("fp32", "weight", "buffer", "object", "grad")
_BIG_BUFFER_BYTES = 16 << 20
_ALIGN_NUMEL = 64


class Piece(NamedTuple):
    """Elements [begin, begin + len(data)) of a tensor, as this rank holds them."""
    name: str
    kind: str
    shape: tuple
    order: tuple
    begin: int
    data: torch.Tensor   # 1-D, a view of what the engine uses, or a SplitValues over it

    @property
    def dtype(self):
        return dtypes.name_of(self.data.dtype)

    @property
    def on_host(self):
        """Whether the bytes lie in the host's memory, as they are in files."""
        return self.data.device.type == "cpu" and not isinstance(self.data, SplitValues)


def state_kind(key):
    """The kind under which an optimizer state of this name is listed."""
    return f"state:{key}" if key in RESERVED or key.startswith("state:") else key


def state_key(kind):
    return kind.removeprefix("state:")


class Holdings:
    """The parameters, states and buffers of an engine's model on this rank.

    managed, optimizer: deepspeed.zero's ManagedModel and ShardedOptimizer, or None. group_rank, group_size: of the ranks that hold
    the same model (data parallel).
    """

    def __init__(self, module, managed, optimizer, group_rank, group_size, scope=""):
        self.module, self.managed, self.optimizer = module, managed, optimizer
        self.group_rank, self.group_size = group_rank, group_size
        self.names = ModelNames(module, scope)
        self.trained = {}    # name -> index in the store, on every rank alike
        if optimizer is not None:
            for name, parameter in self.names.parameters.items():
                home = home_of(parameter)
                if home is not None and home.index in optimizer.group_of and self._flat(home)["trainable"]:
                    self.trained[name] = home.index

    def group_names(self):
        """The parameters' names by the optimizer's groups, in the caller's order; None without an optimizer."""
        if self.optimizer is None:
            return None
        name_of = {home_of(p).index: name for name, p in self.names.parameters.items() if home_of(p) is not None}
        groups = [[] for _ in self.optimizer.param_groups]
        for index in self.optimizer.caller_order:
            if index in name_of:
                groups[self.optimizer.group_of[index]].append(name_of[index])
        return groups

    @property
    def slices(self):
        """The OptimizerSlices that this rank steps."""
        return self.optimizer.slices if self.optimizer is not None else ()

    def _flat(self, home):
        store = self.managed.store
        return store.flat_info(store.param_place(home.index)[1])

    def _describe(self, name):
        parameter = self.names.parameters[name]
        return tuple(parameter.shape), order_of(parameter)

    # ---- whose part is whose

    def share_of(self, parameter):
        """(begin, numel) of the part that this rank writes."""
        home = home_of(parameter)
        if home is None:
            return _even_cut(0, parameter.numel(), self.group_rank, self.group_size)
        begin, _, numel = self.managed.store.slice_of(home.index, self.managed.store.rank)
        replicate = self.managed.transports.replicate
        return (begin, numel) if replicate is None else _even_cut(begin, numel, replicate.rank, replicate.size)

    def _segment_begin(self, segment):
        if not self.optimizer.options.partial_slices:
            return 0
        return self.managed.store.slice_of(segment.param, self.managed.store.rank)[0]

    def segments(self):
        """(name, slice number, segment, first element of the parameter that the segment holds) of what this rank steps."""
        name_of = {index: name for name, index in self.trained.items()}
        for number, held in enumerate(self.slices):
            for segment in held.segments:
                yield name_of[segment.param], number, segment, self._segment_begin(segment)

    # ---- to be written

    def owned(self):
        """This rank's share of everything, as pieces in the order of files: kind by kind."""
        found = {}
        for name, number, segment, first in self.segments():
            shape, order = self._describe(name)
            begin, numel = self.share_of(self.names.parameters[name])
            if numel == 0:
                continue
            values = {"fp32": self.slices[number].master.narrow(0, segment.begin, segment.numel)}
            values.update((state_kind(key), value) for key, value in self.optimizer.stepper.slices_of(number, segment).items())
            for kind, value in values.items():
                found.setdefault(kind, []).append(Piece(name, kind, shape, order, begin, value.narrow(0, begin - first, numel)))
        if self.group_rank == 0:   # nobody has a segment of a parameter without elements
            found.setdefault("fp32", []).extend(Piece(name, "fp32", *self._describe(name), 0, torch.empty(0)) for name in self.trained
                                                if self.names.parameters[name].numel() == 0)
        found["weight"] = list(self._owned_weights())
        found["buffer"] = list(self._owned_buffers())
        return [piece for pieces in found.values() for piece in pieces]

    def bytes_expected(self):
        """About what owned() will amount to once every optimizer state exists."""
        total = 0
        for name, parameter in self.names.parameters.items():
            numel = self.share_of(parameter)[1]
            kinds = self.optimizer.stepper.kinds_of(self.trained[name]) if name in self.trained else ()
            each = 4 * (1 + len(kinds or ())) if name in self.trained else parameter.element_size()
            total += numel * each + 64 * (1 + len(kinds or ()))
        return total + sum(b.numel() * b.element_size() + 64 for b in self.names.buffers.values()) + (1 << 20)

    def _owned_weights(self):
        for name, parameter in self.names.parameters.items():
            if name in self.trained:
                continue
            begin, numel = self.share_of(parameter)
            if numel == 0 and not (parameter.numel() == 0 and self.group_rank == 0):
                continue
            shape, order = self._describe(name)
            yield Piece(name, "weight", shape, order, begin, self._rest(parameter, begin, numel))

    def _rest(self, parameter, begin, numel):
        """Elements of a parameter that is not stepped."""
        home = home_of(parameter)
        if home is None:
            order, data = order_of(parameter), parameter.detach()
            return (data.permute(order) if order else data).reshape(-1).narrow(0, begin, numel)
        _, first, _, _ = self.managed.place(parameter)
        return self.managed.local_slice(parameter).narrow(0, begin - first, numel)

    def _owned_buffers(self):
        """All on the first rank, but big ones in turn."""
        turn = 0
        for name, buffer in self.names.buffers.items():
            owner = 0
            if buffer.numel() * buffer.element_size() > _BIG_BUFFER_BYTES:
                owner, turn = turn % self.group_size, turn + 1
            if owner == self.group_rank:
                yield Piece(name, "buffer", tuple(buffer.shape), (), 0, buffer.detach().contiguous().reshape(-1))

    def described_order(self, name):
        return self._describe(name)[1]

    def described(self):
        """{name: (kind of its most exact value, shape, order)} of every parameter, on every rank alike."""
        return {name: ("fp32" if name in self.trained else "weight", *self._describe(name)) for name in self.names.parameters}

    # ---- to be filled

    def weight_targets(self, names):
        """Where this rank wants the values of these parameters, as pieces; `kind` is the preferred one."""
        for name, number, segment, first in self.segments():
            if name in names:
                shape, order = self._describe(name)
                yield Piece(name, "fp32", shape, order, first, self.slices[number].master.narrow(0, segment.begin, segment.numel))
        for name, parameter in self.names.parameters.items():
            if name in names and name not in self.trained and parameter.numel():
                yield from self._rest_targets(name, parameter)

    def _rest_targets(self, name, parameter):
        shape, order = self._describe(name)
        home = home_of(parameter)
        if home is None:
            yield Piece(name, "weight", shape, order, 0, _flat_view(parameter))
            return
        store = self.managed.store
        _, flat, slot = store.param_place(home.index)
        full = store.full(flat)
        if full is not None:
            _, offset, numel = store.flat_info(flat)["slots"][slot]
            yield Piece(name, "weight", shape, order, 0, full.narrow(0, offset, numel))
        if store.shards_params:
            begin, _, numel = store.slice_of(home.index, store.rank)
            if numel:
                yield Piece(name, "weight", shape, order, begin, self.managed.local_slice(parameter))

    def take_over_masters(self):
        """After the masters were filled: the parameters follow, on all ranks. Collective."""
        for held in self.slices:
            held.refresh()
            self.managed.leave_files()
        if self.managed is None:
            return
        transports, store = self.managed.transports, self.managed.store
        store.forget_written()
        transports.world.barrier("loaded")
        store.publish_all()
        if self.optimizer is None or self.optimizer.options.partial_slices:
            store.refresh_full()
        transports.world.barrier("loaded")


def _even_cut(begin, numel, part, parts):
    """(begin, numel) of part number `part` of that many about equal ones, cut at multiples of _ALIGN_NUMEL."""
    step = -(-numel // parts)
    step = -(-step // _ALIGN_NUMEL) * _ALIGN_NUMEL
    first = min(numel, part * step)
    return begin + first, min(numel, first + step) - first


def _flat_view(parameter):
    """All elements of a parameter's own memory, in the order of order_of(); a copy would be filled in vain."""
    data = parameter.detach()
    order = order_of(parameter)
    flat = data.permute(order) if order else data
    return flat.view(-1)
