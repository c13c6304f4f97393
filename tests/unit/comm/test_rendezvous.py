# SPDX-License-Identifier: Apache-2.0
"""Every launcher's variables, and what is said when some are missing. Pure functions of a mapping; and two real MPI launchers."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed.comm.rendezvous import Rendezvous, RendezvousError, find, first_slurm_host

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def test_nobody_launched_this_process():
    assert find({}) is None
    assert find({"LOCAL_RANK": "0", "MASTER_ADDR": "x"}) is None


def test_torchrun():
    found = find(TORCHRUN)
    assert found == Rendezvous(3, 8, 1, "node0", 1234, "environment")
    assert found.variables() == TORCHRUN


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_missing_variable_is_named(name):
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(RendezvousError, match=f"environment variable {name} missing while"):
        find(environ)


def test_several_missing_variables_are_named():
    with pytest.raises(RendezvousError, match="variables LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing while RANK=0, WORLD_SIZE=2"):
        find({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("name,value,message", [
    ("RANK", "8", "rank 8 is outside of a world of 8"), ("RANK", "-1", "rank -1"), ("LOCAL_RANK", "9", "LOCAL_RANK 9"),
    ("MASTER_PORT", "70000", "70000 is not a port"), ("WORLD_SIZE", "many", "WORLD_SIZE='many' is not an integer"),
])
def test_impossible_values(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        find({**TORCHRUN, name: value})


def test_local_rank_may_come_from_the_mpi_launcher():
    environ = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}
    assert find({**environ, "OMPI_COMM_WORLD_LOCAL_RANK": "2"}).local_rank == 2
    with pytest.raises(RendezvousError, match="LOCAL_RANK"):
        find({**environ, "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, discover=False)


def test_torchrun_wins_over_others():
    assert find({**TORCHRUN, **OPENMPI}).rank == 3 and find({**TORCHRUN, **OPENMPI}).world_size == 8


def test_openmpi_with_address():
    assert find({**OPENMPI, "MASTER_ADDR": "head", "MASTER_PORT": "77"}) == Rendezvous(3, 4, 1, "head", 77, "Open MPI")


def test_openmpi_on_one_host_needs_no_address():
    found = find({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, default_port=4321)
    assert (found.master_addr, found.master_port) == ("127.0.0.1", 4321)


def test_openmpi_on_many_hosts_without_address():
    with pytest.raises(RendezvousError, match="MASTER_ADDR missing: Open MPI started 4 processes on more than one host"):
        find(OPENMPI)


def test_openmpi_not_asked():
    assert find(OPENMPI, discover=False) is None


def test_openmpi_incomplete():
    with pytest.raises(RendezvousError, match="OMPI_COMM_WORLD_LOCAL_RANK missing, although Open MPI"):
        find({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"})


SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[007-008]"}


def test_slurm():
    assert find(SLURM) == Rendezvous(5, 8, 1, "gpu007", 29500, "Slurm")
    assert find({**SLURM, "MASTER_ADDR": "other"}).master_addr == "other"


def test_slurm_batch_script_is_not_a_rank():
    assert find({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) is None


@pytest.mark.parametrize("nodes,first", [("node1", "node1"), ("node1,node2", "node1"), ("gpu[003-007,9],login", "gpu003"),
                                         ("a[5,7]-ib,b", "a5-ib"), ("rack-1-[2]", "rack-1-2")])
def test_first_slurm_host(nodes, first):
    assert first_slurm_host(nodes) == first


def test_pmi():
    environ = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert find(environ) == Rendezvous(1, 2, 1, "127.0.0.1", 29500, "PMI")
    with pytest.raises(RendezvousError, match="LOCAL_RANK missing"):
        find({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "a"})
    assert find({"PMI_RANK": "0", "PMI_SIZE": "1"}).local_rank == 0


def test_azure_ml():
    environ = {**OPENMPI, "AZUREML_EXPERIMENT_ID": "x"}
    assert find({**environ, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000"}) == Rendezvous(3, 4, 1, "10.0.0.4", 6000, "Azure ML")
    assert find({**environ, "AZ_BATCHAI_MPI_MASTER_NODE": "10.0.0.5"}).master_addr == "10.0.0.5"


def test_sagemaker():
    environ = {**OPENMPI, "SM_TRAINING_ENV": json.dumps({"hosts": ["algo-1", "algo-2"], "current_host": "algo-2"})}
    assert find(environ) == Rendezvous(3, 4, 1, "algo-1", 29500, "SageMaker")


@pytest.mark.parametrize("command", [["mpirun.openmpi", "--oversubscribe"], ["mpiexec.mpich"]], ids=["Open MPI", "MPICH"])
def test_ranks_of_a_real_mpi(command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    as_root = ["--allow-run-as-root"] if "openmpi" in command[0] and os.geteuid() == 0 else []
    script = "import os; from deepspeed.comm.rendezvous import find; os.write(1, (repr(tuple(find())) + chr(10)).encode())"
    env = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    out = subprocess.run([*command, *as_root, "-n", "2", sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                         env=dict(env, PYTHONPATH=str(Path(__file__).parents[3])))
    source = "Open MPI" if as_root or "openmpi" in command[0] else "PMI"
    assert sorted(out.stdout.split("\n"))[-2:] == [repr((rank, 2, rank, "127.0.0.1", 29500, source)) for rank in range(2)], out
