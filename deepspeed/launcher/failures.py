# SPDX-License-Identifier: Apache-2.0
"""What went wrong in a job, told once: the first failure whole, a line for each other one."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .relay import last_line, without_store_warnings
from .say import Voice, terminal


@dataclass
class Failure:
    """A rank that did not end with 0, or (``rank`` None) a host that was lost."""
    host: str
    rank: int | None
    code: int  # negative: killed by that signal
    failed_at: float  # time.monotonic() when the trouble began: at the traceback, which may precede the exit
    pid: int = 0
    by_us: bool = False  # it ended after we had told it to
    text: str = ""  # its traceback, if that has not been shown yet
    shown: bool = False  # it has
    log_path: str | None = None
    why: str = ""  # of a lost host
    label: str = ""  # what failed, if not a rank

    def message(self, now: float) -> dict:
        """For the launching host, whose clock is another one."""
        fields = asdict(self)
        fields["ago_s"] = now - fields.pop("failed_at")
        return fields

    @staticmethod
    def from_message(fields: dict, host: str, now: float) -> Failure:
        fields = dict(fields, host=host, failed_at=now - fields["ago_s"])
        del fields["ago_s"]
        return Failure(**fields)

    @property
    def name(self) -> str:
        if self.rank is None:
            return f"host {self.host}"
        return self.label or f"rank {self.rank}"


def shell_code(code: int) -> int:
    """Exit code as a shell reports it: 128 + N for a death by signal N."""
    return 128 - code if code < 0 else code


def describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a real-time signal"
    hint = "; on a machine out of memory the kernel does this, see dmesg" if code == -signal.SIGKILL else ""
    return f"killed by signal {-code} ({name}){hint}"


def in_order(failures: Sequence[Failure]) -> list[Failure]:
    """The first one is the job's."""
    return sorted(failures, key=lambda f: (f.by_us, f.failed_at, -1 if f.rank is None else f.rank))


def job_code(failures: Sequence[Failure], signal_received: int | None) -> int:
    """The exit code of the job."""
    if not failures:
        return 0
    first = in_order(failures)[0]
    if signal_received is not None and first.by_us and first.code == -signal.SIGKILL:
        # Ranks that had to be killed did not choose an exit code: the job ended by the signal it was sent.
        return 128 + signal_received
    return shell_code(first.code)


def tell(failures: Sequence[Failure], signal_received: int | None, say: Voice) -> int:
    """Print the one traceback that matters, a line for each other failure; returns the job's exit code."""
    if not failures:
        return 0
    first, *others = in_order(failures)
    if signal_received is not None and first.by_us:
        _write(first.text)
        say("info", f"stopped by {signal.Signals(signal_received).name}")
        return job_code(failures, signal_received)
    if first.rank is None:
        say("error", f"host {first.host} failed first: {first.why}")
    else:
        say("error", f"{first.name} (process {first.pid} on {first.host}) failed first: {describe(first.code)}")
        if not first.text and first.shown:
            say("error", "its traceback is above; it needed long to end")
    _write(without_store_warnings(first.text))
    for failure in others:
        if failure.text or not failure.by_us:
            where = "" if failure.host == first.host or failure.rank is None else f" on {failure.host}"
            why = failure.why or last_line(failure.text.encode()) or describe(failure.code)
            left_out = " (its traceback is left out)" if failure.rank is not None else ""
            say("error", f"{failure.name}{where} then failed too{left_out}: {why}")
    if first.log_path is not None:
        say("error", f"its whole output is in {first.log_path} on {first.host}")
    return job_code(failures, signal_received)


def _write(text: str) -> None:
    if text:
        terminal.write((text if text.endswith("\n") else text + "\n").encode())
