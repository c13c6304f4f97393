# SPDX-License-Identifier: Apache-2.0
"""Writes the matrix's figures as docs/compatibility.md.

    python -m tests.compat.hf.table build/hf-matrix.json docs/compatibility.md
"""
import importlib.metadata
import json
import sys

from tests.compat.hf import matrix, models, training

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")

_TEXT = """# Hugging Face

The `Trainer` runs on this library unchanged: `--deepspeed ds_config.json`, `"auto"` values included, started by `deepspeed`, `torchrun` or
`accelerate launch`.

Below, each tiny model trains for {steps} steps on two ranks in fp32 at ZeRO stages {stages}, with all parameters and with LoRA, beside the same
`Trainer` without this library. A figure is the largest relative difference over all steps of **loss and gradient norm**, and of the evaluation
loss afterwards; it may be {loss:g}. After training the weights are saved, read by plain `transformers`, and give the logits of the engine
within {logits:g} of the largest. At stage 3 models are built by `from_pretrained` straight into slices. No leaf module is marked by hand.

Written by `tests/compat/hf.sh` with {versions}.

| model | {header} |
|---|{rule}|
{rows}
"""


def figure(cell):
    if "error" in cell:
        return "fails: " + cell["error"].splitlines()[0][:80].replace("|", "/")
    value = max(cell["loss"], cell["norm"], cell["eval"])
    return f"{value:.0e}" if matrix.passed(cell) else f"**{value:.0e}**, logits {cell['logits']:.0e}"


def table(results):
    columns = [(mode, str(stage)) for mode in ("full", "lora") for stage in matrix.STAGES]
    rows = [f"| {models.ARCHITECTURES[name].model}{' (tied)' if name.endswith('-tied') else ''} | "
            + " | ".join(figure(results[name][mode][stage]) for mode, stage in columns) + " |" for name in models.ARCHITECTURES if name in results]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES)
    return _TEXT.format(steps=training.STEPS, stages=", ".join(map(str, matrix.STAGES)), loss=matrix.LOSS_BAR, logits=matrix.LOGITS_BAR,
                        versions=versions, rows="\n".join(rows), rule="---|" * (len(columns) - 1) + "---",
                        header=" | ".join(f"{'LoRA' if mode == 'lora' else mode}, stage {stage}" for mode, stage in columns))


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        found = json.load(file)
    with open(sys.argv[2], "w") as file:
        file.write(table(found))
