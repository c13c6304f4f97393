# SPDX-License-Identifier: Apache-2.0
"""Who am I among how many, and where do we meet: read from what the launcher left in the environment. No torch.

Note [Where the numbers come from]: a launcher of the torchrun kind (ours too) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. If neither RANK nor WORLD_SIZE is set, the variables of Open MPI, Slurm, MPICH/Intel MPI (PMI) and those two
clouds add around them (Azure ML, SageMaker) are tried in the order of `SOURCES`. If nothing is found, the process is
alone. Some but not all of them is an error that names what is missing: guessing would make ranks wait for each other.
"""
import json
import os
import re
from typing import NamedTuple

from deepspeed._environment import read

REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RendezvousError(RuntimeError):
    """The environment says too little or contradicts itself."""


class Rendezvous(NamedTuple):
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    source: str  # who told us

    def variables(self):
        """The same as environment variables, for callers and children that read those."""
        return {"RANK": str(self.rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": str(self.local_rank),
                "MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}


def find(environ=None, default_port=29500, discover=True):
    """The Rendezvous this environment describes, or None for a process that nobody launched."""
    environ = os.environ if environ is None else environ
    if _get(environ, "RANK") or _get(environ, "WORLD_SIZE"):
        found = _from_torchrun(environ, discover)
    elif discover:
        found = next(filter(None, (source(environ, default_port) for source in SOURCES)), None)
    else:
        found = None
    return None if found is None else _checked(found)


def _get(environ, name):
    return environ.get(name) or None


def _from_torchrun(environ, discover):
    missing = [name for name in REQUIRED if not _get(environ, name)]
    if missing == ["LOCAL_RANK"] and discover:
        local_rank = next((int(environ[name]) for name in _LOCAL_RANK_ELSEWHERE if _get(environ, name)), None)
        if local_rank is not None:
            environ = dict(environ, LOCAL_RANK=str(local_rank))
            missing = []
    if missing:
        there = ", ".join(f"{name}={environ[name]}" for name in REQUIRED if _get(environ, name))
        raise RendezvousError(
            f"environment variable{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing while {there} "
            f"{'are' if ',' in there else 'is'} set. Start the script with `deepspeed`, `torchrun`, `mpirun` or `srun`, or set all of "
            f"{', '.join(REQUIRED)}; with none of them set the process runs alone.")
    return Rendezvous(read("RANK", environ), read("WORLD_SIZE", environ), read("LOCAL_RANK", environ),
                      environ["MASTER_ADDR"], read("MASTER_PORT", environ), "environment")


def _checked(found):
    if not 0 <= found.rank < found.world_size:
        raise RendezvousError(f"rank {found.rank} is outside of a world of {found.world_size} (from: {found.source})")
    if not 0 <= found.local_rank < found.world_size:
        raise RendezvousError(f"LOCAL_RANK {found.local_rank} is outside of a world of {found.world_size} "
                              f"(from: {found.source})")
    if not 0 < found.master_port < 65536:
        raise RendezvousError(f"MASTER_PORT {found.master_port} is not a port (from: {found.source})")
    return found


_LOCAL_RANK_ELSEWHERE = ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID", "PMI_LOCAL_RANK",
                         "MV2_COMM_WORLD_LOCAL_RANK")


def _number(environ, name, source):
    value = _get(environ, name)
    if value is None:
        raise RendezvousError(f"environment variable {name} missing, although {source} started this process")
    try:
        return int(value)
    except ValueError:
        raise RendezvousError(f"environment variable {name}={value!r} (from {source}) is not an integer") from None


def _meeting_point(environ, default_port, source, world_size, local_size=None, fallback_addr=None):
    """(address, port) of rank 0 for launchers that do not say it by MASTER_ADDR."""
    addr = _get(environ, "MASTER_ADDR") or fallback_addr
    if addr is None:
        if world_size != 1 and world_size != local_size:
            raise RendezvousError(f"environment variable MASTER_ADDR missing: {source} started {world_size} processes on more "
                                  "than one host and does not say where rank 0 is. Export MASTER_ADDR (and MASTER_PORT) "
                                  "with the host name of rank 0.")
        addr = "127.0.0.1"
    port = read("MASTER_PORT", environ)
    return addr, default_port if port is None else port


def _from_sagemaker(environ, default_port):
    if "SM_TRAINING_ENV" not in environ or "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    training = json.loads(environ["SM_TRAINING_ENV"])
    hosts = training.get("hosts") or [None]
    return _from_openmpi(environ, default_port, "SageMaker", fallback_addr=hosts[0])


def _from_azureml(environ, default_port):
    if "AZUREML_EXPERIMENT_ID" not in environ or "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    node = _get(environ, "AZ_BATCH_MASTER_NODE")  # host:port
    if node:
        addr, _, port = node.partition(":")
        return _from_openmpi(environ, int(port) if port else default_port, "Azure ML", fallback_addr=addr)
    return _from_openmpi(environ, default_port, "Azure ML", fallback_addr=_get(environ, "AZ_BATCHAI_MPI_MASTER_NODE"))


def _from_openmpi(environ, default_port, source="Open MPI", fallback_addr=None):
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    rank = _number(environ, "OMPI_COMM_WORLD_RANK", source)
    world_size = _number(environ, "OMPI_COMM_WORLD_SIZE", source)
    local_rank = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", source)
    local_size = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 0)
    return Rendezvous(rank, world_size, local_rank,
                      *_meeting_point(environ, default_port, source, world_size, local_size, fallback_addr), source)


def _from_slurm(environ, default_port):
    # A batch script has SLURM_PROCID too, but only srun, which starts every rank, sets the number of tasks of its step.
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    rank = _number(environ, "SLURM_PROCID", "Slurm")
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", "Slurm")
    local_rank = _number(environ, "SLURM_LOCALID", "Slurm")
    nodes = _get(environ, "SLURM_STEP_NODELIST") or _get(environ, "SLURM_JOB_NODELIST")
    first = first_slurm_host(nodes) if nodes else None
    return Rendezvous(rank, world_size, local_rank,
                      *_meeting_point(environ, default_port, "Slurm", world_size, fallback_addr=first), "Slurm")


def first_slurm_host(node_list):
    """"gpu[003-007,9],login" -> "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]*)\])?([^,\[]*)", node_list)
    if match is None:
        raise RendezvousError(f"cannot read the first host of the Slurm node list {node_list!r}")
    prefix, numbers, suffix = match.group(1), match.group(2), match.group(3)
    return prefix if numbers is None else prefix + re.split("[-,]", numbers)[0] + suffix


def _from_pmi(environ, default_port):
    """MPICH and Intel MPI."""
    if "PMI_RANK" not in environ or "PMI_SIZE" not in environ:
        return None
    rank, world_size = _number(environ, "PMI_RANK", "PMI"), _number(environ, "PMI_SIZE", "PMI")
    local = next((int(environ[name]) for name in ("MPI_LOCALRANKID", "PMI_LOCAL_RANK") if _get(environ, name)), None)
    local_size = next((int(environ[name]) for name in ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE") if _get(environ, name)), None)
    if local is None:
        if world_size > 1:
            raise RendezvousError("environment variable LOCAL_RANK missing: the MPI launcher set PMI_RANK and PMI_SIZE but neither "
                                  "MPI_LOCALRANKID nor PMI_LOCAL_RANK. Export LOCAL_RANK with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.")
        local = 0
    return Rendezvous(rank, world_size, local, *_meeting_point(environ, default_port, "PMI", world_size, local_size), "PMI")


SOURCES = (_from_sagemaker, _from_azureml, _from_openmpi, _from_slurm, _from_pmi)
