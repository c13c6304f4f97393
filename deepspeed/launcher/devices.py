# SPDX-License-Identifier: Apache-2.0
"""What this host has, asked without torch and without creating a CUDA context."""

from __future__ import annotations

import os
import re
from pathlib import Path


def gpu_count() -> int:
    """Number of NVIDIA GPUs the driver offers here; 0 when DS_ACCELERATOR=cpu."""
    if os.environ.get("DS_ACCELERATOR", "").lower() == "cpu":
        return 0
    count = _nvml_count()
    if count is not None:
        return count
    try:
        return sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    except OSError:
        return 0


def _nvml_count() -> int | None:
    """None when the driver's management library is missing or does not work, as in some containers."""
    import ctypes
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    count = ctypes.c_uint()
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return None if failed else count.value


def visible_devices() -> list[str] | None:
    """The user's CUDA_VISIBLE_DEVICES as a list of numbers or UUIDs; None when it is not set."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if text is None else [item.strip() for item in text.split(",") if item.strip()]


def physical_cores() -> list[list[int]]:
    """The cores this process may use, each as the list of its hardware threads, in order of their numbers."""
    allowed = os.sched_getaffinity(0)
    cores: dict[tuple, list[int]] = {}
    for cpu in sorted(allowed):
        cores.setdefault(_siblings(cpu), []).append(cpu)
    return list(cores.values())


def _siblings(cpu: int) -> tuple:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
            return tuple(parse_core_list(file.read().strip()))
    except (OSError, ValueError):
        return (cpu, )


def memory_nodes(system: str = "/sys/devices/system/node") -> dict[int, int]:
    """The memory (NUMA) node of each CPU; empty where the system does not say."""
    nodes: dict[int, int] = {}
    try:
        for name in os.listdir(system):
            if re.fullmatch(r"node\d+", name):
                with open(os.path.join(system, name, "cpulist")) as file:
                    text = file.read().strip()
                nodes.update((cpu, int(name[4:])) for cpu in (parse_core_list(text) if text else ()))
    except (OSError, ValueError):
        return {}
    return nodes


def gpu_node(gpu: int | str, root: str = "/") -> int | None:
    """The memory node that a GPU (its number in the order of the bus, or its UUID) hangs on; None where the system does not say."""
    folder = Path(root, "proc/driver/nvidia/gpus")
    try:
        buses = sorted(os.listdir(folder))
        bus = buses[gpu] if isinstance(gpu, int) else next(bus for bus in buses if gpu in (folder / bus / "information").read_text())
        node = int(Path(root, "sys/bus/pci/devices", bus.lower(), "numa_node").read_text())
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return node if node >= 0 else None


def usable_cores() -> int:
    """Cores that this process can keep busy: what it may run on, less if its control group has a quota."""
    count = len(physical_cores())
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def parse_core_list(text: str) -> list[int]:
    """``1,3-5`` to [1, 3, 4, 5]. ``ValueError`` for anything else, and for a core named twice."""
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"core list {text!r}: {part!r} is neither a number nor a range like 3-5")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if last < first:
            raise ValueError(f"core list {text!r}: {part!r} runs backwards")
        cores += range(first, last + 1)
    if len(set(cores)) != len(cores):
        raise ValueError(f"core list {text!r}: a core is there twice")
    return cores


def share_cores(ranks: int, core_list: str | None = None, wanted_nodes: list | None = None) -> list[tuple[set[int], int]]:
    """Divide cores among the ranks of this host in equal shares: (CPU numbers, threads to use) of each. A list is cut in its order. Otherwise the
    cores of a share lie on one memory node, that of its rank's GPU (wanted_nodes, one a rank, or None) first, as long as a node has that many."""
    if core_list is None:
        cores = physical_cores()
    else:
        wanted = parse_core_list(core_list)
        missing = sorted(set(wanted) - os.sched_getaffinity(0))
        if missing:
            raise ValueError(f"--bind_core_list {core_list}: core {missing[0]} is not available to this process")
        cores = [[cpu] for cpu in wanted]
    if len(cores) < ranks:
        raise ValueError(f"--bind_cores_to_rank: {len(cores)} cores cannot be shared out among {ranks} processes")
    each = len(cores) // ranks
    shares = [cores[rank * each:(rank + 1) * each] for rank in range(ranks)] if core_list is not None else \
        _shares_of_nodes(cores, each, wanted_nodes or [None] * ranks)
    return [({cpu for core in share for cpu in core}, each) for share in shares]


def _shares_of_nodes(cores: list[list[int]], each: int, wanted_nodes: list) -> list[list[list[int]]]:
    node_of = memory_nodes()
    left: dict[int, list[list[int]]] = {}
    for core in cores:
        left.setdefault(node_of.get(core[0], 0), []).append(core)
    shares: list[list[list[int]]] = [[] for _ in wanted_nodes]

    def take(rank: int, node: int, most: int) -> None:
        shares[rank] += left[node][:most]
        del left[node][:most]

    for rank, node in enumerate(wanted_nodes):
        if node is not None and len(left.get(node, ())) >= each:
            take(rank, node, each)
    for rank, share in enumerate(shares):
        whole = next((node for node in sorted(left) if len(left[node]) >= each), None)
        if not share and whole is not None:
            take(rank, whole, each)
    for rank, share in enumerate(shares):   # what is left lies on several nodes
        for node in sorted(left):
            take(rank, node, each - len(share))
    return shares
