# SPDX-License-Identifier: Apache-2.0
"""The weights in a checkpoint: for each name the most exact copy there is."""
import numpy

from deepspeed.checkpoint import dtypes

_ORDER = ("fp32", "weight", "buffer")
_RAW = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64, 16: numpy.complex128}


class SourceTensor:
    """A tensor of a CheckpointSource, read by ranges of its row-major order."""

    def __init__(self, source, info):
        self.source, self.info = source, info
        self.dtype, self.shape, self.numel, self.item_bytes = info.dtype, info.shape, info.numel, dtypes.item_bytes(info.dtype)

    def read_into(self, begin, buffer):
        """Fills the writable byte buffer from element `begin` on."""
        view = memoryview(buffer).cast("B")
        count = len(view) // self.item_bytes
        if not count:
            return
        info = self.info
        if not info.order:
            self.source.read_into([(info.name, info.kind, begin, count, info.dtype, view)])
            return
        # Stored as the parameter lay in memory: turned as a whole.
        stored = numpy.empty(self.numel, _RAW[self.item_bytes])
        self.source.read_into([(info.name, info.kind, 0, self.numel, info.dtype, stored.view(numpy.uint8).data)])
        back = sorted(range(len(info.order)), key=info.order.__getitem__)
        turned = stored.reshape([info.shape[d] for d in info.order]).transpose(back).reshape(-1)
        numpy.copyto(numpy.frombuffer(view, stored.dtype), turned[begin:begin + count])


class Weights:
    """`tensors`: {name: SourceTensor} of parameters and buffers, by their names in the model's state_dict(); `aliases`: tied name -> name."""

    def __init__(self, source, exclude_frozen=False):
        best, left_out = {}, frozen_names(source) if exclude_frozen else ()
        for (name, kind), info in source.tensors.items():
            if kind not in _ORDER or name in left_out:
                continue
            if name not in best or _ORDER.index(kind) < _ORDER.index(best[name].kind):
                best[name] = info
        self.tensors = {name: SourceTensor(source, info) for name, info in best.items()}
        self.aliases = {alias: name for alias, name in source.aliases.items() if name in best}


def frozen_names(source):
    """Parameters that were not trained: weights of which no optimizer state is known, and that no group lists."""
    known = getattr(source, "frozen", None)
    if known is not None:
        return known
    trained = {name for name, kind in source.tensors if kind not in ("weight", "buffer", "object")}
    trained.update(name for group in (source.state.get("optimizer") or {}).get("groups", ()) for name in group["params"])
    return {name for name, kind in source.tensors if kind == "weight" and name not in trained} if trained else set()
