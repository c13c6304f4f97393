# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint's slices straight into the memory where they are wanted."""
import torch

from deepspeed.checkpoint import dtypes

_STAGING_BYTES = 64 << 20


class Filling:
    """Collects what is to be read, then reads it in one go, file by file."""

    def __init__(self, source):
        self.source = source
        self._direct, self._staged = [], []

    def add(self, info, piece):
        """`piece`: elements [begin, begin + len(data)) of the tensor `info`, wanted in the piece's order and dtype."""
        data = piece.data
        if data.numel() == 0:
            return
        same = info.dtype == piece.dtype or (info.dtype in dtypes.CONVERTIBLE and piece.dtype in dtypes.CONVERTIBLE)
        if same and info.order == piece.order and data.device.type == "cpu" and data.is_contiguous():
            self._direct.append((info.name, info.kind, piece.begin, data.numel(), piece.dtype, data.view(torch.uint8).numpy()))
        else:
            self._staged.append((info, piece, same))

    def run(self):
        """Throws CheckpointError when a block is damaged; destinations may be half filled then."""
        if self._direct:
            self.source.read_into(self._direct)
        for info, piece, same in self._staged:
            if same and info.order == piece.order:
                self._in_turns(info, piece)
            else:
                piece.data.copy_(self._reordered(info, piece))

    def _in_turns(self, info, piece):
        data = piece.data
        step = _STAGING_BYTES // data.element_size()
        staging = torch.empty(min(step, data.numel()), dtype=data.dtype, pin_memory=data.device.type == "cuda")
        for begin in range(0, data.numel(), step):
            part = staging[:min(step, data.numel() - begin)]
            self.source.read_into([(info.name, info.kind, piece.begin + begin, part.numel(), piece.dtype, part.view(torch.uint8).numpy())])
            data[begin:begin + part.numel()].copy_(part)

    def _reordered(self, info, piece):
        """Another order of dimensions, or a conversion that reading does not do: by way of the whole tensor."""
        whole = self.source.read(info.name, info.kind)
        whole = whole.permute(piece.order) if piece.order else whole
        return whole.reshape(-1)[piece.begin:piece.begin + piece.data.numel()].to(piece.data.dtype)
