# SPDX-License-Identifier: Apache-2.0
"""A copy of what is to be saved, in one block of host memory that is kept from save to save."""
import threading

import torch

_ALIGN_BYTES = 64


class Snapshot:
    """Memory for one copy of this rank's share. One save uses it at a time."""

    def __init__(self):
        self._memory = None
        self._making = None

    def make_ready(self, numbytes):
        """Allocates in the background, so that the first save does not wait for the system to hand out pages."""
        self._making = threading.Thread(target=self._grow, args=(numbytes,), name="deepspeed-snapshot", daemon=True)
        self._making.start()

    def _grow(self, numbytes):
        if self._memory is None or self._memory.numel() < numbytes:
            self._memory = None   # before the larger one takes its place
            memory = torch.empty(numbytes, dtype=torch.uint8)
            memory.fill_(0)       # touches every page
            self._memory = memory

    def take(self, pieces):
        """The same pieces with their values of now, in host memory."""
        if self._making is not None:
            self._making.join()
            self._making = None
        sizes = [piece.data.numel() * piece.data.element_size() for piece in pieces]
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
        self._grow(end)
        copies, on_device = [], False
        for piece, start, size in zip(pieces, starts, sizes):
            target = self._memory[start:start + size].view(piece.data.dtype)
            target.copy_(piece.data, non_blocking=True)
            on_device = on_device or piece.data.device.type == "cuda"
            copies.append(piece._replace(data=target))
        if on_device:
            torch.cuda.current_stream().synchronize()
        return copies

    def bytes(self):
        return self._memory.numel() if self._memory is not None else 0
