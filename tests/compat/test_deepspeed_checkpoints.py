# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that DeepSpeed 0.19.8 itself wrote (checkpoints/make.py), read and compared with what its own engine said was in it."""
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from deepspeed.checkpoint import CheckpointError, open_checkpoint
from deepspeed.checkpoint.compare import differences
from deepspeed.checkpoint.foreign.adapter import ForeignCheckpoint
from deepspeed.utils import zero_to_fp32

FOLDER = Path(__file__).with_name("checkpoints")
CASES = sorted(path.parent.name for path in FOLDER.glob("*/expected.safetensors"))
MATRICES, VECTORS = ["embed.weight", "first.weight", "second.weight"], ["scale", "first.bias", "second.bias"]
ONE_GROUP = [["scale", "embed.weight", "first.weight", "first.bias", "second.weight", "second.bias"]]
# Stage 0 numbers the optimizer's parameters; whoever loads knows his groups.
GROUPS = {"stage0_fp32": [MATRICES, VECTORS], "stage0_fp16": [MATRICES, VECTORS], "stage0_fp16_flat": [MATRICES, VECTORS], "stage0_bf16": ONE_GROUP}


def expected_of(case):
    data = (FOLDER / case / "expected.safetensors").read_bytes()
    size, = struct.unpack("<Q", data[:8])
    return {name: torch.from_numpy(numpy.frombuffer(data[8 + size:], numpy.float32)[slice(*(at // 4 for at in entry["data_offsets"]))].copy())
            .reshape(entry["shape"]) for name, entry in json.loads(data[8:8 + size]).items()}


def tag_of(case):
    return next(path for path in (FOLDER / case).iterdir() if path.is_dir())


def opened(case):
    return open_checkpoint(tag_of(case), group_names=GROUPS.get(case))


def test_every_kind_of_checkpoint_is_here():
    assert {f"stage{stage}" for stage in range(4)} <= {case[:6] for case in CASES} and len(CASES) == 13


@pytest.mark.parametrize("case", CASES)
def test_weights_and_states_are_those_of_the_engine_that_saved(case):
    source, compared = opened(case), 0
    for entry, values in expected_of(case).items():
        kind, _, name = entry.partition("/")
        if not name or kind == "step":
            continue
        found = source.tensors.get((name, kind))
        if found is None and kind == "fp32":
            kind = "weight"   # trained in fp32 without another copy
        assert torch.equal(source.read(name, kind).float(), values), entry
        compared += 1
    assert compared >= 15
    assert source.aliases == {"head.weight": "embed.weight"}
    assert source.verify() == []


@pytest.mark.parametrize("case", CASES)
def test_everything_is_listed_once(case):
    names = {name for name, kind in opened(case).tensors if kind in ("fp32", "weight", "buffer")}
    assert names == {*MATRICES, *VECTORS, "frozen.weight", "frozen.bias", "offset"}


@pytest.mark.parametrize("case", CASES)
def test_ranges_are_those_of_the_whole(case):
    source = opened(case)
    for name, kind in source.tensors:
        whole = source.read(name, kind).reshape(-1)
        for begin, count in ((0, 1), (whole.numel() // 2, whole.numel() - whole.numel() // 2), (whole.numel() - 1, 1), (whole.numel() // 3, whole.numel() // 3)):
            assert torch.equal(source.read(name, kind, begin, count), whole[begin:begin + count]), (name, kind, begin, count)


@pytest.mark.parametrize("case", CASES)
def test_run_continues_where_it_was(case):
    state = opened(case).state
    assert state["client_state"] == {"epoch": 4, "note": ("a", 1.5), "history": [1, 2]}
    assert state["counters"]["global_steps"] == 3 and state["counters"]["skipped_steps"] == 0
    groups = state["optimizer"]["groups"]
    assert [lr for lr in expected_of(case)["lr"].tolist()] == pytest.approx([group["values"]["lr"] for group in groups], rel=1e-6)
    assert sorted(name for group in groups for name in group["params"]) == sorted(MATRICES + VECTORS)
    if len(groups) == 2:
        assert [group["params"] for group in groups] == [MATRICES, VECTORS]
        assert [group["values"]["weight_decay"] for group in groups] == [0.1, 0.0]
    # DeepSpeed's stage 0 in 16 bits makes one update of zeros to create its optimizer's states.
    warmed = case in ("stage0_fp16", "stage0_fp16_flat", "stage0_bf16")
    assert state["optimizer"]["steps"] == 3 + warmed and not state["optimizer"]["missed_steps"]
    assert ("loss_scaler" in state) == ("fp16" in case)
    if "fp16" in case:
        assert state["loss_scaler"]["cur_scale"] == 128.0 and state["loss_scaler"]["cur_iter"] == 3


def test_names_at_stage_0_without_an_engine():
    """Masters tell which weight they are; without any, shapes that fit two parameters are left unnamed with the reason."""
    told = ForeignCheckpoint(tag_of("stage0_fp16"))
    assert told.unnamed is None and differences(told, opened("stage0_fp16")) == []
    untold = ForeignCheckpoint(tag_of("stage0_fp32"))
    assert "does not name them" in untold.unnamed
    assert {kind for _, kind in untold.tensors} == {"weight", "buffer"} and untold.aliases


@pytest.mark.parametrize("groups, reason", [([MATRICES], "1"), ([MATRICES, ["scale", "first.bias", "first.bias"]], "shapes"),
                                            ([MATRICES, [*VECTORS[:2], "third.bias"]], "third.bias")])
def test_groups_that_do_not_fit_are_refused(groups, reason):
    with pytest.raises(CheckpointError, match=reason):
        ForeignCheckpoint(tag_of("stage0_fp32"), groups)


def test_universal_is_the_same_as_what_it_was_converted_from():
    for case in ("stage2_fp16", "stage3_bf16"):
        first, second = opened(case), opened(case + "_universal")
        assert [found for found in differences(first, second) if "dtype" not in found.what] == []
        assert first.state == second.state


# ---- the API of zero_to_fp32

@pytest.mark.parametrize("case", CASES)
def test_whole_fp32_weights(case):
    state, values = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(FOLDER / case, tag_of(case).name), expected_of(case)
    assert set(state) == {*MATRICES, *VECTORS, "frozen.weight", "frozen.bias", "offset", "head.weight"}
    for entry, wanted in values.items():
        kind, _, name = entry.partition("/")
        if kind in ("weight", "buffer") or (kind == "fp32" and not case.startswith("stage0_fp16_flat")):
            assert state[name].dtype == torch.float32 and torch.equal(state[name], wanted), entry
    assert state["head.weight"] is state["embed.weight"]


def test_functions_on_files():
    tag = tag_of("stage3_bf16")
    files = zero_to_fp32.get_model_state_files(tag)
    assert [Path(file).name for file in files] == [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)]
    assert zero_to_fp32.get_model_state_file(tag, 3) == files[0]
    first = zero_to_fp32.parse_model_states(files)[0]
    assert first.param_shapes[0]["first.weight"] == torch.Size((7, 6)) and set(first.buffers) == {"offset"}
    assert first.shared_params == [["head.weight", "embed.weight"]] and first.ds_version == "0.19.8"
    stage, ranks, flats, _ = zero_to_fp32.parse_optim_states(zero_to_fp32.get_optim_files(tag), tag)
    assert (stage, ranks, len(flats)) == (3, 2, 2) and all(torch.is_tensor(flat) for flat in flats[0])
    with pytest.raises(FileNotFoundError):
        zero_to_fp32.get_model_state_file(tag_of("stage2_fp16"), 3)


# ---- damage and tricks

def copied(case, tmp_path):
    return Path(shutil.copytree(tag_of(case), tmp_path / "tag"))


@pytest.mark.parametrize("case, lost", [("stage3_bf16", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"), ("stage3_bf16", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
                                        ("stage2_fp16", "zero_pp_rank_0_mp_rank_00_optim_states.pt"), ("stage2_fp16", "mp_rank_00_model_states.pt"),
                                        ("stage3_bf16_universal", "zero/first.bias")])
def test_a_missing_file_is_named(case, lost, tmp_path):
    tag = copied(case, tmp_path)
    (shutil.rmtree if (tag / lost).is_dir() else Path.unlink)(tag / lost)
    with pytest.raises(CheckpointError, match="missing|holds no|were? (written|here)|first.bias|model states of"):
        open_checkpoint(tag)


@pytest.mark.parametrize("case", ["stage0_fp32", "stage2_fp16", "stage3_bf16"])
@pytest.mark.parametrize("keep", [0, 10, 400, -1, -3000])
def test_torn_files_are_named(case, keep, tmp_path):
    tag = copied(case, tmp_path)
    file = sorted(tag.glob("*.pt"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=file.name):
        open_checkpoint(tag)


def test_flipped_bits_are_found(tmp_path):
    """Anywhere in the file: refused at once, or found by verify(), or in bytes that no reader looks at."""
    tag = copied("stage3_bf16", tmp_path)
    whole = open_checkpoint(tag)
    values = {key: whole.read(*key) for key in whole.tensors}
    file = sorted(tag.glob("*optim*.pt"))[0]
    data = file.read_bytes()
    for at in range(7, len(data), 97):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:])
        try:
            source = open_checkpoint(tag)
        except CheckpointError:
            continue
        changed = any(not torch.equal(source.read(*key), values[key]) for key in values)
        assert not changed or source.verify(), f"byte {at}"


def test_other_parallelism_is_refused(tmp_path):
    tag = copied("stage2_fp16", tmp_path)
    for name in ("mp_rank_01_model_states.pt", "layer_00-model_00-model_states.pt", "layer_0_expert_3_mp_rank_00_model_states.pt",
                 "zero_pp_rank_0_mp_rank_01_optim_states.pt"):
        (tag / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(tag)
        (tag / name).unlink()
    open_checkpoint(tag)


def test_nothing_here_needs_torch():
    """Listing and reading values is for machines without it, and quick."""
    script = ("import sys; from deepspeed.checkpoint.location import open_checkpoint; from deepspeed.checkpoint.command import main\n"
              f"open_checkpoint({str(FOLDER / 'stage3_bf16')!r}).verify(); main(['ls', {str(FOLDER / 'stage2_fp16')!r}, '-t', 'global_step3'])\n"
              "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
