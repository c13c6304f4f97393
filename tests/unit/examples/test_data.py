# SPDX-License-Identifier: Apache-2.0
"""The example of docs/data.md prints what is written there."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_documented_output():
    done = subprocess.run([sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", str(ROOT / "examples" / "data.py")],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith(("up to", "---"))]
    assert len(printed) == 9 and "\n".join(printed) in (ROOT / "docs" / "data.md").read_text()
