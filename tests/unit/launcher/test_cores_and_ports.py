# SPDX-License-Identifier: Apache-2.0

import os
import socket

import pytest

from deepspeed.launcher import devices
from deepspeed.launcher.devices import parse_core_list, share_cores
from deepspeed.launcher.port import reserve_port


def test_core_list():
    assert parse_core_list("1,3-5,7") == [1, 3, 4, 5, 7]
    for bad in ("", "a", "3-", "5-3", "1,,2", "1,1", "1-3,2"):
        with pytest.raises(ValueError, match="core list"):
            parse_core_list(bad)


def test_equal_contiguous_shares(monkeypatch):
    monkeypatch.setattr(devices, "physical_cores", lambda: [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert share_cores(2) == [({0, 4, 1, 5}, 2), ({2, 6, 3, 7}, 2)]
    assert share_cores(3) == [({0, 4}, 1), ({1, 5}, 1), ({2, 6}, 1)]
    with pytest.raises(ValueError, match="4 cores cannot be shared out among 5"):
        share_cores(5)


def two_nodes(monkeypatch, cores):
    """Even CPUs on node 0, odd ones on node 1, as many machines number them."""
    monkeypatch.setattr(devices, "physical_cores", lambda: [[cpu] for cpu in range(cores)])
    monkeypatch.setattr(devices, "memory_nodes", lambda: {cpu: cpu % 2 for cpu in range(cores)})


def test_a_share_lies_on_one_memory_node(monkeypatch):
    two_nodes(monkeypatch, 8)
    assert share_cores(2) == [({0, 2, 4, 6}, 4), ({1, 3, 5, 7}, 4)]
    assert share_cores(4) == [({0, 2}, 2), ({4, 6}, 2), ({1, 3}, 2), ({5, 7}, 2)]
    assert share_cores(1) == [(set(range(8)), 8)]
    two_nodes(monkeypatch, 12)   # 4 cores each of 6 a node: the third has what both leave
    assert share_cores(3) == [({0, 2, 4, 6}, 4), ({1, 3, 5, 7}, 4), ({8, 10, 9, 11}, 4)]


def test_a_share_lies_beside_its_gpu(monkeypatch):
    two_nodes(monkeypatch, 8)
    assert share_cores(2, None, [1, 0]) == [({1, 3, 5, 7}, 4), ({0, 2, 4, 6}, 4)]
    assert share_cores(4, None, [1, None, 1, 0]) == [({1, 3}, 2), ({4, 6}, 2), ({5, 7}, 2), ({0, 2}, 2)]
    assert share_cores(2, None, [1, 1]) == [({1, 3, 5, 7}, 4), ({0, 2, 4, 6}, 4)]   # no room for both
    assert share_cores(2, None, [7, None]) == share_cores(2)
    for ranks in range(1, 9):
        for wanted in (None, [rank % 3 for rank in range(ranks)]):
            shares = share_cores(ranks, None, wanted)
            cpus = [cpu for share, _ in shares for cpu in share]
            assert len(cpus) == len(set(cpus)) == ranks * (8 // ranks) and {threads for _, threads in shares} == {8 // ranks}


def test_memory_nodes_of_cpus_and_gpus(tmp_path):
    for node, cpus in ((0, "0-1,4"), (1, "2-3"), (2, "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    (tmp_path / "possible").write_text("0-2\n")
    assert devices.memory_nodes(str(tmp_path)) == {0: 0, 1: 0, 4: 0, 2: 1, 3: 1}
    assert devices.memory_nodes(str(tmp_path / "missing")) == {}
    for bus, uuid, node in (("0000:1A:00.0", "GPU-one", 0), ("0000:8B:00.0", "GPU-two", 1), ("0000:9C:00.0", "GPU-three", -1)):
        (tmp_path / "proc/driver/nvidia/gpus" / bus).mkdir(parents=True)
        (tmp_path / "proc/driver/nvidia/gpus" / bus / "information").write_text(f"Model: x\nGPU UUID:  {uuid}\n")
        (tmp_path / "sys/bus/pci/devices" / bus.lower()).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / bus.lower() / "numa_node").write_text(f"{node}\n")
    assert [devices.gpu_node(gpu, str(tmp_path)) for gpu in (0, 1, 2, 3, "GPU-two", "GPU-four")] == [0, 1, None, None, 1, None]


def test_shares_of_a_list(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert share_cores(2, "0,2-4") == [({0, 2}, 2), ({3, 4}, 2)]
    with pytest.raises(ValueError, match="core 9 is not available"):
        share_cores(2, "0,9")


def test_physical_cores_are_within_what_we_may_use():
    cores = [cpu for core in devices.physical_cores() for cpu in core]
    assert sorted(cores) == sorted(os.sched_getaffinity(0)) and 1 <= devices.usable_cores() <= len(cores)


def test_a_free_port_is_taken_as_it_is():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reserved = reserve_port(port)
    assert reserved.port == port
    # Held for this launcher: another one gets something else, until this one is done.
    other = reserve_port(port)
    assert other.port != port
    other.close(), reserved.close()
    again = reserve_port(port)
    assert again.port == port
    again.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_busy_port_is_replaced(address):
    with socket.socket() as server:
        server.bind((address, 0))
        server.listen()
        reserved = reserve_port(server.getsockname()[1])
        assert reserved.port != server.getsockname()[1]
        reserved.close()


def test_port_zero_is_any():
    reserved = reserve_port(0)
    assert reserved.port > 0
    reserved.close()
