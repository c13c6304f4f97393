# SPDX-License-Identifier: Apache-2.0
"""The engine puts its states away while something else needs the memory, and brings them back."""
import torch

from deepspeed.device.host_memory import trim_heap
from deepspeed.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.zero.optimizer import ShardedOptimizer
from deepspeed.zero.resting import FileCopies, HostCopies, RestingStates

_KINDS = tuple(kind.value for kind in OffloadStateTypeEnum)


class StateMethods:

    _resting = None

    def offload_states(self, include=None, device="cpu", pin_memory=True, non_blocking=False):
        """Frees the memory of states until reload_states(). Collective.

        include: kinds (OffloadStateTypeEnum or their values), default all: "optim_states", "hp_params" (fp32 masters), "lp_params" (the
        weights at rest), "lp_grads" (accumulated gradients), "contiguous_grad_buffer" (memory that is only kept for use). device: "cpu", into
        pinned memory with pin_memory; "nvme", into a file without a name under zero_optimization.offload_optimizer.nvme_path (or
        offload_param.nvme_path); "none" does nothing. Where training runs on the CPU, "cpu" is where states are: only spare memory is freed.

        Until they are back, step(), saving and loading raise RuntimeError, and so do forward and backward when lp_params are away.
        """
        place = OffloadDeviceEnum(getattr(device, "value", getattr(device, "type", device)))
        kinds = self._kinds_of(include)
        if self._resting is not None:
            raise RuntimeError("offload_states: states are away already; call reload_states() first")
        if self._managed is None or place == OffloadDeviceEnum.none:
            return
        if self._background_saver is not None:
            self._finish_save()
        self.empty_partition_cache()
        if place == OffloadDeviceEnum.cpu and self.device.type == "cpu":
            trim_heap()
            return
        copies = FileCopies(self._folder_for_states()) if place == OffloadDeviceEnum.nvme else HostCopies(pin_memory, non_blocking)
        valued, empty = self._tensors_of(kinds)
        world = self._managed.transports.world
        world.barrier("offload_states")   # a peer may still be reading from what goes
        resting = RestingStates(copies)
        resting.put_away(valued, empty)
        self._resting = resting
        self._managed.away = "lp_params" if "lp_params" in kinds else "others"
        trim_heap()

    def reload_states(self, non_blocking=False):
        """Brings back what offload_states() has put away, bit for bit. Collective."""
        if self._resting is None:
            return
        self._resting.bring_back(non_blocking)
        if self.device.type == "cuda" and not non_blocking:
            torch.cuda.current_stream(self.device).synchronize()
        self._resting = None
        self._managed.away = None
        world = self._managed.transports.world
        world.barrier("reload_states")
        self._managed.store.publish_all()
        world.barrier("reload_states")

    def _kinds_of(self, include):
        if include is None:
            return set(_KINDS)
        kinds = {getattr(kind, "value", kind) for kind in include}
        unknown = sorted(str(kind) for kind in kinds if kind not in _KINDS)
        if unknown:
            raise ValueError(f"offload_states: include names {', '.join(unknown)}; known are {', '.join(_KINDS)}")
        return kinds

    def _folder_for_states(self):
        zero = self._config.zero_optimization
        for section in (zero.offload_optimizer, zero.offload_param):
            path = getattr(section, "nvme_path", None)
            if path:
                return str(path)
        raise ValueError("offload_states: device \"nvme\" needs a folder: set zero_optimization.offload_optimizer.nvme_path")

    def _tensors_of(self, kinds):
        """(tensors whose values matter, others), each memory once."""
        store, reducer, optimizer = self._managed.store, self._managed.reducer, self.optimizer
        valued, empty, seen = [], [], set()

        def add(table, tensor):
            if tensor is not None and tensor.numel() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                table.append(tensor.detach())

        for flat in range(store.flats):
            if "lp_params" in kinds:
                add(valued, store.shard(flat) if store.shards_params else store.full(flat))
                if store.shards_params:
                    add(valued, store.full(flat))   # of units that stay gathered
        if isinstance(optimizer, ShardedOptimizer):
            for number, held in enumerate(optimizer.slices):
                if "hp_params" in kinds and held.low is not None:
                    add(valued, held.master)
                if "optim_states" in kinds:
                    for state in optimizer.stepper.memory_of(number):
                        add(valued, state)
                if "lp_grads" in kinds:
                    read = reducer.grad_slice if optimizer.options.partial_slices else reducer.grad
                    add(valued if reducer.has_grad(held.flat) else empty, read(held.flat))
        return valued, empty

    def _refuse_without_states(self, call, weights_only=False):
        if self._resting is not None and (not weights_only or self._managed.away == "lp_params"):
            raise RuntimeError(f"{call}: states of this engine are away since offload_states(): call reload_states() first")
