# SPDX-License-Identifier: Apache-2.0
"""examples/hf_trainer under each launcher people use: the same evaluation loss, and weights that load."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

for _package in ("transformers", "accelerate"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests/compat/hf/told.py")
CONFIG = str(ROOT / "examples/hf_trainer/ds_config.json")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
JSON = ["--deepspeed", CONFIG]


class Launch(NamedTuple):
    launcher: list
    arguments: list    # of the script
    stage: int


LAUNCHES = {
    "deepspeed": Launch(["-m", "deepspeed.launcher.runner", "--num_gpus", "2"], JSON, 3),
    "torchrun": Launch(TORCHRUN, JSON, 3),
    "accelerate": Launch([*ACCELERATE, "--deepspeed_config_file", CONFIG], [], 3),
    "accelerate by flags": Launch([*ACCELERATE, "--zero_stage", "3", "--zero3_init_flag", "true", "--zero3_save_16bit_model", "true"], [], 3),
    "accelerate by flags, offload": Launch([*ACCELERATE, "--zero_stage", "2", "--offload_optimizer_device", "cpu", "--gradient_clipping", "1.0"],
                                           [], 2),
}
COMMON = ["--per_device_train_batch_size", "4", "--max_steps", "6", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "true",
          "--seed", "3", "--bf16", "false", "--save_strategy", "no", "--learning_rate", "2e-3"]


def launched(launch, folder):
    """Losses and norms as printed, and the evaluation loss."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *launch.launcher, SCRIPT, *COMMON, "--output_dir", str(folder), *launch.arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=160, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert re.findall(r"stage (\w+)", done.stdout) == [str(launch.stage).lower()]   # without this it would be plain Trainer beside itself
    steps = re.findall(r"'loss': '([0-9.]+)', 'grad_norm': '([0-9.]+)'", done.stdout)
    return [float(value) for step in steps for value in step], float(re.search(r"eval_loss ([0-9.]+)", done.stdout).group(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return launched(Launch(TORCHRUN, [], None), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_example(name, plain, tmp_path):
    from transformers import LlamaForCausalLM
    figures, evaluated = launched(LAUNCHES[name], tmp_path)
    assert len(figures) == 12 and figures == pytest.approx(plain[0], abs=2e-3)   # four figures are printed
    assert evaluated == pytest.approx(plain[1], abs=2e-4)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) > 500_000
