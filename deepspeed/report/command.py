# SPDX-License-Identifier: Apache-2.0
"""The command `ds_report`."""
import argparse
import functools
import json
import subprocess
import sys
import threading

from deepspeed.report import files, gpus, isolate, machine, operators, show, software, with_torch
from deepspeed.report.isolate import Probe

_DRIVER_TIMEOUT_S = 10
_TORCH_TIMEOUT_S = 120


def _parser():
    parser = argparse.ArgumentParser(prog="ds_report", description="What this machine and this installation of deepspeed can do. "
                                     "Every \"no\" says what to do about it. Imports no torch unless asked to.")
    add = parser.add_argument
    add("--json", action="store_true", help="print everything as JSON")
    add("--folder", default=".", metavar="DIR", help="try O_DIRECT and io_uring in this folder (default: the current one)")
    add("--torch", action="store_true", help="also ask torch itself, which takes seconds")
    add("--hide_operator_status", action="store_true", help="leave out what each op would run as")
    add("--hide_errors_and_warnings", action="store_true", help="leave out the advice")
    return parser


def _probes(folder, torch, operator_status):
    probes = [Probe("versions", software.versions), Probe("build", software.build), Probe("processor", machine.processor),
              Probe("memory", machine.memory), Probe("devices", gpus.devices, _DRIVER_TIMEOUT_S),
              Probe("devices in use", gpus.nvidia_smi, _DRIVER_TIMEOUT_S), Probe("NCCL", gpus.nccl)]
    if operator_status:
        probes.append(Probe("operators", operators.operators, _DRIVER_TIMEOUT_S))
    probes += [Probe("files", functools.partial(files.files, folder)), Probe("programs", software.programs),
               Probe("environment", software.environment)]
    if torch:
        probes.append(Probe("torch", with_torch.with_torch, _TORCH_TIMEOUT_S))
    return probes


def collect(folder=".", torch=False, operator_status=True):
    """{section: Outcome}. Forks: call it from a process that has neither threads nor torch."""
    return isolate.run(_probes(folder, torch, operator_status))


def _fresh_process(arguments):
    """A process with threads must not be forked: a new one makes the report."""
    done = subprocess.run([sys.executable, "-m", "deepspeed.report", *arguments], stdout=subprocess.PIPE, text=True)
    sys.stdout.write(done.stdout)
    return done.returncode


def run(arguments):
    options = _parser().parse_args(arguments)
    if threading.active_count() > 1 or "torch" in sys.modules:
        return _fresh_process(arguments)
    outcomes = collect(options.folder, options.torch, not options.hide_operator_status)
    if options.json:
        sys.stdout.write(json.dumps(show.as_json(outcomes), indent=1) + "\n")
    else:
        sys.stdout.write(show.as_text(outcomes, options.hide_errors_and_warnings))
    return 0


def main(hide_operator_status=False, hide_errors_and_warnings=False):
    """Prints the report, for callers in Python."""
    flags = {"--hide_operator_status": hide_operator_status, "--hide_errors_and_warnings": hide_errors_and_warnings}
    run([flag for flag, wanted in flags.items() if wanted])


def cli_main():
    """Entry point of the command."""
    sys.exit(run(sys.argv[1:]))
