# SPDX-License-Identifier: Apache-2.0
"""ds_checkpoint, zero_to_fp32 and ds_to_universal, on checkpoints of ours (made here by hand) and of DeepSpeed (tests/compat/checkpoints)."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspeed.checkpoint import CheckpointError, ds_to_universal, open_checkpoint, recover
from deepspeed.checkpoint.command import main, size_text, table
from deepspeed.checkpoint.compare import differences
from deepspeed.checkpoint.save import _SCRIPTS
from deepspeed.checkpoint.source import TensorInfo
from deepspeed.utils import zero_to_fp32, zero_to_torch
from tests.unit.checkpoint.by_hand import write_checkpoint

THEIRS = Path(__file__).parents[2] / "compat" / "checkpoints"
CASES = ["stage0_fp16", "stage1_bf16", "stage2_fp16", "stage3_bf16", "stage3_bf16_universal"]


@pytest.fixture
def ours(tmp_path):
    """A run with one checkpoint of ours, the fp32 weights of which are those of stage3_bf16."""
    run = tmp_path / "run"
    write_checkpoint(open_checkpoint(THEIRS / "stage3_bf16"), run / "global_step3", ranks=3)
    (run / "latest").write_text("global_step3")
    return run


def test_ours_and_theirs_compare_equal(ours):
    assert differences(open_checkpoint(ours), open_checkpoint(THEIRS / "stage3_bf16")) == []


# ---- ds_checkpoint

def test_ls_of_a_folder(ours, capsys):
    shutil.copytree(THEIRS / "stage2_fp16" / "global_step3", ours / "older")
    os.utime(ours / "older", (1, 1))
    (ours / "notes").mkdir()
    (ours / "broken").mkdir()
    (ours / "broken" / "manifest.json").write_text("{}")
    assert main(["ls", str(ours)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:1] for line in lines if "step 3" in line] == [["older"], ["*"]]
    assert any("broken" in line and "cannot be read" in line for line in lines) and not any("notes" in line for line in lines)


def test_ls_of_a_checkpoint(ours, capsys):
    assert main(["ls", str(ours), "-t", "global_step3", "-k", "exp_avg"]) == 0
    text = capsys.readouterr().out
    assert "step 3" in text and "220 parameters" in text and "head.weight is tied to embed.weight" in text
    assert [line.split() for line in text.splitlines() if line.startswith("first.weight")] == [["first.weight", "exp_avg", "F32", "7x6", "168", "B", "3"]]


def test_verify(ours, capsys):
    assert main(["verify", str(ours), "--all"]) == 0 and "good" in capsys.readouterr().out
    file = next((ours / "global_step3").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(ours)]) == 1
    text = capsys.readouterr().out
    assert file.name in text and "DAMAGED" in text


def test_diff(ours, capsys):
    assert main(["diff", str(ours), str(THEIRS / "stage3_bf16")]) == 0
    assert "are the same" in capsys.readouterr().out
    assert main(["diff", str(ours), str(THEIRS / "stage3_fp32_subgroups")]) == 1
    assert "42 of 42 elements" in capsys.readouterr().out


def test_diff_says_what_kind_of_difference(tmp_path):
    class Source:
        path = "here"

        def __init__(self, **tensors):
            self.values = tensors
            self.tensors = {(name, "fp32"): TensorInfo(name, "fp32", "BF16" if t.dtype == torch.bfloat16 else "F32", tuple(t.shape), (), ())
                            for name, t in tensors.items()}

        def read_into(self, requests):
            for name, _, begin, numel, _, buffer in requests:
                buffer[:] = self.values[name].reshape(-1)[begin:begin + numel].view(torch.uint8).numpy().tobytes()

    nan, base = torch.tensor([1.0, float("nan")]), torch.arange(4.0)
    first = Source(same=base, dtype=base, nan=nan, value=base, shape=base, gone=base)
    second = Source(same=base, dtype=base.bfloat16(), nan=nan.clone(), value=base + torch.tensor([0, 0, 0.5, 0]), shape=base.view(2, 2), new=base)
    said = {found.name: found.what for found in differences(first, second)}
    assert said == {"dtype": "dtype F32 and BF16", "value": "1 of 4 elements, by 0.5 at most", "shape": "shape [4] and [2, 2]", "gone": "only in here",
                    "new": "only in here"}


@pytest.mark.parametrize("arguments, file", [([], "model.safetensors"), (["--to", "torch"], "pytorch_model.bin"),
                                             (["--dtype", "bf16", "--max-shard-size", "300"], "model-00001-of-00002.safetensors")])
def test_convert(arguments, file, ours, tmp_path):
    assert main(["convert", str(ours), str(tmp_path / "out"), *arguments]) == 0
    assert (tmp_path / "out" / file).is_file()


def test_convert_to_universal(ours, tmp_path, capsys):
    assert main(["convert", str(ours), str(tmp_path / "uni" / "step3"), "--to", "universal"]) == 0
    found = open_checkpoint(tmp_path / "uni")
    assert [d for d in differences(found, open_checkpoint(ours)) if "dtype" not in d.what] == []
    assert main(["convert", str(ours), str(tmp_path / "uni"), "--to", "universal", "--dtype", "bf16"]) == 1
    assert "--dtype" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["ls", "/nowhere"], "no such folder"), (["ls", str(THEIRS)], "holds no checkpoint"), (["verify", str(THEIRS)], "latest"),
    (["ls", str(THEIRS / "stage3_bf16"), "-t", "other"], "global_step3"),
    (["convert", str(THEIRS / "stage3_bf16"), "/tmp/never", "--dtype", "int8"], "int8"),
    (["convert", str(THEIRS / "stage3_bf16"), "/tmp/never", "--max-shard-size", "big"], "big")])
def test_errors_are_one_line(arguments, words, capsys):
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert words in text and text.startswith("ds_checkpoint: ") and text.count("\n") == 1
    assert not os.path.exists("/tmp/never")


def test_text():
    assert table(("a", "bb"), [("xxx", 1), ("y", 22)], right=(1,)) == "a    bb\n---  --\nxxx   1\ny    22"
    assert [size_text(n) for n in (0, 999, 1500, 10**12, 10**16)] == ["0 B", "999 B", "1.5 kB", "1.0 TB", "10000.0 TB"]


# ---- zero_to_fp32

def test_lazy_weights(ours):
    lazy = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(ours, lazy_mode=True)
    eager = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(ours)
    assert list(lazy) == list(eager) and lazy["head.weight"] is lazy["embed.weight"]
    for name, value in lazy.items():
        assert value.shape == eager[name].shape and value.dtype == torch.float32 and value.numel() == eager[name].numel()
        assert torch.equal(value.contiguous(), eager[name])
    made = zero_to_fp32.to_torch_tensor(lazy, dtype=torch.bfloat16)
    assert all(torch.equal(made[name], eager[name].bfloat16()) for name in eager) and made["head.weight"] is made["embed.weight"]
    empty = zero_to_fp32.to_torch_tensor(lazy, return_empty_tensor=True)
    assert all(empty[name].shape == eager[name].shape for name in eager)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("case", [*CASES, None])
def test_converted_files_hold_the_state_dict(case, safe, ours, tmp_path):
    folder = ours if case is None else THEIRS / case
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(folder, str(tmp_path / "out"), safe_serialization=safe)
    wanted = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder)
    if safe:
        from deepspeed._native import core
        reader = core().SafetensorsReader(str(tmp_path / "out" / "model.safetensors"))
        read = {name: torch.empty(shape) for name, (_, shape) in reader.tensors.items()}
        for name, value in read.items():
            reader.read(name, value.numpy())
        assert set(read) == set(wanted) - {"head.weight"} and reader.metadata == {"format": "pt", "head.weight": "embed.weight"}
    else:
        read = torch.load(tmp_path / "out" / "pytorch_model.bin")
        assert set(read) == set(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in read.items())


def test_older_callers_name_a_file(ours, tmp_path):
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(ours, str(tmp_path / "weights.bin"))
    assert set(torch.load(tmp_path / "weights.bin")) >= {"embed.weight", "head.weight"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_frozen_weights_can_be_left_out(ours):
    for folder in (ours, THEIRS / "stage2_fp16"):
        with_all = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder)
        without = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
        assert set(with_all) - set(without) == {"frozen.weight", "frozen.bias"}


def test_weights_into_a_model(ours):
    model = torch.nn.Module()
    model.first = torch.nn.Linear(6, 7).bfloat16()
    model.other = torch.nn.Linear(2, 2)
    before = model.other.weight.clone()
    assert zero_to_fp32.load_state_dict_from_zero_checkpoint(model, ours) is model
    wanted = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(ours)
    assert torch.equal(model.first.weight, wanted["first.weight"].bfloat16()) and torch.equal(model.other.weight, before)
    model.first = torch.nn.Linear(6, 8)
    with pytest.raises(RuntimeError, match=r"first\.weight.*\[7, 6\].*\[8, 6\]"):
        zero_to_fp32.load_state_dict_from_zero_checkpoint(model, ours)


def test_copied_scripts_run(ours):
    for name, text in _SCRIPTS.items():
        (ours / name).write_text(text)
    for script, extra in (("zero_to_fp32.py", []), ("zero_to_torch.py", ["--dtype", "bf16"])):
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(Path(recover.__file__).parents[2]), os.environ.get("PYTHONPATH")])))
        out = ours / f"out_{script[:-3]}"
        subprocess.run([sys.executable, script, ".", str(out), "--safe_serialization", *extra], cwd=ours, check=True, env=environment)
        assert (out / "model.safetensors").stat().st_size > 500
    with pytest.raises(SystemExit) as stopped:
        zero_to_torch.main([str(ours), str(ours / "x"), "--dtype", "fp32", "-t", "other"], with_dtype=True)
    assert stopped.value.code == 1


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)


# ---- ds_to_universal

def test_universal_replaces_nothing_but_universal(ours, tmp_path):
    from deepspeed.checkpoint.export.universal import write_universal
    source = open_checkpoint(ours)
    for folder in (ours, ours.parent):
        with pytest.raises(ValueError, match="holds the checkpoint that is to be converted"):
            write_universal(source, str(folder))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a universal checkpoint"):
        write_universal(source, str(precious))
    assert (precious / "file").read_text() == "x" and open_checkpoint(ours).verify() == []
    for _ in range(2):
        write_universal(source, str(tmp_path / "out" / "universal"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latest_universal", "universal"]


@pytest.mark.parametrize("name, kind", [("../w", "fp32"), ("w", "../../fp32"), ("w", "/fp32"), ("/w", "fp32")])
def test_names_of_a_manifest_stay_inside(ours, tmp_path, name, kind):
    from deepspeed.checkpoint.export.universal import write_universal
    source = open_checkpoint(ours)
    source.tensors[name, kind] = next(iter(source.tensors.values()))
    with pytest.raises(ValueError, match="cannot have a"):
        write_universal(source, str(tmp_path / "universal"))
    assert not (tmp_path / "universal").exists()


@pytest.mark.parametrize("case", [*CASES, None])
def test_universal_holds_everything(case, ours, tmp_path):
    folder = ours / "global_step3" if case is None else next(path for path in (THEIRS / case).iterdir() if path.is_dir())
    ds_to_universal.main(["--input_folder", str(folder), "--output_folder", str(tmp_path / "universal"), "--num_extract_workers", "2"])
    assert (tmp_path / "latest_universal").read_text() == "universal"
    first, second = open_checkpoint(folder), open_checkpoint(tmp_path)
    # DeepSpeed keeps frozen weights in fp32 here; values are the same.
    assert [found for found in differences(first, second) if "elements" in found.what or "only" in found.what] == []
    for key in ("client_state", "counters", "lr_scheduler"):
        assert first.state.get(key) == second.state.get(key), key
    assert (first.state.get("loss_scaler") or {}).items() <= (second.state.get("loss_scaler") or {}).items()
    assert first.state["optimizer"]["groups"] == second.state["optimizer"]["groups"] and first.aliases == second.aliases
    assert not [path for path in tmp_path.iterdir() if "part" in path.name]


def test_states_without_names_are_not_dropped_silently(tmp_path):
    folder = THEIRS / "stage0_fp32" / "global_step3"
    with pytest.raises(ValueError, match="no_strict"):
        ds_to_universal.main(["--input_folder", str(folder), "--output_folder", str(tmp_path / "universal")])
    ds_to_universal.main(["--input_folder", str(folder), "--output_folder", str(tmp_path / "universal"), "--no_strict"])
    found, weights = open_checkpoint(tmp_path / "universal"), open_checkpoint(folder)
    assert torch.equal(found.read("first.weight", "fp32"), weights.read("first.weight", "weight"))


def test_a_parameter_cannot_leave_the_folder(tmp_path):
    source = open_checkpoint(THEIRS / "stage3_bf16")
    info = source.tensors["scale", "fp32"]
    source.tensors = {("../../escaped", "fp32"): info}
    from deepspeed.checkpoint.export.universal import write_universal
    with pytest.raises(ValueError, match="escaped"):
        write_universal(source, str(tmp_path / "a" / "universal"))
    assert list(tmp_path.iterdir()) == []
