# SPDX-License-Identifier: Apache-2.0
"""How many ranks there are and how many of them share each sample, with the source of each number for messages."""
import sys
from typing import NamedTuple

from deepspeed._environment import read


class World(NamedTuple):
    size: int
    size_source: str
    ranks_per_sample: int = 1  # model-, pipeline- and sequence-parallel ranks see the same samples
    ranks_per_sample_source: str = ""  # empty: nobody has said yet, so `sequence_parallel_size` of the document may


def _process_group():
    """torch.distributed when some caller has imported and initialised it, else None."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed
    return None


def _all_ranks():
    distributed = _process_group()
    if distributed is not None:
        return distributed.get_world_size(), "torch.distributed"
    size = read("WORLD_SIZE")
    if size is not None:
        return size, "WORLD_SIZE in the environment"
    return 1, "one process: no process group and no WORLD_SIZE in the environment"


def rank():
    distributed = _process_group()
    return distributed.get_rank() if distributed is not None else read("RANK") or 0


def find_world(mpu=None, mesh_device=None):
    """The World seen from this process. `mpu`: a model-parallel unit in Megatron's manner; `mesh_device`: a torch DeviceMesh
    with a dimension named "data_parallel" (or "dp")."""
    size, source = _all_ranks()
    if mesh_device is not None:
        names = tuple(mesh_device.mesh_dim_names or ())
        name = next((known for known in ("data_parallel", "dp") if known in names), None)
        if name is None:
            raise ValueError(f"mesh_device needs a dimension named \"data_parallel\", found {names}")
        return World(mesh_device.size(names.index(name)), f"dimension {name!r} of mesh_device", 1, "mesh_device")
    if mpu is None:
        return World(size, source)
    if hasattr(mpu, "get_data_parallel_world_size"):
        return World(mpu.get_data_parallel_world_size(), "mpu.get_data_parallel_world_size()", 1, "mpu")
    if hasattr(mpu, "get_sequence_parallel_world_size"):
        return World(size, source, mpu.get_sequence_parallel_world_size(), "mpu.get_sequence_parallel_world_size()")
    return World(size, source)
