# SPDX-License-Identifier: Apache-2.0
"""When the engine's gradients are reduced: deferred inside blocks, and finished on request."""
import contextlib


class GradientReduction:

    @contextlib.contextmanager
    def no_sync(self):
        """Micro-batches whose gradients need not be reduced yet. Stages 0 and 1 keep them whole until the next reduction outside;
        stages 2 and 3, which never hold whole gradients, reduce as always."""
        with self._deferred():
            self._no_sync_depth += 1
            try:
                yield
            finally:
                self._no_sync_depth -= 1

    @contextlib.contextmanager
    def coalesce_grad_reduction(self):
        """Several backwards, one reduction when the block ends (whole gradients are held meanwhile)."""
        with self._deferred(force=True) as outermost:
            yield
        if outermost:
            self._reduce_carry()

    @contextlib.contextmanager
    def _deferred(self, force=False):
        reducer = self._managed.reducer if self._managed is not None else None
        if reducer is None or reducer.deferred or not (force or self._layout.defer_in_no_sync):
            yield False
            return
        reducer.set_deferred(True)
        try:
            yield True
        finally:
            reducer.set_deferred(False)

    def allreduce_gradients(self, bucket_size=None):
        """Gradients are reduced during backward; this only finishes what a no_sync() block has left over."""
        if self._managed is not None and self._managed.reducer is not None and self._managed.reducer.has_carry():
            self._reduce_carry()

    def _reduce_carry(self):
        self._refuse_without_states("reducing gradients", "lp_grads", "contiguous_grad_buffer")
        if self._joining is not None:
            self._joining.reduction()
        self._flush_carry()

    def _flush_carry(self):
        self._managed.reducer.set_refusal("")
        self._managed.reducer.flush_carry()
        self._set_default_scale()

    buffered_allreduce_fallback = allreduce_gradients

    def clip_fp32_gradients(self):
        """Nothing is left to do: step() clips to gradient_clipping, by the exact global norm, at every precision."""
