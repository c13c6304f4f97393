# SPDX-License-Identifier: Apache-2.0
"""The ``ds_ssh`` command: one shell command on every host of a hostfile."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import threading

from .options import DEFAULT_HOSTFILE
from .resources import fetch_hostfile
from .transport import SSH_OPTIONS, pdsh_environment


def main(args: list[str] | None = None) -> None:
    """Ends with 0 if the command did on every host, else with the largest exit code. Lines begin with their host."""
    parser = argparse.ArgumentParser(prog="ds_ssh", description="Run a command on every host of a hostfile, over pdsh or else ssh.")
    parser.add_argument("-f", "--hostfile", default=DEFAULT_HOSTFILE, help="file with lines 'host slots=N' (default: %(default)s)")
    parser.add_argument("--ssh_port", type=int, default=None, metavar="PORT", help="port of the ssh servers")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments, as for a shell")
    parsed = parser.parse_args(args)
    if not parsed.command:
        parser.error("which command?")
    try:
        pool = fetch_hostfile(parsed.hostfile)
    except ValueError as error:
        sys.exit(f"ds_ssh: {error}")
    if pool is None:
        sys.exit(f"ds_ssh: there is no hostfile {parsed.hostfile}; -f names another one")
    command = " ".join(parsed.command)
    if shutil.which("pdsh"):
        os.execvpe("pdsh", ["pdsh", "-S", "-w", ",".join(pool), command], pdsh_environment(parsed.ssh_port))
    if not shutil.which("ssh"):
        sys.exit("ds_ssh: neither pdsh nor ssh is installed")
    sys.exit(_over_ssh(list(pool), command, parsed.ssh_port))


def _over_ssh(hosts: list[str], command: str, port: int | None) -> int:
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")) + (["-p", str(port)] if port else [])
    started = [subprocess.Popen(["ssh", *SSH_OPTIONS, *extra, host, command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT) for host in hosts]
    readers = [threading.Thread(target=_relay, args=pair) for pair in zip(hosts, started)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return max(process.wait() for process in started)


def _relay(host: str, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stdout.write(f"{host}: {line.decode(errors='replace').rstrip()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
