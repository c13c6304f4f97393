# SPDX-License-Identifier: Apache-2.0
"""Runs a few lines of Python in a process that nothing else has run in, forked from the server that has imported torch: a tenth of a second
instead of two."""
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.parity.launch import _context, _die_with_parent


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_python(code, environ, timeout_s=60):
    """As subprocess.run([python, "-c", code], env=environ)."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _context().Process(target=_main, args=(code, dict(environ), str(out), str(err)))
        process.start()
        process.join(timeout_s)
        try:
            assert process.exitcode is not None, f"not done after {timeout_s:g} s: {err.read_text()}"
        finally:
            process.kill()
            process.join()
        return Done(process.exitcode, out.read_text(), err.read_text())


def _main(code, environ, out, err):
    _die_with_parent()
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environ)
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
