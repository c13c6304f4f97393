# SPDX-License-Identifier: Apache-2.0
"""Probe: how files are read and written in a folder: O_DIRECT, io_uring, by doing it."""
import os
import tempfile

from deepspeed.report.facts import Fact, no, read_text, size, yes

_TRIED_BYTES = 4 << 20
_UNBUFFERED = "use a folder on ext4, xfs or another disk file system; elsewhere files go through the page cache"


def _file_system(folder):
    """Type and mount point from /proc/self/mountinfo; the longest mount point that holds the folder."""
    best = ("unknown", "")
    for line in read_text("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[1]):
            best = (right.split()[0], point)
    return best


def _try(core, folder, backend):
    handle, path = tempfile.mkstemp(prefix=".ds_report_", dir=folder)
    os.close(handle)
    try:
        return core.try_files(path, backend, _TRIED_BYTES)
    finally:
        os.unlink(path)


def _uring(core, folder):
    try:
        _try(core, folder, "uring")
        return yes("io_uring", f"works: {size(_TRIED_BYTES)} written and read back")
    except (RuntimeError, OSError) as error:
        if not core.BUILD_INFO["liburing"]:
            return no("io_uring", "not in this build: liburing was not found",
                      "apt-get install liburing-dev, then build again; threads do it meanwhile")
        switched_off = read_text("/proc/sys/kernel/io_uring_disabled", "0")
        if switched_off != "0":
            return no("io_uring", f"the kernel has it switched off (kernel.io_uring_disabled={switched_off})",
                      "sysctl kernel.io_uring_disabled=0; threads do it meanwhile")
        return no("io_uring", _plain(error), "allow io_uring_setup in the container's seccomp profile; threads do it meanwhile")


def _plain(error):
    return str(error).split(": ", 1)[-1]


def files(folder):
    folder = os.path.realpath(folder)
    facts = [Fact("folder", folder)]
    if not os.path.isdir(folder):
        return facts + [no("writable", "no such folder", "make it, or give another one by --folder")]
    kind, point = _file_system(folder)
    room = os.statvfs(folder)
    free, total = size(room.f_bavail * room.f_frsize), size(room.f_blocks * room.f_frsize)
    facts.append(Fact("file system", f"{kind} at {point}, {free} free of {total}"))
    from deepspeed._native import core as load
    core = load()
    try:
        _, direct = _try(core, folder, "threads")
    except OSError as error:
        return facts + [no("writable", error.strerror and _plain(error) or str(error), "give a folder you may write to by --folder")]
    facts.append(yes("writable", f"{size(_TRIED_BYTES)} written and read back"))
    facts.append(yes("O_DIRECT", "works: files can go past the page cache") if direct else
                 Fact("O_DIRECT", "of no use: this file system is memory") if kind in ("tmpfs", "ramfs") else
                 no("O_DIRECT", "refused by this file system", _UNBUFFERED))
    return facts + [_uring(core, folder)]
