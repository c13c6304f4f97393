# SPDX-License-Identifier: Apache-2.0
"""The command line of ``deepspeed``."""

from __future__ import annotations

import argparse

from .say import LEVELS

DEFAULT_HOSTFILE = "/job/hostfile"
DEFAULT_MASTER_PORT = 29500
LAUNCHERS = ("pdsh", "ssh", "openmpi", "mpich", "impi", "mvapich", "slurm")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Start a training script as one process per GPU, or as several on the CPU.",
        epilog="Everything after the script's name is passed to the script. 'deepspeed plan --help': memory and traffic of a "
               "configuration, before it runs.")
    _where(parser.add_argument_group("where to run"))
    _how(parser.add_argument_group("how to run the script"))
    _multi_host(parser.add_argument_group("several hosts"))
    parser.add_argument("user_script", help="script to run, or module with --module, or program with --no_python")
    # Python before 3.12 calls it required when the script is missing.
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="its arguments").required = False
    return parser


def _where(group) -> None:
    add = group.add_argument
    add("-H", "--hostfile", default=DEFAULT_HOSTFILE,
        help="file with lines 'host slots=N'; without such a file the job runs on this host (default: %(default)s)")
    add("-i", "--include", default="", metavar="SPEC",
        help="use only these: HOST[:SLOT,...][@HOST...], e.g. localhost:0,2")
    add("-e", "--exclude", default="", metavar="SPEC", help="use all but these; not together with --include")
    add("--num_nodes", type=int, default=-1, metavar="N", help="use the first N hosts of the hostfile")
    add("--num_gpus", "--num_accelerators", type=int, default=-1, metavar="N", dest="num_gpus",
        help="use the first N GPUs of each host; on a machine without GPU: the number of processes")
    add("--master_addr", default="", metavar="ADDR", help="address of the first host (one host: 127.0.0.1)")
    add("--master_port", type=int, default=DEFAULT_MASTER_PORT, metavar="PORT",
        help="port where the processes meet; a busy one is replaced (default: %(default)s)")


def _how(group) -> None:
    add = group.add_argument
    add("--module", action="store_true", help="run the script as 'python -m' would")
    add("--no_python", action="store_true", help="run the script directly, without python in front")
    add("--no_local_rank", action="store_true", help="do not append --local_rank=N to the script's arguments")
    add("--bind_cores_to_rank", action="store_true", help="give each process cores of its own")
    add("--bind_core_list", default=None, metavar="LIST", help="cores to share out, e.g. 1,3-5 (default: all)")
    add("--venv_script", default=None, metavar="FILE", help="activation script to source before the script runs")
    add("--enable_each_rank_log", default="None", metavar="DIR",
        help="write the output of each process to DIR/<time>_rank<N>.log instead of the terminal")
    add("--save_pid", action="store_true", help="keep this launcher's process id in /tmp/<pid>.deepspeed while it runs")
    add("--log_level", default="info", choices=list(LEVELS), help="how much the launcher says (default: %(default)s)")
    add("-q", "--quiet", action="store_true", help="the same as --log_level error")
    add("--autotuning", default="", choices=["tune", "run"], help="find a good configuration first (not built yet)")


def _multi_host(group) -> None:
    add = group.add_argument
    add("--no_ssh", action="store_true", help="this command is started on every host by hand, with --node_rank")
    add("--node_rank", type=int, default=-1, metavar="N", help="number of this host, with --no_ssh")
    add("--launcher", default="pdsh", metavar="NAME", help=f"one of {', '.join(LAUNCHERS)} (default: %(default)s)")
    add("--launcher_args", default="", metavar="STR", help="further arguments for it")
    add("--force_multi", action="store_true", help="use it for a single host as well")
    add("--no_ssh_check", action="store_true", help="no effect: connections are not tried first, a host that does not answer is named")
    add("--ssh_port", type=int, default=None, metavar="PORT", help="port of the ssh servers")
    add("--elastic_training", action="store_true",
        help="when a rank or a host is lost, restart the script with those that are left")
    add("--min_elastic_nodes", type=int, default=-1, metavar="N", help="end the job when fewer hosts are left (default: 1)")
    add("--max_elastic_nodes", type=int, default=-1, metavar="N", help="hosts that may join (default: those of the hostfile)")
    add("--max_restarts", type=int, default=100, metavar="N", help="end the job at the next failure after so many (default: %(default)s)")


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; prints usage and exits with 2 on a wrong one."""
    parser = build_parser()
    parsed = parser.parse_args(args)
    if parsed.quiet:
        parsed.log_level = "error"
    if parsed.launcher.lower() not in LAUNCHERS:
        parser.error(f"argument --launcher: invalid choice {parsed.launcher!r} (choose from {', '.join(LAUNCHERS)})")
    if parsed.module and parsed.no_python:
        parser.error("--module runs python and --no_python does not; give one of them")
    for name in ("num_gpus", "num_nodes"):
        if getattr(parsed, name) < 1 and getattr(parsed, name) != -1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(parsed, name)}")
    if parsed.max_restarts < 0:
        parser.error(f"argument --max_restarts: must be at least 0, got {parsed.max_restarts}")
    if not 0 <= parsed.master_port < 65536:
        parser.error(f"argument --master_port: {parsed.master_port} is no port number (0 to 65535; 0: any free one)")
    return parsed
