# SPDX-License-Identifier: Apache-2.0
"""Probes: processor, memory and its limits."""
import os
import resource

from deepspeed.report.facts import Fact, no, read_text, size, yes

_SMALL_SHM_BYTES = 1 << 30
_SMALL_LOCKED_BYTES = 64 << 20
_FEW_FILES = 4096


def processor():
    from deepspeed._native import core
    c = core()
    features = c.cpu_features()
    facts = [Fact("model", c.cpu_model_name()), Fact("instruction sets", " ".join(features) or "none known"),
             Fact("cores usable", f"{c.available_cores()} of {os.cpu_count()}")]
    quota = read_text("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = int(quota[0]) / int(quota[1])
        text = f"{cores:.1f} cores"
        facts.append(no("control group's quota", text, "more threads than that slow each other down: set OMP_NUM_THREADS, or lift it")
                     if cores < c.available_cores() else Fact("control group's quota", text))
    bf16 = [name for name in features if name.endswith("bf16")]
    facts.append(yes("bf16 units", " ".join(bf16)) if bf16 else
                 no("bf16 units", "none", "on this CPU PyTorch computes bf16 several times slower than fp32: train in fp32 here"))
    return facts


def _meminfo(path="/proc/meminfo"):
    values = {}
    for line in read_text(path).splitlines():
        name, _, rest = line.partition(":")
        parts = rest.split()
        if parts and parts[0].isdigit():
            values[name.split()[-1]] = int(parts[0]) * (1024 if parts[-1] == "kB" else 1)
    return values


def _numa():
    from deepspeed.device.numa import numa_nodes
    nodes = numa_nodes()
    for number, cores in nodes.items():
        memory = _meminfo(f"/sys/devices/system/node/node{number}/meminfo").get("MemTotal", 0)
        yield Fact(f"NUMA node {number}", f"{len(cores)} cores ({cores[0]}–{cores[-1]}), {size(memory)}")
    if not nodes:
        yield Fact("NUMA nodes", "the kernel does not tell")


def _shm():
    try:
        room = os.statvfs("/dev/shm")
    except OSError as error:
        return no("/dev/shm", f"missing ({error.strerror})", "mount it: mount -t tmpfs tmpfs /dev/shm")
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    text = f"{size(total)}, {size(free)} free"
    if total >= _SMALL_SHM_BYTES:
        return yes("/dev/shm", text)
    return no("/dev/shm", text, "data-loader workers and NCCL need more: docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm")


def _locked():
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    name = "pinned memory (ulimit -l)"
    if soft == resource.RLIM_INFINITY or soft >= _SMALL_LOCKED_BYTES:
        return yes(name, "unlimited" if soft == resource.RLIM_INFINITY else size(soft))
    return no(name, size(soft), "InfiniBand and locked buffers need more: ulimit -l unlimited, in /etc/security/limits.conf, or "
                                "docker run --ulimit memlock=-1")


def _anonymous_files():
    try:
        os.close(os.memfd_create("deepspeed"))
    except OSError as error:
        return no("memory shared by ranks", f"memfd_create: {error.strerror}",
                  "ranks of one host fall back to Gloo: allow memfd_create in the sandbox")
    return yes("memory shared by ranks", "memfd works")


def memory():
    info = _meminfo()
    facts = [Fact("memory", f"{size(info.get('MemTotal', 0))}, {size(info.get('MemAvailable', 0))} available"),
             Fact("swap", f"{size(info.get('SwapTotal', 0))}, {size(info.get('SwapFree', 0))} free")]
    limit = read_text("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        facts.append(Fact("control group's limit", size(int(limit))))
    facts += [*_numa(), _locked(), _shm(), _anonymous_files()]
    facts.append(Fact("huge pages", read_text("/sys/kernel/mm/transparent_hugepage/enabled", "unknown")))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    facts.append(yes("open files (ulimit -n)", files) if files >= _FEW_FILES else
                 no("open files (ulimit -n)", files, "many ranks and data-loader workers may run out: ulimit -n 65536"))
    return facts
