# SPDX-License-Identifier: Apache-2.0
"""`deepspeed plan` as users start it."""
import json
import os
import subprocess
import sys

import pytest

from deepspeed.planning.command import main

CONFIG = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "bf16": {"enabled": True},
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "zero_optimization": {"stage": 2}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    captured = capsys.readouterr()
    assert end.value.code == code, captured
    return captured.out if code == 0 else captured.err


def test_table(config, capsys):
    text = said(capsys, "ds.json", "--params", "7e9", "--gpus", "64", "--gpu_memory", "80GB", "--seq_length", "2048")
    rows = {line[2:].split("  ")[0]: line for line in text.splitlines() if line[2:].startswith("stage")}
    assert len(rows) == 11 and rows["stage 2"].startswith("* ") and "no: " in rows["stage 0"] and "yes" in rows["stage 3"]
    assert "64 GPUs on 8 nodes" in text and "Cheapest of those that fit: stage" in text and "Assumed: " in text
    assert max(map(len, text.splitlines())) <= 200


def test_offload_where_nothing_else_fits(config, capsys):
    few = ("ds.json", "--params", "7e9", "--gpus", "8", "--gpu_memory", "8GB")
    text = said(capsys, *few)
    assert 'Cheapest of those that fit: stage 3, optimizer on host' in text and '{"stage": 3, "offload_optimizer": {"device": "cpu"}}' in text
    assert "It also needs" in text and "on each host (--host_memory checks it)" in text
    text = said(capsys, *few, "--host_memory", "1TB")
    assert "stage 3, optimizer on host, which leaves" in text and "It also needs" not in text
    text = said(capsys, *few, "--host_memory", "32GB")
    assert "no: host lacks" in text and "Cheapest of those that fit: stage 3, optimizer on disk" in text and '"nvme_path": "/local_nvme"' in text
    assert "on each node's disk (--disk checks it)" in text
    text = said(capsys, *few, "--host_memory", "32GB", "--disk", "100GB")
    assert "no: disk lacks" in text and "Nothing fits in 8 GiB. Least is stage 3, optimizer and parameters on host" in text


