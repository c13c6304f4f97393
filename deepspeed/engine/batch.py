# SPDX-License-Identifier: Apache-2.0
"""Batch sizes of the engine, and changing them while training."""


class BatchSizes:

    def train_batch_size(self):
        """Samples per update over all data-parallel ranks."""
        return self._micro * self._gas * self._batch_world()

    def train_micro_batch_size_per_gpu(self):
        """Samples per rank and micro-batch."""
        return self._micro

    def gradient_accumulation_steps(self):
        """Micro-batches per update."""
        return self._gas

    def get_batch_info(self):
        """(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)."""
        return self.train_batch_size(), self._micro, self._gas

    def _samples_of_update(self):
        """Samples since the last update, over all ranks; where the caller owns the boundary, as many micro-batches as there were."""
        count = self._gas if self._config.managed_gradient_accumulation else max(1, self._backwards)
        self._backwards = 0
        return self._micro * count * self._batch_world()

    def _batch_world(self):
        cfg = self._config
        return max(1, cfg.train_batch_size // (cfg.train_micro_batch_size_per_gpu * cfg.gradient_accumulation_steps))

    def set_train_batch_size(self, train_batch_size):
        """Changes the number of accumulation steps so that an update sees this many samples."""
        unit = self._micro * self._batch_world()
        if train_batch_size <= 0 or train_batch_size % unit:
            raise ValueError(f"train batch size {train_batch_size} is not a positive multiple of micro-batch {self._micro} x "
                             f"{self._batch_world()} data-parallel ranks = {unit}")
        self._gas = train_batch_size // unit
        self._apply_batch()

    def set_train_micro_batch_size(self, micro_batch_size):
        """Changes the micro-batch; the number of accumulation steps stays."""
        if micro_batch_size <= 0:
            raise ValueError(f"micro-batch size must be positive, got {micro_batch_size}")
        self._micro = micro_batch_size
        self._apply_batch()

    def set_gradient_accumulation_steps(self, steps):
        if steps <= 0:
            raise ValueError(f"gradient accumulation steps must be positive, got {steps}")
        self._gas = steps
        self._apply_batch()

    def _apply_batch(self):
        self.tput_timer.batch_size = self.train_batch_size()
        if self._managed is not None and self._managed.reducer is not None:
            self._set_default_scale()
