# SPDX-License-Identifier: Apache-2.0
"""examples/hf_trainer under each launcher people use: the same evaluation loss, and weights that load."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for _package in ("transformers", "accelerate"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "examples/hf_trainer/train.py")
CONFIG = str(ROOT / "examples/hf_trainer/ds_config.json")
LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--deepspeed_config_file", CONFIG],
}
COMMON = ["--per_device_train_batch_size", "4", "--max_steps", "6", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true",
          "--seed", "3", "--bf16", "false", "--save_strategy", "no"]


def launched(launcher, folder, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true",
                   "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *LAUNCHERS[launcher], SCRIPT, *COMMON, "--output_dir", str(folder), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=160, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [float(value) for value in re.findall(r"^'?\\{?'loss': '([0-9.]+)'", done.stdout, re.M)], \
        float(re.search(r"eval_loss ([0-9.]+)", done.stdout).group(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return launched("torchrun", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_example(launcher, plain, tmp_path):
    from transformers import LlamaForCausalLM
    more = [] if launcher == "accelerate" else ["--deepspeed", CONFIG]
    losses, evaluated = launched(launcher, tmp_path, *more)
    assert losses == plain[0] and evaluated == pytest.approx(plain[1], abs=2e-4)   # four figures are printed
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) > 500_000
