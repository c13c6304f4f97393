#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Writes the checkpoints in this folder. To be run under DeepSpeed 0.19.8, not under this library:

    python make.py            every case
    python make.py CASE...    some

Each case becomes <case>/ with the checkpoint as DeepSpeed wrote it (less its recovery scripts), and expected.safetensors with what DeepSpeed's own engine said
the fp32 weights and optimizer states were, and the losses of two steps after the save, in entries "<kind>/<parameter>".
"""
import json
import os
import shutil
import struct
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.95]}}
TORCH_ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.95], "torch_adam": True}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 10}}
# The small scale does not overflow and changes within the three steps.
FP16 = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}

CASES = {
    "stage0_fp32": dict(ranks=1, stage=0, groups=2, optimizer=TORCH_ADAMW, scheduler=WARMUP),
    "stage0_fp16": dict(ranks=2, stage=0, groups=2, fp16=FP16, optimizer=TORCH_ADAMW),
    "stage0_fp16_flat": dict(ranks=1, stage=0, groups=2, fp16=FP16, optimizer=ADAMW),
    "stage0_bf16": dict(ranks=2, stage=0, groups=1, bf16={"enabled": True}, optimizer=TORCH_ADAMW),
    "stage1_bf16": dict(ranks=2, stage=1, groups=2, bf16={"enabled": True}, optimizer=ADAMW, scheduler=WARMUP),
    "stage1_bf16_fp32_accumulation": dict(ranks=2, stage=1, groups=2, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}, optimizer=ADAMW),
    "stage2_fp16": dict(ranks=2, stage=2, groups=2, fp16=FP16, optimizer=ADAMW, scheduler=WARMUP, universal=True),
    "stage2_fp32_momentum": dict(ranks=1, stage=2, groups=1, sgd=True),
    "stage3_bf16": dict(ranks=2, stage=3, groups=2, bf16={"enabled": True}, optimizer=ADAMW, scheduler=WARMUP, universal=True),
    "stage3_fp32_subgroups": dict(ranks=2, stage=3, groups=1, sub_group_size=60, optimizer=TORCH_ADAMW),
    "stage3_fp16_host": dict(ranks=2, stage=3, groups=1, fp16=FP16, host=True, optimizer=ADAMW),
}


def write_safetensors(path, tensors):
    import torch
    header, blobs, offset = {}, [], 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().contiguous()
        blob = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def config_of(case):
    zero = {"stage": case["stage"]}
    if case["stage"] == 3:
        zero.update(stage3_param_persistence_threshold=0, sub_group_size=case.get("sub_group_size", 10**9))
    if case.get("host"):
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "gradient_clipping": 1.0}
    if case.get("sgd"):
        config["zero_allow_untested_optimizer"] = True
    for key in ("bf16", "fp16", "data_types", "optimizer", "scheduler"):
        if key in case:
            config[key] = case[key]
    return config


def stage0_states(engine, names):
    """What a stage 0 engine holds, from its optimizer's own objects."""
    import torch
    found = {}
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    flat = getattr(optimizer, "fp32_groups_flat", None)
    if flat is None:
        name_of = dict(names)
        for group, masters in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])):
            name_of.update(zip(masters, (names[parameter] for parameter in group)))
        for parameter, state in inner.state.items():
            found[f"fp32/{name_of[parameter]}"] = parameter.detach().clone()
            for key, value in state.items():
                found[f"{key}/{name_of[parameter]}"] = value.reshape(1) if value.dim() == 0 else value
        return found
    for group, master in zip(optimizer.fp16_groups, flat):
        offset = 0
        for parameter in group:
            cut = slice(offset, offset + parameter.numel())
            found[f"fp32/{names[parameter]}"] = master[cut].view(parameter.shape)
            for key, value in inner.state[master].items():
                found[f"{key}/{names[parameter]}"] = value[cut].view(parameter.shape) if torch.is_tensor(value) and value.dim() else torch.tensor([float(value)])
            offset += parameter.numel()
    return found


