# SPDX-License-Identifier: Apache-2.0
"""Makes `from tests.parity.launch import on_ranks` work from every test, whatever directory pytest is started in."""
import os
import sys
from pathlib import Path

# Before torch is imported: the models are tiny, and two OpenMP threads that wait for each other on a busy machine take seconds
# for what one does in milliseconds. It also fixes the order of sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The vector instructions that the processor names are there: Inductor need not compile and run a program for each of them, twelve seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_sessionfinish():
    launch = sys.modules.get("tests.parity.launch")
    if launch is not None:
        launch.shutdown()
