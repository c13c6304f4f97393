# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from deepspeed.device import numa


def test_ranges():
    assert numa.parse_range("0-3") == [0, 1, 2, 3] and numa.parse_range(" 5 ") == [5]
    assert numa.parse_range_list("3-5,1") == [1, 3, 4, 5]


@pytest.mark.parametrize("text", ["3-1", "a", "", "1-b", "-1"])
def test_bad_ranges(text):
    with pytest.raises(ValueError):
        numa.parse_range(text)


def test_a_core_named_twice():
    with pytest.raises(ValueError, match="names a core twice"):
        numa.parse_range_list("1-3,2")


def test_cores_of_ranks_do_not_overlap():
    cores = list(range(10, 17))
    assert [numa.cores_of_rank(cores, 3, rank) for rank in range(3)] == [[10, 11], [12, 13], [14, 15]]
    with pytest.raises(ValueError, match="cannot bind 8 processes to 7 cores"):
        numa.cores_of_rank(cores, 8, 0)


def test_this_machine():
    cores = numa.physical_cores()
    assert cores and set(cores) <= os.sched_getaffinity(0)


def test_command(monkeypatch):
    monkeypatch.setattr(numa.shutil, "which", lambda name: "/usr/bin/numactl")
    monkeypatch.setattr(numa, "numa_nodes", lambda: {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]})
    assert numa.get_numactl_cmd("0-7", 2, 1) == (4, ["numactl", "-C", "4,5,6,7", "-m", "1"])
    assert numa.get_numactl_cmd("2-5", 1, 0) == (4, ["numactl", "-C", "2,3,4,5", "-m", "0,1"])
    monkeypatch.setattr(numa, "numa_nodes", lambda: {0: [0, 1, 2, 3]})
    monkeypatch.setattr(numa, "physical_cores", lambda: [0, 2])
    assert numa.get_numactl_cmd(None, 2, 0) == (1, ["numactl", "-C", "0"])
    monkeypatch.setattr(numa.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the program numactl"):
        numa.get_numactl_cmd(None, 2, 0)
