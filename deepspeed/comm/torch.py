# SPDX-License-Identifier: Apache-2.0
"""TorchBackend: the collectives as methods of one object, for callers that pass a backend around."""
from deepspeed.comm import collectives, process_group
from deepspeed.comm.reduce_op import to_torch
from deepspeed.constants import default_pg_timeout


class TorchBackend:
    """Starts the world on construction (or adopts it); every function of deepspeed.comm is a method."""

    def __init__(self, backend=None, timeout=default_pg_timeout, init_method=None, rank=-1, world_size=-1, name="torch"):
        self.name = name
        self.backend_name = backend
        self.single_gpu_mode = False
        process_group.init_distributed(backend, timeout=timeout, init_method=init_method, rank=rank, world_size=world_size)

    def __getattr__(self, name):
        for home in (collectives, process_group):
            if hasattr(home, name):
                return getattr(home, name)
        raise AttributeError(f"TorchBackend has no {name!r}")

    def is_initialized(self):
        return process_group.is_initialized()

    @staticmethod
    def get_all_gather_function():
        return collectives.all_gather_into_tensor

    @staticmethod
    def _reduce_op(op):
        return to_torch(op)
