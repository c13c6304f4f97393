# SPDX-License-Identifier: Apache-2.0
"""State on the host or in files while the model is on a GPU: host and files give the same bits, both what the GPU alone gives to the last digits
(its own kernels round otherwise), and the GPU holds less."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[2]
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
_TRAIN = """
import json, sys, torch, deepspeed
from tests.parity.tiny import batch, config, engine_of, tiny, whole
zero, stage, precision, out, clip = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5])
deepspeed.init_distributed()
settings = {} if precision == "fp32" else {"bf16": {"enabled": True, "split_master": precision == "split"}}
engine = engine_of(tiny(width=1024, layers=16), config(stage, zero=zero, gradient_clipping=clip, gradient_accumulation_steps=2, **settings))
dtype = engine.get_data_types()[0]
losses = []
for step in range(12):
    loss = engine(batch(step, width=1024).to("cuda", dtype))
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
torch.cuda.synchronize()
native = engine.optimizer.stepper.native
torch.save({"losses": losses, "ahead": native.speculated, "values": {n: p.cpu() for n, p in whole(engine.module).items()}, "held": torch.cuda.memory_allocated()}, out)
engine.destroy()
"""


def trained(zero, stage, precision, folder, clip=0.5):
    out = folder / "result.pt"
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    done = subprocess.run([sys.executable, "-c", _TRAIN, json.dumps(zero), str(stage), precision, str(out), str(clip)], capture_output=True, text=True,
                          timeout=180, cwd=ROOT, env={**clean, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
@pytest.mark.parametrize("stage,parameters", [(1, False), (2, False), (3, False), (3, True)])
def test_host_and_files(stage, parameters, precision, tmp_path):
    def asked(device):
        section = {"device": device, "nvme_path": str(tmp_path / "state")}
        return {"offload_optimizer": section, **({"offload_param": section} if parameters else {})}

    plain = trained({}, stage, precision, tmp_path)
    host = trained(asked("cpu"), stage, precision, tmp_path)
    files = trained(asked("nvme"), stage, precision, tmp_path)
    assert host["losses"] == files["losses"]
    tolerance = 1e-5 if precision == "fp32" else 2**-7
    for name, value in host["values"].items():
        assert torch.equal(value, files["values"][name]), name
        torch.testing.assert_close(value.float(), plain["values"][name].float(), rtol=tolerance, atol=tolerance * 1e-2)
    numel = sum(v.numel() for v in plain["values"].values())
    # Master weights (where they are not the weights) and two states have left, and with the parameters what is not in use of them.
    state = 8 + {"fp32": 0, "bf16": 4, "split": 2}[precision] + ((4 if precision == "fp32" else 2) * 0.5 if parameters else 0)
    assert plain["held"] - host["held"] > 0.9 * state * numel


@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
@pytest.mark.parametrize("stage,device", [(2, "cpu"), (3, "cpu"), (3, "nvme")])
def test_updates_beside_backward(stage, device, precision, tmp_path):
    section = {"device": device, "nvme_path": str(tmp_path / "state")}
    want = trained({"offload_optimizer": section}, stage, precision, tmp_path, clip=0)
    got = trained({"offload_optimizer": {**section, "super_offload": True}}, stage, precision, tmp_path, clip=0)
    assert got["losses"] == want["losses"]
    for name, value in want["values"].items():
        assert torch.equal(value, got["values"][name]), name
    assert want["ahead"] == 0 < got["ahead"]
