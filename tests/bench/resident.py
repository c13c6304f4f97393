# SPDX-License-Identifier: Apache-2.0
"""What a process occupies, from /proc, in bytes.

Resident memory (VmRSS, its peak VmHWM) counts a page shared by two ranks twice; the proportional set (PSS) counts half of it in
each, so the sum of PSS over the ranks is what the machine really gave. A peak of PSS exists only by sampling.
"""


def _field(path, name):
    with open(path) as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(name)


def rss(pid="self"):
    return _field(f"/proc/{pid}/status", "VmRSS")


def peak_rss(pid="self"):
    return _field(f"/proc/{pid}/status", "VmHWM")


def files(pid="self"):
    """Of rss(): pages of mapped files, in practice the code of libraries, shared by all processes that run it."""
    return _field(f"/proc/{pid}/status", "RssFile")


def pss(pid="self"):
    """Anonymous and shared memory only: the share of library code changes whenever any process starts or ends."""
    path = f"/proc/{pid}/smaps_rollup"
    return _field(path, "Pss_Anon") + _field(path, "Pss_Shmem")


def reset_peak():
    """VmHWM := VmRSS, so that what the imports used for a moment is not counted."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def huge_pages_policy():
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
