# SPDX-License-Identifier: Apache-2.0
"""ds_io and ds_nvme_tune: their flags, tables, JSON and refusals."""
import json
import os

import pytest
import torch

from deepspeed._native import core
from deepspeed.config import DeepSpeedConfig
from deepspeed.nvme import ds_io, show, tune, work


def output(capsys, command, *arguments):
    assert command.run([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("text, number", [("1", 1), ("4k", 4096), ("400M", 400 * 2**20), ("2GiB", 2**31), ("1T", 2**40)])
def test_sizes(text, number):
    assert show.parse_size(text) == number
    assert show.parse_size(show.size(number)) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "M", "1X"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="not a size"):
        show.parse_size(text)


@pytest.mark.parametrize("flags", [
    [], ["--read"], ["--read", "--validate", "--sequential_requests", "--single_submit"], ["--engine", "aio_basic", "--io_parallel", 2],
    ["--engine", "torch_io"], ["--engine", "torch_io", "--torch_legacy_save", "--read"],
    ["--engine", "torch_fastio", "--fast_io_size", "64K", "--read"], ["--different_file_each_iteration", "--warmup_loops", 0, "--loops", 2],
], ids=lambda flags: " ".join(map(str, flags)) or "plain")
def test_ds_io(capsys, tmp_path, flags):
    result = json.loads(output(capsys, ds_io, "--folder", tmp_path, "--io_size", "1M", "--block_size", "64K", "--queue_depth", 4, "--json", *flags))
    assert result["operation"] == ("read" if "--read" in flags else "write")
    assert result["bytes"] == 2**20 and result["gigabytes_per_second"]["median"] > 0
    assert len(result["seconds"]) == (2 if "--different_file_each_iteration" in flags else 3)
    assert result["aio"]["block_size"] == 65536 and result["aio"]["overlap_events"] is ("--sequential_requests" not in flags)
    DeepSpeedConfig({"train_batch_size": 1, "aio": result["aio"]})
    assert os.listdir(tmp_path) == []


def test_ds_io_with_processes_shows_a_table(capsys, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    table = output(capsys, ds_io, "--folder_to_device_mapping", f"{tmp_path}/a:0", f"{tmp_path}/b:1", "--io_size", "1M", "--include_warmup_time")
    head, _, row = table.splitlines()
    assert dict(zip(["", *head.split()[:-4]], row.split()))["processes"] == "2" and " 4 " in row   # three loops and the first


@pytest.mark.parametrize("flags, text", [
    (["--io_size", "0"], "--io_size: not a size"), (["--io_size", "1M"], "one of --folder and --folder_to_device_mapping"),
    (["--io_size", "1M", "--folder", "/none"], "--folder: no such folder: /none"), (["--folder", "/tmp"], "--io_size"),
    (["--io_size", "1M", "--folder", "/tmp", "--queue_depth", "0"], "--queue_depth: must be an int of at least 1"),
    (["--io_size", "1M", "--folder", "/tmp", "--engine", "floppy"], "--engine"),
    (["--io_size", "1M", "--folder", "/tmp", "--use_gds"], "--use_gds: GPUDirect storage is not part of this build"),
    (["--io_size", "1M", "--folder", "/tmp", "--slow_bounce_buffer"], "--slow_bounce_buffer: only with --gpu"),
    (["--io_size", "1M", "--folder_to_device_mapping", "/tmp"], "must be FOLDER:DEVICE, got '/tmp'"),
    (["--io_size", "1M", "--folder_to_device_mapping", "/tmp:0", "--multi_process", "3"], "--multi_process 3, but"),
])
def test_ds_io_refuses(capsys, flags, text):
    with pytest.raises(SystemExit) as ended:
        ds_io.run(flags)
    assert ended.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_ds_io_says_that_there_is_no_gpu(capsys, tmp_path):
    with pytest.raises(SystemExit):
        ds_io.run(["--folder", str(tmp_path), "--io_size", "1M", "--gpu"])
    assert "--gpu: torch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_ends_the_command(capsys, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("DS_IO_FAULTS", "error=1")
    assert ds_io.run(["--folder", str(tmp_path), "--io_size", "1M", "--multi_process", str(processes)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "ds_io: " in captured.err and str(tmp_path) in captured.err and "Input/output error" in captured.err
    assert os.listdir(tmp_path) == []


def test_the_writer_keeps_every_byte(tmp_path):
    handle = core().FileHandle(block_size=4096, queue_depth=2, single_submit=False, overlap_events=True, intra_op_parallelism=1)
    pieces = [bytes([i % 251]) * n for i, n in enumerate([1, 4095, 4096, 0, 10000, 3, 33333, 8192])]
    writer = work.HandleWriter(handle, str(tmp_path / "f"), 8192)
    assert [writer.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
    writer.close()
    assert (tmp_path / "f").read_bytes() == b"".join(pieces)


def test_tune_prints_a_section_of_the_configuration(capsys, tmp_path):
    grid = {"block_size": ["64K", 131072], "queue_depth": [2], "sequential_requests": [False, True], "io_parallel": [1]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    text = output(capsys, tune, "--nvme_dir", tmp_path, "--io_size", "1M", "--sweep_config", tmp_path / "grid.json", "--log_dir", tmp_path / "log")
    table, _, section = text.partition("\n\n")
    assert len(table.splitlines()) == 2 + 4 and table.count("<") == 1
    DeepSpeedConfig({"train_batch_size": 1, **json.loads(section)})
    assert json.loads((tmp_path / "log" / "aio.json").read_text()) == json.loads(section)
    rows = json.loads((tmp_path / "log" / "results.json").read_text())
    assert all(row["read"] > 0 and row["write"] > 0 for row in rows)
    tune.generate_main(str(tmp_path / "log"))
    assert json.loads(capsys.readouterr().out) == json.loads(section)


def test_tune_of_one_direction(capsys, tmp_path):
    (tmp_path / "grid.json").write_text('{"block_size": ["64K"], "queue_depth": [2]}')
    for flag, left in (("--no_read", "write"), ("--no_write", "read")):
        output(capsys, tune, "--nvme_dir", tmp_path, "--io_size", "1M", "--sweep_config", tmp_path / "grid.json", "--log_dir", tmp_path, flag, "--loops", 2)
        assert [set(row) for row in json.loads((tmp_path / "results.json").read_text())] == [{"aio", left}]


def test_the_best_is_the_leanest_of_the_fastest():
    def row(write, read, depth):
        return {"aio": {"block_size": 4096, "queue_depth": depth, "intra_op_parallelism": 1}, "write": write, "read": read}
    rows = [row(2.0, 2.0, 128), row(1.98, 1.97, 32), row(1.0, 4.0, 8)]
    assert tune.best(rows) is rows[1]


@pytest.mark.parametrize("content, text", [
    ("[1]", "must hold an object"), ("{", "Expecting"), ('{"blocks": [1]}', "unknown key 'blocks'"), ('{"queue_depth": 8}', "queue_depth must be a list"),
    ('{"queue_depth": [0]}', "queue_depth: must be an int of at least 1"), ('{"single_submit": [1]}', "single_submit: must be true or false"),
    ('{"block_size": ["big"]}', "not a size: 'big'"),
])
def test_tune_refuses_a_bad_grid(capsys, tmp_path, content, text):
    (tmp_path / "grid.json").write_text(content)
    with pytest.raises(SystemExit):
        tune.parse_sweep_arguments(["--nvme_dir", str(tmp_path), "--sweep_config", str(tmp_path / "grid.json")])
    assert text in capsys.readouterr().err


def test_tune_refuses(capsys, tmp_path):
    for flags, text in [(["--no_read", "--no_write"], "nothing to measure"), (["--gds"], "--gds: GPUDirect storage"),
                        (["--loops", "0"], "--loops: must be an int")]:
        with pytest.raises(SystemExit):
            tune.parse_sweep_arguments(["--nvme_dir", str(tmp_path), *flags])
        assert text in capsys.readouterr().err
