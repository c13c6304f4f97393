# SPDX-License-Identifier: Apache-2.0
"""Monitors write what they are given, on rank 0, through their packages' public calls, and never end the training."""
import logging
import os
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest

from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.monitor import Monitor, MonitorMaster
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor
from deepspeed.telemetry.logs import logger
from deepspeed.telemetry.monitors import read_csv

EVENTS = [("Train/Samples/train_loss", 0.5, 8), ("Train/Samples/lr", 1e-3, 8)]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def files(tmp_path, **more):
    return SimpleNamespace(enabled=True, output_path=str(tmp_path), job_name="job", **more)


def sections(tmp_path, **enabled):
    return get_monitor_config({name: {"enabled": True, **({"output_path": str(tmp_path)} if name in ("tensorboard", "csv_monitor") else {})}
                               for name in enabled})


# ---- csv


def test_csv_rows_are_in_the_files_at_once(tmp_path):
    monitor = csvMonitor(files(tmp_path))
    monitor.write_events(EVENTS)
    assert (tmp_path / "job" / "Train_Samples_train_loss.csv").read_text() == "step,train_loss\n8,0.5\n"
    assert (tmp_path / "job" / "Train_Samples_lr.csv").read_text() == "step,lr\n8,0.001\n"
    assert sorted(monitor.filenames) == ["Train_Samples_lr", "Train_Samples_train_loss"]
    monitor.close()


def test_csv_names_become_safe_file_names(tmp_path):
    csvMonitor(files(tmp_path)).write_events([("a b/../c", 1, 1)])
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["a_b_.._c.csv"]


@pytest.mark.parametrize("left_over", ["", "16,0.2", "1"])
def test_csv_started_again_appends_without_a_second_header_or_half_a_row(tmp_path, left_over):
    first = csvMonitor(files(tmp_path))
    first.write_events([("loss", 0.5, 8)])
    first.close()
    path = tmp_path / "job" / "loss.csv"
    with open(path, "a") as out:
        out.write(left_over)  # a writer that was killed
    second = csvMonitor(files(tmp_path))
    second.write_events([("loss", 0.25, 8), ("loss", 0.125, 16)])
    assert path.read_text() == "step,loss\n8,0.5\n8,0.25\n16,0.125\n"
    assert read_csv(path) == {8: 0.25, 16: 0.125}


def test_read_csv_names_a_bad_row(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("step,x\n1,one\n")
    with pytest.raises(ValueError, match="x.csv.*'1,one'"):
        read_csv(path)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monitor = csvMonitor(files(tmp_path))
    monitor.write_events(EVENTS)
    master = MonitorMaster(sections(tmp_path, csv_monitor=True))
    master.write_events(EVENTS)
    assert master.enabled and master.csv_monitor is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [csvMonitor, TensorBoardMonitor])
