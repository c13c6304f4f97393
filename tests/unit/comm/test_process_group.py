# SPDX-License-Identifier: Apache-2.0
"""Starting, adopting and refusing process groups; each start in a process of its own."""
import os
import socket

import pytest
import torch
import torch.distributed as dist

from deepspeed import comm
from tests.parity import forked
from tests.parity.launch import on_ranks

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_python(code, **environ):
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    return forked.run_python(code, {**clean, "DS_ACCELERATOR": "cpu", **environ})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_lone_process_is_a_world_of_one():
    done = run_python("import deepspeed, os; deepspeed.init_distributed(); c = deepspeed.comm;"
                      "print(c.get_world_size(), c.get_rank(), c.get_local_rank(), os.environ['LOCAL_RANK'], 'RANK' in os.environ)")
    assert done.stdout == "1 0 0 0 False\n", done.stderr


def test_again_after_destroy():
    done = run_python("import deepspeed; c = deepspeed.comm\n"
                      "for _ in range(2): c.init_distributed(); print(c.get_world_size()); c.destroy_process_group()\n"
                      "print(c.is_initialized()); c.destroy_process_group()")
    assert done.stdout == "1\n1\nFalse\n", done.stderr


def test_from_the_environment():
    done = run_python("import deepspeed; deepspeed.init_distributed(); c = deepspeed.comm; import torch;"
                      "print(c.get_world_size(), torch.distributed.get_backend()); c.barrier()",
                      RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    assert done.stdout == "1 gloo\n", done.stderr


def test_discovered_variables_are_left_for_others():
    done = run_python("import deepspeed, os; deepspeed.init_distributed(distributed_port=int(os.environ['PORT']));"
                      "print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')))",
                      OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_LOCAL_RANK="0", PORT=free_port())
    assert done.stdout == "0 1 0 127.0.0.1\n", done.stderr


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "RANK"])
def test_missing_variable_is_named_and_nothing_hangs(missing):
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    del environ[missing]
    done = run_python("import deepspeed; deepspeed.init_distributed()", **environ)
    assert done.returncode == 1 and f"environment variable {missing} missing" in done.stderr


def test_explicit_store_and_rank():
    done = run_python("import deepspeed, os; deepspeed.init_distributed('gloo', init_method='tcp://127.0.0.1:' + os.environ['PORT'],"
                      "rank=0, world_size=1); print(deepspeed.comm.get_world_size())", PORT=free_port())
    assert done.stdout == "1\n", done.stderr


def test_a_user_group_is_adopted():
    done = run_python("import torch.distributed as dist, deepspeed, os\n"
                      "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1); world = dist.group.WORLD\n"
                      "deepspeed.init_distributed(dist_backend='nccl'); deepspeed.comm.init_distributed(dist_init_required=False)\n"
                      "print(deepspeed.comm.get_world_group() is world, deepspeed.comm.get_rank(), os.environ['LOCAL_RANK'])")
    assert done.stdout == "True 0 0\n", done.stderr


def test_forbidden_to_start():
    done = run_python("import deepspeed; deepspeed.init_distributed(dist_init_required=False)")
    assert done.returncode == 1 and "dist_init_required is False" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nccl_without_a_gpu():
    done = run_python("import deepspeed; deepspeed.init_distributed('nccl')")
    assert done.returncode == 1 and "'nccl' needs" in done.stderr and "use gloo" in done.stderr


def test_questions_before_there_is_a_group():
    done = run_python("from deepspeed import comm\n"
                      "print(comm.is_available(), comm.is_initialized())\n"
                      "for ask in (comm.get_rank, comm.get_world_size, comm.get_local_rank, comm.get_world_group):\n"
                      "    try: ask()\n"
                      "    except AssertionError as error: print(error)\n")
    assert done.stdout.splitlines()[0] == "True False"
    assert done.stdout.count("call deepspeed.init_distributed() first") == 4


class AcceleratorStandIn:
    def __init__(self, name, backend):
        self._name, self._backend = name, backend

    def communication_backend_name(self):
        return self._backend


def test_backend_by_accelerator(monkeypatch):
    from deepspeed.comm import process_group

    monkeypatch.setattr(process_group, "get_accelerator", lambda: AcceleratorStandIn("cpu", "gloo"))
    assert process_group.choose_backend() == "gloo"
    monkeypatch.setattr(process_group, "get_accelerator", lambda: AcceleratorStandIn("cuda", "nccl"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert process_group.choose_backend() == "cpu:gloo,cuda:nccl"
    assert process_group.choose_backend("nccl") == "nccl" and process_group.choose_backend("gloo") == "gloo"


@on_ranks(2)
def test_ranks_and_groups():
    rank = dist.get_rank()
    comm.init_distributed()  # adopts
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank()) == (2, rank, rank)
    alone = comm.new_group([1])
    assert comm.get_rank(alone) == (0 if rank == 1 else -1)
    if rank == 1:
        assert comm.get_global_rank(alone, 0) == 1 and comm.get_all_ranks_from_group(alone) == [1]
    assert comm.get_all_ranks_from_group() == [0, 1] and comm.get_global_rank(None, 1) == 1
    comm.destroy_process_group(alone)
    assert comm.is_initialized()


@on_ranks(2)
def test_mesh():
    mesh = comm.initialize_mesh_device((1, 2), ("data_parallel", "sequence_parallel"))
    assert dist.get_world_size(mesh.get_group("sequence_parallel")) == 2
    with pytest.raises(ValueError, match="a mesh of 2 x 2 .* has 4 places, the world has 2 ranks"):
        comm.initialize_mesh_device((2, 2), ("a", "b"))
