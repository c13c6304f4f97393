# SPDX-License-Identifier: Apache-2.0
"""Trains the matrix of architectures x stages x {full, LoRA} beside plain Trainer and writes the figures as JSON.

    torchrun --nproc-per-node 2 -m tests.compat.hf.matrix RESULT.json [architecture ...]
"""
import json
import sys
import tempfile
import time
import traceback

from tests.compat.hf import models, training

STAGES = (0, 2, 3)
LOSS_BAR = 1e-4      # relative, fp32: loss and grad_norm against plain Trainer, at each of the steps
LOGITS_BAR = 1e-4    # of the largest logit: saved, reloaded and evaluated without us, against the engine's own


def compare(found, plain):
    import numpy
    scale = float(numpy.abs(found.logits).max())
    return {"loss": training.worst(found.losses, plain.losses), "norm": training.worst(found.norms, plain.norms),
            "eval": abs(found.eval_loss - plain.eval_loss) / abs(plain.eval_loss),
            "logits": float(numpy.abs(found.reloaded - found.logits).max()) / scale, "steps": len(found.losses)}


def passed(cell):
    return "error" not in cell and cell["steps"] == training.STEPS and max(cell["loss"], cell["norm"], cell["eval"]) <= LOSS_BAR \
        and cell["logits"] <= LOGITS_BAR


def run_cell(name, lora, folder, stages=STAGES):
    """Collective. One row: what every stage does with an architecture."""
    plain = training.train(name, folder, None, lora, save=False)
    row = {}
    for stage in stages:
        try:
            row[str(stage)] = compare(training.train(name, folder, stage, lora), plain)
        except Exception as error:   # on all ranks alike, or the next collective stalls
            traceback.print_exc()
            row[str(stage)] = {"error": f"{type(error).__name__}: {error}"}
    return row


def main():
    import torch.distributed as dist
    from deepspeed import comm
    comm.init_distributed()
    target, names = sys.argv[1], sys.argv[2:] or list(models.ARCHITECTURES)
    box = [tempfile.mkdtemp(prefix="hf-matrix-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    results = {}
    for name in names:
        for lora in (False, True):
            begin = time.monotonic()
            row = run_cell(name, lora, box[0])
            results.setdefault(name, {})["lora" if lora else "full"] = row
            if dist.get_rank() == 0:
                said = {stage: "ok" if passed(cell) else cell for stage, cell in row.items()}
                print(f"cell {name:12} {'lora' if lora else 'full'} {time.monotonic() - begin:5.1f} s {said}", flush=True)
                with open(target, "w") as file:
                    json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