def test_ranks_without_gpus(config, capsys):
    cpu = ("ds.json", "--params", "350M", "--gpus", "2", "--device", "cpu")
    text = said(capsys, *cpu, "--host_memory", "16GB")
    assert "on host" not in text and "Cheapest of those that fit: stage 1" in text and "fits in" not in text and "CUDA" not in text
    text = said(capsys, *cpu, "--host_memory", "1GB")
    assert 'stage 3, optimizer and parameters on disk' in text and '"max_in_cpu": 0' in text
    assert "Nothing fits in 0 GiB a rank" in said(capsys, *cpu, "--host_memory", "100MB")
    (config / "offload.json").write_text(json.dumps({**CONFIG, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    rows = {c["name"]: c for c in json.loads(said(capsys, "offload.json", *cpu[1:], "--json"))["choices"]}
    assert rows["stage 3, optimizer on host"]["rank_bytes"] == rows["stage 3"]["rank_bytes"]
    assert "moves nothing" in said(capsys, "offload.json", *cpu[1:])


def test_this_machine(config, capsys, monkeypatch):
    from deepspeed.planning import machine
    folder = config / "not" / "there" / "yet"
    (config / "nvme.json").write_text(json.dumps({**CONFIG, "zero_optimization": {"stage": 2, "offload_optimizer": {
        "device": "nvme", "nvme_path": str(folder), "buffer_count": 5}}}))
    monkeypatch.setattr(machine, "host_bytes", lambda: 24 * 2**30)
    monkeypatch.setattr(machine, "gpu_bytes", lambda: None)
    room = json.loads(said(capsys, "nvme.json", "--params", "350M", "--gpus", "2", "--device", "cpu", "--here", "--json"))["room"]
    assert room["device_bytes"] == 12 * 2**30 and room["host_bytes"] is None and room["disk_bytes"] > 0 and not folder.exists()
    assert "give --gpu_memory SIZE, or --device cpu" in said(capsys, "nvme.json", "--params", "350M", "--here", code=1)
    monkeypatch.setattr(machine, "gpu_bytes", lambda: 80 * 2**30)
    made = json.loads(said(capsys, "nvme.json", "--params", "350M", "--here", "--disk", "1GB", "--json"))
    assert (made["room"]["device_bytes"], made["room"]["host_bytes"], made["room"]["disk_bytes"]) == (80 * 2**30, 24 * 2**30, 2**30)
    configured = next(c for c in made["choices"] if c["configured"])
    assert not configured["fits"] and "disk lacks" in configured["misfit"] and sum(c["cheapest"] for c in made["choices"]) == 1
    assert configured["zero_optimization"]["offload_optimizer"] == {"device": "nvme", "nvme_path": str(folder), "buffer_count": 5}


def test_memory_of_this_process(tmp_path):
    from deepspeed.planning.machine import host_bytes
    meminfo, limit = tmp_path / "meminfo", tmp_path / "max"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   80 kB\n")
    assert host_bytes(meminfo, [limit]) == 80 * 1024
    limit.write_text("max\n")
    assert host_bytes(meminfo, [limit]) == 80 * 1024
    limit.write_text("4096\n")
    assert host_bytes(meminfo, [limit]) == 4096


def test_json(config, capsys):
    made = json.loads(said(capsys, "ds.json", "--params", "7B", "--gpus", "8", "--json"))
    assert made["parameters"] == 7_000_000_000 and made["gradient_accumulation_steps"] == 2 and made["micro_batch"] == 4
    stage2 = made["choices"][2]
    assert stage2["configured"] and stage2["rank_total_bytes"] == sum(stage2["rank_bytes"].values())
    assert {row["phase"] for row in stage2["traffic"]} == {"reduce", "gather_updated"}


def test_picture(config, capsys):
    said(capsys, "ds.json", "--params", "7e9", "--gpus", "8", "--gpu_memory", "80GB", "--picture", "plan.png")
    assert (config / "plan.png").read_bytes().startswith(b"\x89PNG") and (config / "plan.png").stat().st_size > 20_000


def test_a_picture_without_matplotlib(config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in said(capsys, "ds.json", "--params", "7e9", "--picture", "plan.png", code=1)


def test_a_model_on_the_meta_device(config, capsys):
    (config / "mymodel.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(10**5, 10**5)\nnumber = 3\n")
    text = said(capsys, "ds.json", "--model", "mymodel:build", "--gpus", "8")
    assert text.startswith("10.00 B parameters")
    assert "not a torch.nn.Module" in said(capsys, "ds.json", "--model", "mymodel:number", code=1)
    assert "has no nothing" in said(capsys, "ds.json", "--model", "mymodel:nothing", code=1)
    assert "expected MODULE:FACTORY" in said(capsys, "ds.json", "--model", "mymodel", code=1)
    assert "No module named" in said(capsys, "ds.json", "--model", "nowhere_to_be_found:build", code=1)


@pytest.mark.parametrize("arguments, code, message", [
    (["ds.json"], 2, "--params"), (["ds.json", "--params", "lots"], 2, "'lots' is not a number"),
    (["ds.json", "--params", "1e9", "--gpus", "0"], 2, "--gpus"),
    (["ds.json", "--params", "1e9", "--gpu_memory", "big"], 2, "'big' is not a size"),
    (["ds.json", "--params", "1e9", "--gpu_memory", "80"], 2, "say 80GB"), (["none.json", "--params", "1e9"], 1, "none.json"),
    (["ds.json", "--params", "1e9", "--gpus", "12", "--nodes", "5"], 1, "12 GPUs"),
])
def test_wrong_command_lines(config, capsys, arguments, code, message):
    assert message in said(capsys, *arguments, code=code)


def run_deepspeed(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    command = [sys.executable, "-X", "importtime", "-m", "deepspeed.launcher.runner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)


def test_the_deepspeed_command_without_torch(config):
    done = run_deepspeed("plan", "ds.json", "--params", "7e9", "--gpus", "64", cwd=config)
    assert done.returncode == 0 and done.stdout.startswith("7.00 B parameters"), done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not {"torch", "numpy", "matplotlib"} & imported


def test_a_script_of_that_name(config):
    (config / "plan").write_text("print('script')\n")
    done = run_deepspeed("plan", "ds.json", "--params", "7e9", cwd=config)
    assert done.returncode == 0 and "started by `deepspeed ./plan`" in done.stderr and done.stdout.startswith("7.00 B")