def full_state(engine, case, parameter, key):
    """One optimizer state, whole. DeepSpeed's accessor does not always find it at stages 1 and 2; there the ranks' flat tensors are put together."""
    import torch
    from deepspeed.utils import safe_get_full_optimizer_state
    if case["stage"] == 3:
        return safe_get_full_optimizer_state(parameter, key)
    optimizer = engine.optimizer
    low = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    flat = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    (group,) = [index for index, members in enumerate(low) if any(parameter is member for member in members)]
    whole = torch.zeros(parameter.numel())
    mapping = parameter._hp_mapping
    if mapping is not None:
        mine, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        whole[mine.start:mine.start + mine.numel] = optimizer.optimizer.state[flat[group]][key][there.start:there.start + there.numel]
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def run(name):
    """One rank of one case."""
    sys.path.insert(0, HERE)
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    from model import make_batch, make_groups, make_model
    case = CASES[name]
    rank = int(os.environ["RANK"])
    # DeepSpeed asks whether the processor multiplies in fp16 by itself; files written by one that does not are the same.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo")
    model = make_model()
    extra = {}
    if case.get("sgd"):
        extra["optimizer"] = torch.optim.SGD(make_groups(model, 1), lr=0.05, momentum=0.9)
    engine, optimizer, _, scheduler = deepspeed.initialize(model=model, model_parameters=None if extra else make_groups(model, case["groups"]),
                                                           config=config_of(case), **extra)
    def train(step):
        loss = engine(make_batch(step, rank))
        engine.backward(loss)
        engine.step()
        return loss.detach().float().reshape(1)

    for step in range(3):
        train(step)
    folder = os.path.join(HERE, name)
    engine.save_checkpoint(folder, client_state={"epoch": 4, "note": ("a", 1.5), "history": [1, 2]})
    names = {parameter: key for key, parameter in model.named_parameters()}
    keys = ("momentum_buffer",) if case.get("sgd") else ("exp_avg", "exp_avg_sq")
    if case["stage"] or hasattr(next(p for p in names if p.requires_grad), "_hp_mapping"):
        expected = {}
        for parameter, key in names.items():
            if parameter.requires_grad:
                expected[f"fp32/{key}"] = safe_get_full_fp32_param(parameter)
                for state in keys:
                    expected[f"{state}/{key}"] = full_state(engine, case, parameter, state)
    else:
        expected = {key: value.detach().clone() for key, value in stage0_states(engine, names).items()}
    with deepspeed.zero.GatheredParameters([model.frozen.weight, model.frozen.bias], enabled=case["stage"] == 3):
        for key in ("frozen.weight", "frozen.bias"):
            expected[f"weight/{key}"] = model.get_parameter(key).detach().clone()
    expected["buffer/offset"] = model.offset
    expected["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    losses = torch.cat([train(step) for step in (3, 4)])
    torch.distributed.all_reduce(losses)
    expected["losses"] = losses / case["ranks"]
    if rank == 0:
        write_safetensors(os.path.join(folder, "expected.safetensors"), expected)
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            if os.path.exists(os.path.join(folder, script)):
                os.remove(os.path.join(folder, script))


def main(chosen):
    for name in chosen or CASES:
        case = CASES[name]
        shutil.rmtree(os.path.join(HERE, name), ignore_errors=True)
        ranks = [subprocess.Popen([sys.executable, __file__, "--rank", name],
                                  env=dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["ranks"]), MASTER_ADDR="127.0.0.1",
                                           MASTER_PORT="29631", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"))
                 for rank in range(case["ranks"])]
        if any([process.wait() for process in ranks]):
            sys.exit(f"{name} failed")
        if case.get("universal"):
            source = os.path.join(HERE, name, "global_step3")
            target = os.path.join(HERE, name + "_universal", "universal")
            shutil.rmtree(os.path.dirname(target), ignore_errors=True)
            subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", source, "--output_folder", target,
                            "--num_extract_workers", "1", "--num_merge_workers", "1", *(["--inject_missing_state"] if case["stage"] < 3 else [])], check=True)
            shutil.copy(os.path.join(HERE, name, "expected.safetensors"), os.path.dirname(target))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run(sys.argv[2])
    else:
        main(sys.argv[1:])
