# SPDX-License-Identifier: Apache-2.0
"""Runs examples/hf_trainer/train.py and prints the ZeRO stage that its Trainer ended with, "none" without an engine."""
import runpy
from pathlib import Path

from transformers import Trainer

_save_model = Trainer.save_model


def _told(trainer, *args, **settings):
    if trainer.is_world_process_zero():
        print("stage", "none" if trainer.deepspeed is None else trainer.deepspeed.zero_optimization_stage(), flush=True)
    return _save_model(trainer, *args, **settings)


Trainer.save_model = _told
runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples/hf_trainer/train.py"), run_name="__main__")
