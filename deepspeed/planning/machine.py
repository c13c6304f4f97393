# SPDX-License-Identifier: Apache-2.0
"""What the machine that `deepspeed plan` runs on has. Imports no torch."""
import os
import shutil
import subprocess

from deepspeed.planning.plan import RESERVED_BYTES, Room

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def gpu_bytes():
    """Memory of the smallest GPU; None where nvidia-smi finds none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = subprocess.run([program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60)
    sizes = [int(line) for line in asked.stdout.split() if line.isdigit()] if asked.returncode == 0 else []
    return min(sizes) << 20 if sizes else None


def host_bytes(meminfo="/proc/meminfo", limits=_CGROUP_LIMITS):
    """Memory that is available now, and no more than this process may have."""
    with open(meminfo) as lines:
        found = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    for path in limits:
        if os.path.exists(path):
            text = open(path).read().strip()
            found = min(found, int(text)) if text.isdigit() else found
    return found


def disk_bytes(folder):
    """Free space of the file system that the folder is in, or will be in."""
    folder = os.path.abspath(os.path.expanduser(str(folder)))
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def room_here(made):
    """The Room of a plan if it runs on machines like this one. ValueError where a GPU is planned for and there is none."""
    folders = {section["nvme_path"] for choice in made.choices for section in choice.extra.values() if section.get("nvme_path")}
    disk = min(map(disk_bytes, folders), default=None)
    host = host_bytes()
    if made.device == "cpu":
        return Room(host * made.nodes // made.gpus, 0, None, disk)
    gpu = gpu_bytes()
    if gpu is None:
        raise ValueError("--here: nvidia-smi finds no GPU on this machine: give --gpu_memory SIZE, or --device cpu for ranks without GPUs")
    return Room(gpu, RESERVED_BYTES, host, disk)
