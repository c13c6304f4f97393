# SPDX-License-Identifier: Apache-2.0
"""What the step needs to know, chosen once."""
from dataclasses import dataclass
from typing import Callable


@dataclass
class StepOptions:
    scaler: object                 # precision.loss_scaler
    clip: float                    # largest global gradient norm; 0 does not clip
    partial_slices: bool           # every rank steps its own slices only (stages 1-3)
    on_bad: str                    # gradients that are not finite: "raise" (fp32), "skip" (bf16), "scale" (fp16), or "step" all the same
    report_norm: bool
    step_number: Callable[[], int]
    most_bad_in_a_row: int = 200
    parameter_offload: object = None
