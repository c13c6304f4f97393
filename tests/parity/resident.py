# SPDX-License-Identifier: Apache-2.0
"""How much memory of this process is resident, and by how much that grows."""


def field(name):
    """Bytes of a line of /proc/self/status: "VmRSS" now, "VmHWM" at its highest since the last growth()."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def growth(work):
    """By how many bytes resident memory grew while `work` ran, at its highest."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")   # VmHWM := VmRSS
    before = field("VmRSS")
    work()
    return field("VmHWM") - before
