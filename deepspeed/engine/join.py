# SPDX-License-Identifier: Apache-2.0
"""Ranks with different numbers of batches.

Inside the context every training forward first counts the ranks that still have data. A rank that leaves its loop early stays
in the context's exit and plays a forward, a backward with zero gradients and a step for each of the others', until nobody has
data. Gradients stay averages over all ranks, those without data included.
"""
from concurrent.futures import ThreadPoolExecutor


class Join:

    def __init__(self, engine):
        self._engine = engine

    def __enter__(self):
        engine = self._engine
        if engine._managed is None or engine._managed.reducer is None:
            raise RuntimeError("join: this engine has no optimizer, there is nothing to keep in step")
        if engine._joining is not None:
            raise RuntimeError("join: contexts do not nest")
        engine._joining = self
        return self

    def announce(self):
        """One more micro-batch on this rank. Collective."""
        return self._count(1)

    def _count(self, mine):
        import struct
        found = self._engine._managed.transports.world.all_gather_host(struct.pack("q", mine), "join")
        return sum(struct.unpack("q", item)[0] for item in found)

    def __exit__(self, kind, error, trace):
        engine = self._engine
        engine._joining = None
        if kind is not None:
            return False
        managed = engine._managed
        while self._count(0):
            managed.scheduler.shadow_forward()
            managed.reducer.set_post_scale(engine._layout.post_scale)
            # The others gather and reduce by turns, as their backward goes: neither of ours may wait for the other to finish.
            with ThreadPoolExecutor(1) as beside:
                flushed = beside.submit(managed.reducer.flush, True)
                managed.scheduler.shadow_backward()
                flushed.result()
            engine._set_default_scale()
            engine.step()
        return False
