# SPDX-License-Identifier: Apache-2.0
"""Where training state rests while nobody uses it: in memory, or in files of a folder that the configuration names."""
import os
from dataclasses import dataclass

from deepspeed._native import lib

TILE_BYTES = 4 << 20     # of one array that the optimizer's step streams through memory
_FEWEST_TILES = 3        # one read, one worked on, one written
_QUEUE_DEPTH = 32
_BLOCK_ALIGN = 4096
_MOST_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Tiers:
    rest: object = None              # lib().FileRest of masters, optimizer states and gradient slices; None: memory
    parameter_folder: str = ""       # where this rank's parameters rest; "": memory
    parameters_in_memory: int = 0    # with a folder: elements of them that rest in memory all the same


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


def _rest(config, section):
    aio = config.aio
    block = min(max(int(aio.block_size) // _BLOCK_ALIGN, 1) * _BLOCK_ALIGN, _MOST_BLOCK_BYTES)
    depth = int(aio.queue_depth) if config.is_set("aio.queue_depth") else _QUEUE_DEPTH
    threads = int(aio.intra_op_parallelism) if config.is_set("aio.intra_op_parallelism") else 4
    return lib().FileRest(_folder(section, "offload_optimizer"), max(_FEWEST_TILES, int(section.buffer_count)), TILE_BYTES, block, depth, threads)


def tiers_of(config, with_optimizer=True):
    """What zero_optimization.offload_optimizer and offload_param say. Makes the folders. The files have no names: they go with the process."""
    zero = config.zero_optimization
    rest = _rest(config, zero.offload_optimizer) if with_optimizer and zero.offload_optimizer.device == "nvme" else None
    if zero.offload_param.device != "nvme":
        return Tiers(rest)
    return Tiers(rest, _folder(zero.offload_param, "offload_param"), int(zero.offload_param.max_in_cpu))
