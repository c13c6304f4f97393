# SPDX-License-Identifier: Apache-2.0
"""Saved inputs on the host: copied there while the function runs, brought back while the one after it computes.

Note [Order of copies]: copies run on a stream of their own. (1) The copy down waits for what the device was doing, and the device waits
for the copy at the end of the function: from then on the caller may change or free the input. (2) The copy up starts when the checkpoint
that came next in forward, so before it in backward, has arrived, and the device waits for it before it is used. What is copied into was
allocated by the device's own stream, and that stream waits for the copy before the memory can go to somebody else, used or not.
"""
import weakref

import torch

from deepspeed.device.select import get_accelerator


class _Arriving:
    """Device tensors that a copy fills."""

    def __init__(self, tensors, event):
        self.tensors, self.event = tensors, event

    def take(self):
        tensors, self.tensors = self.tensors, None
        get_accelerator().current_stream().wait_event(self.event)
        return tensors

    def __del__(self):
        if self.tensors is not None:
            get_accelerator().current_stream().wait_event(self.event)


class HostCopies:
    """The copies of one checkpoint's inputs. It holds no memory: the host tensors are autograd's, which frees them after backward."""

    def __init__(self, line):
        self._line = line
        self._sources, self._host, self._arriving = [], [], None
        self._before = line.newest
        line.newest = weakref.ref(self)

    @property
    def count(self):
        return len(self._host)

    def put(self, source, host):
        """Starts copying `source`, on the device, to the pinned tensor `host`."""
        stream = self._line.stream()
        if not self._sources:
            stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(stream):
            host.copy_(source, non_blocking=True)
        self._sources.append(source)
        self._host.append((weakref.ref(host), source.device))

    def settle(self):
        """After this the inputs may be changed or freed."""
        if self._sources:
            get_accelerator().current_stream().wait_event(self._line.stream().record_event())
            self._sources.clear()

    def _start(self):
        host = [(reference(), device) for reference, device in self._host]
        if any(tensor is None for tensor, _ in host):
            return  # autograd has let go of them: their backward is over
        device, stream = get_accelerator(), self._line.stream()
        tensors = [torch.empty_like(tensor, device=where) for tensor, where in host]
        stream.wait_stream(device.current_stream())
        with device.stream(stream):
            for (source, _), tensor in zip(host, tensors):
                tensor.copy_(source, non_blocking=True)
        self._arriving = _Arriving(tensors, stream.record_event())

    def bring(self):
        """The tensors on the device, in the order they were put. The host tensors must be alive."""
        if self._arriving is None:
            self._start()
        arriving, self._arriving = self._arriving, None
        tensors = arriving.take()
        before = self._before() if self._before is not None else None
        if before is not None and before._arriving is None and before._host:
            before._start()
        return tensors


class Line:
    """The checkpoints in the order of forward, and the stream of their copies."""

    def __init__(self, own_stream=True):
        self.newest = None
        self._own, self._stream = own_stream, None

    def stream(self):
        if not self._own:
            return get_accelerator().current_stream()
        if self._stream is None:
            self._stream = get_accelerator().Stream()
        return self._stream
