# SPDX-License-Identifier: Apache-2.0
"""Starting, adopting and asking about torch process groups. A group handle is a torch ProcessGroup, None the world."""
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from deepspeed._environment import read
from deepspeed.comm import flight, rendezvous, watch
from deepspeed.comm.recorder import recorder
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT, default_pg_timeout
from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.logs import log_dist, logger

ProcessGroup = dist.ProcessGroup


class NotInitializedError(RuntimeError, AssertionError):
    """A question about the process group before there is one."""


class BackendError(RuntimeError):
    """The backend asked for cannot work on this machine."""


def is_available():
    return dist.is_available()


def is_initialized():
    return dist.is_available() and dist.is_initialized()


def _require(what):
    if not is_initialized():
        raise NotInitializedError(f"{what} needs a process group: call deepspeed.init_distributed() first")


def init_distributed(dist_backend=None, auto_mpi_discovery=True, distributed_port=TORCH_DISTRIBUTED_DEFAULT_PORT, verbose=True,
                     timeout=default_pg_timeout, init_method=None, dist_init_required=None, config=None, rank=-1, world_size=-1):
    """Starts the world process group, or adopts the one there is.

    dist_backend: a torch.distributed backend; None takes the accelerator's, with Gloo for tensors on the host.
    auto_mpi_discovery: without RANK and WORLD_SIZE in the environment, read those of MPI, Slurm, Azure ML or SageMaker.
    dist_init_required: False forbids starting one; it is an error then if there is none.
    init_method, rank, world_size: as in torch.distributed.init_process_group, instead of the environment.
    config: our configuration; its `comms_logger` and `hang_detection` sections are applied.
    A process that nobody launched becomes a world of one rank. Hang detection (deepspeed.comm.watch) starts with the world.
    """
    recorder.configure(config)
    _start_or_adopt(dist_backend, auto_mpi_discovery, distributed_port, verbose, timeout, init_method, dist_init_required, rank, world_size)
    watch.start(timeout, getattr(config, "hang_detection", None))


def _start_or_adopt(dist_backend, auto_mpi_discovery, distributed_port, verbose, timeout, init_method, dist_init_required, rank,
                    world_size):
    if is_initialized():
        _adopt()
        return
    if dist_init_required is False:
        raise NotInitializedError("init_distributed: dist_init_required is False, but torch.distributed is not initialised")
    backend = choose_backend(dist_backend)
    if init_method is not None and rank >= 0 and world_size > 0:
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
        return
    found = rendezvous.find(default_port=distributed_port, discover=auto_mpi_discovery)
    if found is None:
        _start_alone(backend, timeout, verbose)
        return
    os.environ.update(found.variables())  # for callers that read them, and for the device choice
    _set_device(found.local_rank)
    log_dist(f"starting {found.world_size} ranks on {backend} at {found.master_addr}:{found.master_port} (from: {found.source})")
    dist.init_process_group(backend, init_method=init_method or "env://", rank=found.rank, world_size=found.world_size,
                            timeout=timeout)


def _adopt():
    """The user's own group: we only make sure that later readers find a LOCAL_RANK where it can be known."""
    if read("LOCAL_RANK") is None and dist.get_world_size() == 1:
        os.environ["LOCAL_RANK"] = "0"


def _start_alone(backend, timeout, verbose):
    if verbose:
        logger.info("nobody launched this process with a rank: it becomes a world of one")
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _set_device(local_rank):
    """Makes this rank's GPU the current one, so that NCCL and the caller's `.cuda()` agree."""
    accelerator = get_accelerator()
    if accelerator._name == "cpu":
        return
    count = accelerator.device_count()
    if local_rank >= count:
        raise BackendError(f"LOCAL_RANK is {local_rank}, but this host shows {count} {accelerator._name} device"
                           f"{'s' if count != 1 else ''}: start at most one process for each")
    accelerator.set_device(local_rank)


def choose_backend(requested=None):
    """The torch backend string: host tensors always have Gloo, device tensors the accelerator's own."""
    accelerator = get_accelerator()
    own = accelerator.communication_backend_name()
    if requested is None:
        requested = own if own == "gloo" else f"cpu:gloo,{accelerator._name}:{own}"
    if requested == "ccl" and not hasattr(dist.Backend, "CCL"):
        log_dist("backend ccl is not installed: Gloo does its work")
        requested = "gloo"
    if "nccl" in requested:
        if not dist.is_nccl_available():
            raise BackendError(f"backend {requested!r} needs NCCL, and the installed torch is built without it; use gloo")
        if not torch.cuda.is_available():
            raise BackendError(f"backend {requested!r} needs an NVIDIA GPU, and none was found; use gloo, or leave dist_backend out")
    return requested


def set_backend():
    """Adopts torch.distributed's group as ours (there is nothing to copy: the handles are the same)."""
    _require("set_backend")
    _adopt()


_destroy_listeners = []


def on_destroy(listener):
    """Calls `listener()` when the world ends, for whoever keeps groups."""
    _destroy_listeners.append(listener)


def destroy_process_group(group=None):
    """Ends `group`, or all groups. Harmless when there is none."""
    if not is_initialized():
        return
    whole_world = group is None or group is dist.group.WORLD
    if whole_world:
        watch.stop()
        flight.forget()
    dist.destroy_process_group(group)
    if whole_world:
        for listener in _destroy_listeners:
            listener()


def new_group(ranks):
    """A group of these global ranks. Every rank of the world must call it, in the same order of calls."""
    _require("new_group")
    return dist.new_group(ranks)


def get_world_group():
    _require("get_world_group")
    return dist.group.WORLD


def get_world_size(group=None):
    """Number of ranks in `group`; -1 when this rank is not in it."""
    _require("get_world_size")
    return dist.get_world_size(group)


def get_rank(group=None):
    """This process's rank in `group`; -1 when it is not in it."""
    _require("get_rank")
    return dist.get_rank(group)


def get_local_rank():
    """This process's number on its host."""
    _require("get_local_rank")
    local_rank = read("LOCAL_RANK")
    if local_rank is None:
        if dist.get_world_size() == 1:
            return 0
        raise rendezvous.RendezvousError("environment variable LOCAL_RANK missing: it chooses the device of each process on a host. "
                                         "`deepspeed` and `torchrun` set it.")
    return local_rank


def get_global_rank(group=None, group_rank=0):
    """The world rank of rank `group_rank` of `group`."""
    _require("get_global_rank")
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group=None):
    """The world ranks of `group`, in the group's order."""
    _require("get_all_ranks_from_group")
    return dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)


def initialize_mesh_device(mesh_shape, mesh_dim_names):
    """A torch DeviceMesh over the world; the product of `mesh_shape` must be the world size."""
    _require("initialize_mesh_device")
    size, world = 1, dist.get_world_size()
    for extent in mesh_shape:
        size *= extent
    if size != world:
        extents = " x ".join(map(str, mesh_shape))
        raise ValueError(f"a mesh of {extents} {tuple(mesh_dim_names)} has {size} places, the world has {world} ranks")
    return init_device_mesh(get_accelerator()._name, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))


def enable_symm_mem_for_group(group_name):
    """Allows torch's symmetric memory on the group of this name (CUDA)."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group as enable

    enable(group_name)
