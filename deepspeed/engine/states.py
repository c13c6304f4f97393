# SPDX-License-Identifier: Apache-2.0
"""The engine puts its states away while something else needs the memory, and brings them back."""
import torch

from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.device import get_accelerator
from deepspeed.device.host_memory import trim_heap
from deepspeed.telemetry import logger
from deepspeed.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.zero.optimizer import ShardedOptimizer
from deepspeed.zero.resting import FileCopies, HostCopies, RestingStates

_KINDS = tuple(kind.value for kind in OffloadStateTypeEnum)


class StateMethods:

    def offload_states(self, include=None, device="cpu", pin_memory=True, non_blocking=False):
        """Frees the memory of states until reload_states(). Collective.

        include: kinds (OffloadStateTypeEnum or their values), default all: "optim_states", "hp_params" (fp32 masters), "lp_params" (the
        weights at rest), "lp_grads" (accumulated gradients), "contiguous_grad_buffer" (memory that is only kept for use). device: "cpu", into
        pinned memory with pin_memory; "nvme", into a file without a name under zero_optimization.offload_optimizer.nvme_path (or
        offload_param.nvme_path); "none" does nothing. Where training runs on the CPU, "cpu" is where states are: only spare memory is freed.

        Until they are back, what would read or change kinds that are away raises RuntimeError: step(), saving and loading for any; forward,
        state_dict() and gathering for lp_params; backward for lp_params, lp_grads and contiguous_grad_buffer; safe_get_* and safe_set_* for what
        they touch. Tensors that a caller holds are not watched: their values are undefined meanwhile.

        On an accelerator only memory that torch has allocated can be freed, which is that of most optimizer states. What the engine's own
        buffers hold (lp_params, fp32 masters and gradients for the most part), stays where it is; a warning names these kinds, once. They count
        as away all the same.

        What goes wrong on one rank (a folder that cannot be written, a full disk) is raised on all as CheckpointError, with nothing freed.
        """
        place = OffloadDeviceEnum(getattr(device, "value", getattr(device, "type", device)))
        kinds = self._kinds_of(include)
        self._refuse_without_states("offload_states")
        if self._managed is None or place == OffloadDeviceEnum.none:
            return
        self._finish_save()
        self.empty_partition_cache()
        if place == OffloadDeviceEnum.cpu and self.device.type == "cpu":
            trim_heap()
            return
        managed, ranks = self._managed, Ranks()
        folder = self._folder_for_states() if place == OffloadDeviceEnum.nvme else None
        resting = RestingStates(*self._tensors_of(kinds))
        try:
            copies = ranks.attempt(lambda: HostCopies(pin_memory, non_blocking) if folder is None else FileCopies(folder), "offload_states")
            ranks.attempt(lambda: resting.keep(copies), "offload_states")
        except CheckpointError:
            resting.drop()
            raise
        managed.transports.world.barrier("offload_states")   # a peer may still be reading from what goes
        managed.put_away(kinds, resting, self.module)
        self._refuse_backwards()
        resting.free()
        get_accelerator().empty_cache()
        trim_heap()
        if resting.staying:
            logger.warning_once(f"offload_states: memory of {', '.join(resting.staying)} stays on {self.device}: it belongs to the engine's own "
                                "buffers, not to torch's allocator, and cannot be freed without losing references to it")

    def reload_states(self, non_blocking=False):
        """Brings back what offload_states() has put away, bit for bit. Collective. CheckpointError on all ranks when one of them fails: the states
        are still away then, and the call may be repeated."""
        managed = self._managed
        if managed is None or managed.resting is None:
            return

        def work():
            managed.resting.bring_back(non_blocking)
            if self.device.type == "cuda" and not non_blocking:
                torch.cuda.current_stream(self.device).synchronize()

        Ranks().attempt(work, "reload_states")
        managed.bring_home()
        self._refuse_backwards()
        world = managed.transports.world
        world.barrier("reload_states")
        managed.store.publish_all()
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
        """(tensors whose values matter, others), each a (kind, tensor), each memory once."""
        store, reducer, optimizer = self._managed.store, self._managed.reducer, self.optimizer
        valued, empty, seen = [], [], set()

        def add(table, kind, tensor):
            if kind in kinds and tensor is not None and tensor.numel() and tensor.data_ptr() not in seen and not self._managed.rests_elsewhere(tensor):
                seen.add(tensor.data_ptr())
                table.append((kind, tensor.detach()))

        for flat in range(store.flats):
            if not store.in_file(flat):
                add(valued, "lp_params", store.shard(flat) if store.shards_params else store.full(flat))
            if store.shards_params:
                add(valued, "lp_params", store.full(flat))   # of units that stay gathered
        if isinstance(optimizer, ShardedOptimizer):
            for number, held in enumerate(optimizer.slices):
                if held.low is not None:
                    add(valued, "hp_params", held.beside)
                for state in optimizer.stepper.memory_of(number):
                    add(valued, "optim_states", state)
                if "lp_grads" in kinds:
                    read = reducer.grad_slice if optimizer.options.partial_slices else reducer.grad
                    add(valued if reducer.has_grad(held.flat) else empty, "lp_grads", read(held.flat))
        return valued, empty

    def _refuse_without_states(self, call, *kinds):
        """kinds: what the call reads or changes; none: all."""
        if self._managed is not None:
            self._managed.refuse_while_away(call, *kinds)

    def _refuse_backwards(self):
        """A plain loss.backward() asks nobody: the reducer refuses."""
        if self._managed.reducer is not None:
            self._set_default_scale()
