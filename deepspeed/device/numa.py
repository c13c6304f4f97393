# SPDX-License-Identifier: Apache-2.0
"""Which cores a process of this host should run on, read from /sys. No torch."""
import os
import shutil
from pathlib import Path

_SYS = Path("/sys/devices/system")


def parse_range(text):
    """"0-3" -> [0, 1, 2, 3]; "5" -> [5]."""
    first, dash, last = text.strip().partition("-")
    try:
        low, high = int(first), int(last) if dash else int(first)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a core number or a range like 0-3") from error
    if low < 0 or high < low:
        raise ValueError(f"{text!r}: the end of a range of cores must not stand before its start")
    return list(range(low, high + 1))


def parse_range_list(text):
    """"1,3-5" -> [1, 3, 4, 5]; sorted; a core named twice is an error."""
    cores = [core for part in text.split(",") for core in parse_range(part)]
    if len(cores) != len(set(cores)):
        raise ValueError(f"{text!r} names a core twice")
    return sorted(cores)


def numa_nodes():
    """{node number: its logical cores}, only nodes that have cores; empty where the kernel does not tell."""
    nodes = {}
    for folder in _SYS.glob("node/node[0-9]*"):
        text = (folder / "cpulist").read_text().strip()
        if text:
            nodes[int(folder.name[4:])] = parse_range_list(text)
    return dict(sorted(nodes.items()))


def physical_cores():
    """One logical core for each physical one that this process may use."""
    allowed = os.sched_getaffinity(0)
    first_sibling = set()
    for core in allowed:
        siblings = _SYS / f"cpu/cpu{core}/topology/thread_siblings_list"
        family = parse_range_list(siblings.read_text()) if siblings.exists() else [core]
        first_sibling.add(min(set(family) & allowed))
    return sorted(first_sibling)


def cores_of_rank(cores, num_local_procs, local_rank):
    """The cores of one of `num_local_procs` processes: consecutive, equally many for each; what is left over stays free."""
    each = len(cores) // num_local_procs
    if each < 1:
        raise ValueError(f"cannot bind {num_local_procs} processes to {len(cores)} cores: one core each at least")
    return cores[local_rank * each:(local_rank + 1) * each]


def get_numactl_cmd(bind_core_list, num_local_procs, local_rank):
    """(cores of this rank, the numactl command line to start it with).

    bind_core_list: text such as "1,3-5", or None for every physical core. Memory is bound to the nodes the cores are on
    when the machine has more than one node.
    """
    if shutil.which("numactl") is None:
        raise RuntimeError("binding processes to cores needs the program numactl, which is not installed")
    cores = parse_range_list(bind_core_list) if bind_core_list else physical_cores()
    mine = cores_of_rank(cores, num_local_procs, local_rank)
    command = ["numactl", "-C", ",".join(map(str, mine))]
    nodes = numa_nodes()
    if len(nodes) > 1:
        touched = [str(node) for node, members in nodes.items() if set(members) & set(mine)]
        command += ["-m", ",".join(touched)]
    return len(mine), command