def test_a_second_monitor_of_a_process_has_its_own_folder(tmp_path, kind, warnings, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    section = "csv_monitor" if kind is csvMonitor else "tensorboard"
    first = kind(files(tmp_path))
    assert not warnings
    second, third = kind(files(tmp_path)), kind(files(tmp_path))
    assert [os.path.basename(m.log_dir) for m in (first, second, third)] == ["job", "job_2", "job_3"]
    assert len(warnings) == 2 and all(f"{section}.job_name" in line for line in warnings) and "job_2" in warnings[0]
    second.close()
    assert os.path.basename(kind(files(tmp_path)).log_dir) == "job_2"
    first.close()
    assert os.path.basename(kind(files(tmp_path)).log_dir) == "job"


def test_csv_of_two_engines_do_not_mix(tmp_path, warnings):
    first, second = csvMonitor(files(tmp_path)), csvMonitor(files(tmp_path))
    for monitor, value in ((first, 1.0), (second, 2.0), (first, 3.0)):
        monitor.write_events([("loss", value, int(value))])
    assert read_csv(tmp_path / "job" / "loss.csv") == {1: 1.0, 3: 3.0} and read_csv(tmp_path / "job_2" / "loss.csv") == {2: 2.0}


@pytest.mark.parametrize("way", ["file", "forbidden", "later"])
def test_csv_that_cannot_be_written_names_the_key(tmp_path, way, warnings, monkeypatch):
    if way == "file":
        (tmp_path / "DeepSpeedJobName").write_text("")
    if way == "forbidden":
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    master = MonitorMaster(sections(tmp_path, csv_monitor=True))
    if way == "later":
        (tmp_path / "DeepSpeedJobName" / "Train_Samples_lr.csv").mkdir()
    master.write_events(EVENTS)
    master.write_events(EVENTS)
    assert (master.csv_monitor is None) == (way != "later") and len(warnings) == 1
    assert "csv_monitor.output_path: " in warnings[0] and str(tmp_path) in warnings[0] and "name a folder" in warnings[0]


# ---- tensorboard


class Writer:
    """What of SummaryWriter's public face a monitor needs."""
    made = []

    def __init__(self, log_dir=None):
        self.log_dir, self.calls = log_dir, []
        Writer.made.append(self)

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.calls.append((tag, scalar_value, global_step))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_tensorboard_calls(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monitor = TensorBoardMonitor(files(tmp_path))
    monitor.write_events(EVENTS)
    monitor.write_events(EVENTS[:1], flush=False)
    writer = monitor.summary_writer
    monitor.close()
    assert writer.log_dir == os.path.join(str(tmp_path), "job")
    assert writer.calls == [*EVENTS, "flush", EVENTS[0], "close"]


def test_tensorboard_files_read_back(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed on this machine")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monitor = TensorBoardMonitor(files(tmp_path))
    monitor.write_events(EVENTS)
    found = EventAccumulator(str(tmp_path / "job"))
    found.Reload()
    for name, value, step in EVENTS:
        event, = found.Scalars(name)
        assert (event.step, event.value) == (step, pytest.approx(value))
    monitor.close()


# ---- services


class Run:
    def __init__(self, kept):
        self.kept = kept

    def log(self, data, step=None, commit=None):
        self.kept.append((data, step))


def test_wandb_calls(monkeypatch):
    kept = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: kept.append(kwargs) or Run(kept)))
    monitor = WandbMonitor(SimpleNamespace(enabled=True, group="g", team="t", project="p"))
    monitor.write_events([*EVENTS, ("Train/Samples/lr", 2e-3, 16)])
    assert kept == [{"project": "p", "group": "g", "entity": "t"},
                    ({"Train/Samples/train_loss": 0.5, "Train/Samples/lr": 1e-3}, 8), ({"Train/Samples/lr": 2e-3}, 16)]


class Experiment:
    def __init__(self):
        self.kept = []

    def set_name(self, name):
        self.kept.append(name)

    def log_metric(self, name, value, step=None, epoch=None, include_context=True):
        self.kept.append((name, value, step))


def test_comet_calls(monkeypatch):
    experiment, started = Experiment(), []
    monkeypatch.setitem(sys.modules, "comet_ml", SimpleNamespace(start=lambda **kwargs: started.append(kwargs) or experiment))
    section = {"samples_log_interval": 10, "project": "p", "experiment_name": "n", "online": False}
    monitor = CometMonitor(get_monitor_config({"comet": {"enabled": True, **section}}).comet)
    for step in (8, 16, 18, 30):
        monitor.write_events([("loss", 1.0 / step, step)])
    assert started == [{"project": "p", "online": False}] and monitor.experiment is experiment
    assert experiment.kept == ["n", ("loss", 1 / 8, 8), ("loss", 1 / 18, 18), ("loss", 1 / 30, 30)]


# ---- all of them


@pytest.mark.parametrize("section,package", [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_missing_package_is_said_once_and_is_no_error(tmp_path, monkeypatch, warnings, section, package):
    monkeypatch.setitem(sys.modules, package, None)
    master = MonitorMaster(sections(tmp_path, **{section: True, "csv_monitor": True}))
    master.write_events(EVENTS)
    message, = warnings
    assert f"{section}.enabled" in message and f"pip install {package}" in message
    assert master.csv_monitor is not None and (tmp_path / "DeepSpeedJobName").is_dir()


def test_a_failing_monitor_is_said_once_and_tried_again(tmp_path, warnings):
    master = MonitorMaster(sections(tmp_path, csv_monitor=True))
    good = master.csv_monitor.write_events
    master.csv_monitor.write_events = lambda events: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    master.write_events(EVENTS)
    master.write_events(EVENTS)
    message, = warnings
    assert "csv_monitor" in message and "No space left on device" in message
    master.csv_monitor.write_events = good
    master.write_events(EVENTS)
    assert (tmp_path / "DeepSpeedJobName" / "Train_Samples_lr.csv").exists()


def test_master_with_nothing_enabled():
    master = MonitorMaster(get_monitor_config({}))
    assert not master.enabled and isinstance(master, Monitor)
    assert (master.tb_monitor, master.wandb_monitor, master.csv_monitor, master.comet_monitor) == (None,) * 4
    master.write_events(EVENTS)


# ---- curves


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed on this machine")
    monitor = csvMonitor(files(tmp_path))
    for step in range(1, 81):
        monitor.write_events([("Train/Samples/train_loss", 1.0 / step, step), ("Train/Samples/lr", 1e-3, step),
                              ("Train/Samples/elapsed_time_ms_step", 3.0, step)])
    out = tmp_path / "pictures" / "c.png"
    done = subprocess.run([sys.executable, "-m", "deepspeed.telemetry.curves", str(tmp_path / "job"), "-o", str(out)], capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    from PIL import Image
    with Image.open(out) as image:
        assert image.width > 1000 and len(image.convert("RGB").resize((50, 50)).getcolors(2500)) > 10


def test_curves_say_what_is_wrong(tmp_path):
    from deepspeed.telemetry import curves
    with pytest.raises(ValueError, match="holds no CSV files"):
        curves.draw([tmp_path], tmp_path / "x.png")
    csvMonitor(files(tmp_path)).write_events(EVENTS)
    with pytest.raises(ValueError, match="none of accuracy was recorded; there are lr, train_loss"):
        curves.draw([tmp_path / "job"], tmp_path / "x.png", ["accuracy"])


def test_running_mean_skips_what_is_not_finite():
    from deepspeed.telemetry.curves import running_mean
    assert running_mean([1.0, float("inf"), 3.0, 5.0], 3) == [1.0, 2.0, 4.0, 4.0]
