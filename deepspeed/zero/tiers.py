# SPDX-License-Identifier: Apache-2.0
"""Where training state rests while nobody uses it: where the model runs, in the host's memory, or in files of a folder that the configuration names.

Note [Two ways for parameters]: ranks that run on the CPU gather each other's shards out of mapped files. An accelerator gathers out of its own memory
only, so there a shard rests on the host, in memory or in a file, and goes to its place in the gathered unit first.
"""
import os
from dataclasses import dataclass

from deepspeed._native import core, lib
from deepspeed.telemetry import logger

_QUEUE_DEPTH = 32
_BLOCK_ALIGN = 4096
_MOST_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Tiers:
    rest: object = None              # lib().SliceRest of masters, optimizer states and gradient slices; None: where the model runs
    rest_share: float = 1.0          # of the trained elements, for which that is so
    parameter_rest: object = None    # lib().SliceRest of shards that do not lie where the model runs
    parameter_folder: str = ""       # for ranks on the CPU: where shards rest in files; "": memory
    parameters_in_memory: int = 0    # with that folder: elements of them that rest in memory all the same
    speculates: bool = False         # masters and states have second places, for updates that are computed beside backward

    @property
    def moves_parameters(self):
        return self.parameter_rest is not None or bool(self.parameter_folder)


    @property
    def in_files(self):
        return bool(self.parameter_folder) or any(hasattr(rest, "folder") for rest in (self.rest, self.parameter_rest))


IN_MEMORY = Tiers()


def _folder(section, name):
    path = os.path.abspath(os.path.expanduser(str(section.nvme_path)))
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"zero_optimization.{name}.nvme_path: the folder cannot be made: {error.strerror}", path) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"zero_optimization.{name}.nvme_path: {path} cannot be written by this user")
    return path


def speculates(zero):
    """Whether updates are computed beside backward. With hybrid sharding no slice is final before the replicas have added theirs up."""
    hybrid = int(zero.stage) == 3 and int(zero.zero_hpz_partition_size or 1) > 1
    return bool(zero.offload_optimizer.super_offload) and not hybrid


def block_bytes(aio):
    """What one request reads or writes at most, by the section `aio`."""
    return min(max(int(aio.block_size) // _BLOCK_ALIGN, 1) * _BLOCK_ALIGN, _MOST_BLOCK_BYTES)


def _in_files(config, section, name, apart):
    aio = config.aio
    block = block_bytes(aio)
    tiles = core().step_tiles(int(section.buffer_count), block)
    depth = int(aio.queue_depth) if config.is_set("aio.queue_depth") else _QUEUE_DEPTH
    threads = int(aio.intra_op_parallelism) if config.is_set("aio.intra_op_parallelism") else 4
    return lib().FileRest(_folder(section, name), tiles.buffers, tiles.tile_bytes, block, depth, threads,
                          apart=apart, pinned=apart and bool(section.pin_memory), second_places=name == "offload_optimizer" and speculates(config.zero_optimization),
                          most_in_memory=int(getattr(section, "max_in_cpu", 0)))


def _rest(config, section, name, apart):
    """For an accelerator (`apart`) all of it lies elsewhere; for ranks on the CPU the host's memory is where it lies anyway."""
    if section.device == "nvme":
        return _in_files(config, section, name, apart)
    if section.device != "cpu" or not apart:
        return None
    return lib().HostRest(bool(section.pin_memory), core().HOST_TILE_BYTES, name == "offload_optimizer" and speculates(config.zero_optimization))


def tiers_of(config, device, with_optimizer=True):
    """What zero_optimization.offload_optimizer and offload_param say for a model that runs on `device` (torch.device). Makes the folders. The files
    in them have no names: they go with the process."""
    zero, apart = config.zero_optimization, device.type != "cpu"
    rest = _rest(config, zero.offload_optimizer, "offload_optimizer", apart) if with_optimizer else None
    ahead = rest is not None and speculates(zero)
    if apart:
        parameter_rest = _rest(config, zero.offload_param, "offload_param", apart)
        if parameter_rest is not None and rest is None and with_optimizer:
            logger.warning("zero_optimization.offload_param without offload_optimizer: the optimizer's state follows the parameters to the host")
            rest = lib().HostRest(bool(zero.offload_param.pin_memory), core().HOST_TILE_BYTES)
        share = 1.0 if parameter_rest is not None else float(zero.offload_optimizer.ratio)
        return Tiers(rest, share, parameter_rest, speculates=ahead)
    if zero.offload_param.device != "nvme":
        return Tiers(rest, float(zero.offload_optimizer.ratio) if rest is not None else 1.0, speculates=ahead)
    return Tiers(rest, float(zero.offload_optimizer.ratio) if rest is not None else 1.0, None, _folder(zero.offload_param, "offload_param"),
                 int(zero.offload_param.max_in_cpu), ahead)
