# SPDX-License-Identifier: Apache-2.0
"""A host of a job that another host has started: it calls back and waits until all are there."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass

from .failures import Failure
from .line import Line, Lost, connect, own_addresses
from .port import ReservedPort, reserve_port

_GO_S = 24 * 3600.0  # a batch system may start the other hosts late; the launching host says when it gives up
# Number of a process among those that MPI or Slurm has started.
_PLACES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


@dataclass
class Membership:
    line: Line
    node_rank: int
    master_addr: str
    master_port: int
    reserved: ReservedPort | None  # of the host where the processes meet


def join(contact: str, node_rank: int, wanted_port: int) -> Membership:
    """``contact`` as ``head.Listener`` gives it. ``node_rank`` -1: the launching host finds out. ``Lost`` when the job is off."""
    match = re.fullmatch(r"([0-9a-f]+)@(\d+)@([^@]+)", contact)
    if match is None:
        raise ValueError(f"--head {contact!r}: not what the launching host says")
    line = connect(match[3].split(","), int(match[2]), "the launching host")
    reserved = reserve_port(wanted_port)
    line.send(hello=match[1], node_rank=node_rank, names=_names(), place=_place(), port=reserved.port)
    go = line.wait_for("go", _GO_S)
    if go["node_rank"] != 0:
        reserved.close()
        reserved = None
    return Membership(line, go["node_rank"], go["master_addr"], go["master_port"], reserved)


def _names() -> list[str]:
    """What a hostfile may call this host."""
    host = socket.gethostname()
    names = [host, host.split(".")[0], os.environ.get("SLURMD_NODENAME", ""), *own_addresses([]), "localhost"]
    return [name for name in dict.fromkeys(names) if name]


def _place() -> int:
    found = (os.environ.get(name, "") for name in _PLACES)
    return next((int(text) for text in found if text.isdigit()), -1)


def refuse(line: Line, why: str) -> None:
    """The job cannot be started on this host."""
    try:
        now = time.monotonic()
        line.send(done=1, failures=[Failure(socket.gethostname(), None, 1, now, why=why).message(now)])
    except Lost:
        pass  # it knows, then
