# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint's slices straight into the memory where they are wanted."""
import torch

from deepspeed.checkpoint import dtypes

_STAGING_BYTES = 64 << 20
_RESTING_BYTES = 32 << 20   # of files that may be in memory at a time


class Filling:
    """Collects what is to be read, then reads it in one go, file by file."""

    def __init__(self, source, leave=None):
        """leave: where destinations rest in files, called now and then, so that what was filled of them leaves memory."""
        self.source, self._leave = source, leave
        self._direct, self._staged = [], []

    def add(self, info, piece):
        """`piece`: elements [begin, begin + len(data)) of the tensor `info`, wanted in the piece's order and dtype."""
        data = piece.data
        if data.numel() == 0:
            return
        same = info.dtype == piece.dtype or (info.dtype in dtypes.CONVERTIBLE and piece.dtype in dtypes.CONVERTIBLE)
        if same and info.order == piece.order and piece.on_host and data.is_contiguous():
            self._direct.append((info.name, info.kind, piece.begin, data.numel(), piece.dtype, data.view(torch.uint8).numpy()))
        else:
            self._staged.append((info, piece, same))

    def run(self):
        """Throws CheckpointError when a block is damaged; destinations may be half filled then."""
        for batch in self._batches():
            self.source.read_into(batch)
            if self._leave is not None:
                self._leave()
        for info, piece, same in self._staged:
            if same and info.order == piece.order:
                self._in_turns(info, piece)
            else:
                piece.data.copy_(self._reordered(info, piece))

    def _batches(self):
        """All at once, or about as much as may be in memory before it leaves."""
        batch, size = [], 0
        for wanted in self._direct:
            batch.append(wanted)
            size += wanted[-1].nbytes
            if self._leave is not None and size >= _RESTING_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _in_turns(self, info, piece):
        data = piece.data
        step = (_STAGING_BYTES if self._leave is None else _RESTING_BYTES) // data.element_size()
        staging = torch.empty(min(step, data.numel()), dtype=data.dtype, pin_memory=data.device.type == "cuda")
        for begin in range(0, data.numel(), step):
            part = staging[:min(step, data.numel() - begin)]
            self.source.read_into([(info.name, info.kind, piece.begin + begin, part.numel(), piece.dtype, part.view(torch.uint8).numpy())])
            data[begin:begin + part.numel()].copy_(part)
            if self._leave is not None:
                self._leave()

    def _reordered(self, info, piece):
        """Another order of dimensions, or a conversion that reading does not do: by way of the whole tensor."""
        whole = self.source.read(info.name, info.kind)
        whole = whole.permute(piece.order) if piece.order else whole
        return whole.reshape(-1)[piece.begin:piece.begin + piece.data.numel()].to(piece.data.dtype)
