# SPDX-License-Identifier: Apache-2.0
"""Memory in use, for people."""
import gc
import os

from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.logs import current_rank, print_dist

_GB = 1024.0**3


def get_ma_status():
    """Bytes the accelerator holds now; 0 on ranks other than 0."""
    return get_accelerator().memory_allocated() if not current_rank() else 0


def empty_cache():
    """Gives unused cached device memory back and starts the peak figures anew."""
    get_accelerator().empty_cache()
    get_accelerator().reset_peak_memory_stats()


def _host_figures():
    figures = {}
    with open("/proc/meminfo") as lines:
        for line in lines:
            key, value = line.split(":")
            figures[key] = int(value.split()[0]) * 1024
    return figures["MemTotal"], figures.get("MemAvailable", figures["MemFree"])


def usage_text(title):
    """Two lines: what the accelerator holds (present and peak, allocated and reserved), and what the host has in use."""
    device = get_accelerator()
    total, available = _host_figures()
    used = total - available
    return (f"{title}\n"
            f"MA {device.memory_allocated() / _GB:.2f} GB  Max_MA {device.max_memory_allocated() / _GB:.2f} GB  "
            f"CA {device.memory_reserved() / _GB:.2f} GB  Max_CA {device.max_memory_reserved() / _GB:.2f} GB\n"
            f"CPU Virtual Memory: used = {used / _GB:.2f} GB, percent = {100.0 * used / total:.1f}%")


def process_memory(thorough=True):
    """What this process holds, in bytes: on the CPU {"rss_bytes"} and, if thorough, {"pss_bytes"}, in which a page shared by n processes
    counts as one n-th; on an accelerator {"allocated_bytes", "reserved_bytes"} of its allocator.

    RSS costs some microseconds. PSS is added up by the kernel page by page: a millisecond or more for a large process.
    """
    device = get_accelerator()
    if device.device_name() != "cpu":
        return {"allocated_bytes": device.memory_allocated(), "reserved_bytes": device.memory_reserved()}
    with open("/proc/self/statm") as file:
        found = {"rss_bytes": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    if thorough:
        with open("/proc/self/smaps_rollup") as lines:
            found["pss_bytes"] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return found


def print_memory(message, ranks=None):
    """Prints the memory in use (rank 0, or `ranks`) and starts the peak figures anew."""
    print_dist(usage_text(message), ranks)
    get_accelerator().reset_peak_memory_stats()


def see_memory_usage(message, force=False, ranks=None):
    """With `force`, collects Python's garbage and prints the memory in use (rank 0, or `ranks`), the peak figures of which start anew;
    without, does nothing."""
    if not force:
        return
    gc.collect()  # garbage must not be mistaken for use
    print_memory(message, ranks)


def memory_status(msg, print_rank=-1, reset_max=False):
    """Prints allocated and reserved device memory on one rank (-1: all), and starts the peak figures anew if asked."""
    device = get_accelerator()
    if reset_max:
        device.reset_peak_memory_stats()
    print_dist(f"MEMSTATS {msg} device={device.current_device_name()} "
               f"current alloc={device.memory_allocated() / _GB:.4f}GB (max={device.max_memory_allocated() / _GB:.4f}GB) "
               f"current cache={device.memory_reserved() / _GB:.4f}GB (max={device.max_memory_reserved() / _GB:.4f}GB)",
               ranks=[print_rank])
