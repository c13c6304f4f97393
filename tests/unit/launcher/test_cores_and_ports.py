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
