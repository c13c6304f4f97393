# SPDX-License-Identifier: Apache-2.0
"""The default group on a GPU carries tensors of both kinds of device; NCCL by name carries those of the GPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[2]
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def run_python(code):
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**clean, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_kinds_of_tensor():
    out = run_python("import deepspeed, torch; deepspeed.init_distributed(); c = deepspeed.comm\n"
                     "for device in ('cpu', 'cuda'):\n"
                     "    x = torch.ones(4, device=device); c.all_reduce(x); out = torch.empty(4, device=device)\n"
                     "    c.all_gather_into_tensor(out, x); c.all_to_all([out], [x]); print(device, out.sum().item())\n"
                     "c.barrier(); c.destroy_process_group()")
    assert out == "cpu 4.0\ncuda 4.0\n"


def test_nccl_by_name():
    out = run_python("import deepspeed, torch; deepspeed.init_distributed('nccl'); c = deepspeed.comm\n"
                     "x = torch.ones(4, device='cuda'); c.all_reduce(x, op=c.ReduceOp.AVG); print(x.sum().item()); c.destroy_process_group()")
    assert out == "4.0\n"


def test_choosing_the_device_makes_no_context():
    out = run_python("import deepspeed, torch; a = deepspeed.get_accelerator(); print(a._name, a.device_count() > 0, torch.cuda.is_initialized())")
    assert out == "cuda True False\n"
