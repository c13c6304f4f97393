# SPDX-License-Identifier: Apache-2.0
"""What this host has, asked without torch and without creating a CUDA context."""

from __future__ import annotations

import os
import re


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


def share_cores(ranks: int, core_list: str | None = None) -> list[tuple[set[int], int]]:
    """Divide cores among the ranks of this host in equal contiguous shares: (CPU numbers, threads to use) of each."""
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
    shares = [cores[rank * each:(rank + 1) * each] for rank in range(ranks)]
    return [({cpu for core in share for cpu in core}, each) for share in shares]
