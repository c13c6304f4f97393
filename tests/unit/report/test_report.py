# SPDX-License-Identifier: Apache-2.0
"""The command as users start it, in a process of its own; and what single probes say about made-up machines."""
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from deepspeed.report import files, gpus, machine, software

SECTIONS = ["versions", "build", "processor", "memory", "devices", "devices in use", "NCCL", "operators", "files", "programs",
            "environment"]


def ds_report(*arguments, module="deepspeed.report", **environment):
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=60,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return json.loads(ds_report("--json", "--folder", str(tmp_path_factory.mktemp("files"))))


def facts(report, section):
    return {fact["name"]: fact for fact in report[section]["facts"]}


def test_every_probe_answers(report):
    assert list(report) == SECTIONS
    assert {name: section["message"] for name, section in report.items() if section["status"] != "ok"} == {}


def test_every_no_says_what_to_do(report):
    assert [fact["name"] for section in report.values() for fact in section["facts"] if fact["ok"] is False and not fact["advice"]] == []


def test_the_build_tells_how_it_was_made(report):
    from deepspeed._native import core
    build = facts(report, "build")
    assert build["instruction set chosen"]["value"].split()[0] in build["instruction sets compiled"]["value"].split()
    assert build["built against torch"]["ok"] and core().TORCH_VERSION in build["built against torch"]["value"]
    assert core().BUILD_INFO["compiler"] in build["compiler"]["value"]


def test_every_op_has_a_line(report):
    text = " ".join(facts(report, "operators"))
    for op in ("cpu_adam", "fused_adam", "cpu_lion", "fused_lion", "cpu_adagrad", "fused_lamb", "sgd", "muon", "collectives", "async_io"):
        assert op in text


def test_text_and_flags():
    text = ds_report()
    assert "->" in text and "operators\n" in text and "torch imports" not in text
    text = ds_report("--hide_operator_status", "--hide_errors_and_warnings", module="deepspeed.env_report")
    assert "->" not in text and "operators\n" not in text and "versions\n" in text


def test_torch_is_touched_only_when_asked(tmp_path):
    """A torch whose import fails loudly is on the path: the report does not notice, --torch does."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch/version.py").write_text("__version__ = '2.11.0'\ncuda: str = '13.0'\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    report = json.loads(ds_report("--json", "--torch", PYTHONPATH=path))
    assert "imported" in report["torch"]["message"]
    assert {name for name, section in report.items() if section["status"] != "ok"} == {"torch"}
    assert facts(report, "versions")["torch"]["value"].startswith("2.11.0 (CUDA 13.0)")


def test_from_a_process_with_torch(capfd):
    import torch  # noqa: F401

    import deepspeed
    deepspeed.env_report.main(hide_operator_status=True)
    out = capfd.readouterr().out
    assert "versions\n" in out and "operators\n" not in out


def test_with_torch():
    from deepspeed.report.with_torch import with_torch
    found = {fact.name: fact for fact in with_torch()}
    assert found["deepspeed._C"].ok and "gloo" in found["torch.distributed"].value


# ---- single probes

def by_name(found):
    return {fact.name: fact for fact in found}


def test_files_that_work(tmp_path):
    found = by_name(files.files(str(tmp_path)))
    assert found["writable"].ok and list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist(tmp_path):
    fact = by_name(files.files(str(tmp_path / "none")))["writable"]
    assert fact.ok is False and "--folder" in fact.advice


def test_a_folder_that_cannot_be_written():
    fact = by_name(files.files("/proc"))["writable"]
    assert fact.ok is False and "--folder" in fact.advice


def test_a_file_system_in_memory():
    """tmpfs takes O_DIRECT since Linux 6.6, and copies into the page cache all the same."""
    found = by_name(files.files("/dev/shm"))
    assert found["O_DIRECT"].ok is None and "memory" in found["O_DIRECT"].value and found["file system"].value.startswith("tmpfs")


@pytest.mark.parametrize("architectures, capability, works", [
    ("80-real;90-real;90-virtual", "9.0", True), ("80-real;90-real;90-virtual", "10.0", True), ("80-real;90-real", "10.0", False),
    ("80-real", "8.6", True), ("86-real", "8.0", False), ("80-real;90-real;90-virtual", "7.5", False),
    ("75", "12.0", True), ("", "9.0", False),
])
def test_which_code_runs_where(architectures, capability, works):
    assert gpus.runs_on(architectures, capability) is works


_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorString(int code, const char** text) { *text = "no CUDA-capable device is detected"; return 0; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "NVIDIA Imaginary", size); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 80UL << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
"""


def driver(tmp_path, init):
    """A folder with a libcuda.so.1 that answers as told."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine to make a driver with")
    source = tmp_path / "cuda.c"
    source.write_text(textwrap.dedent(_DRIVER))
    subprocess.run([compiler, "-shared", "-fPIC", f"-DINIT={init}", "-o", tmp_path / "libcuda.so.1", source], check=True)
    return str(tmp_path)


def test_devices_of_a_driver(tmp_path):
    report = json.loads(ds_report("--json", LD_LIBRARY_PATH=driver(tmp_path, "0"), DS_ACCELERATOR=""))
    found = facts(report, "devices")
    assert found["GPU 1"]["value"] == "NVIDIA Imaginary, 80.0 GiB, compute capability 9.0"
    assert found["driver"]["value"].endswith("up to CUDA 13.1")
    from deepspeed._native import core
    adam = facts(report, "operators")["adam (cpu_adam, fused_adam)"]["value"]
    assert adam.startswith("CUDA kernel" if core().CUDA_VERSION else "none: there is a GPU")


@pytest.mark.parametrize("init, expected", [("100", "no CUDA-capable device is detected"), ("(*(volatile int*)0)", "SIGSEGV"),
                                            ("({ for (;;) __asm__(\"pause\"); 0; })", "no answer")])
def test_a_driver_that_fails_crashes_or_hangs(tmp_path, init, expected):
    code = "import deepspeed.report.command as c, sys; c._DRIVER_TIMEOUT_S = 1; sys.argv = ['ds_report', '--json']; c.cli_main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "LD_LIBRARY_PATH": driver(tmp_path, init), "DS_ACCELERATOR": ""})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert expected in json.dumps(report["devices"])
    assert report["versions"]["status"] == report["files"]["status"] == "ok"


def test_small_limits_are_a_no(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (65536, 65536))
    assert by_name(machine.memory())["pinned memory (ulimit -l)"].ok is False


def test_another_torch_than_built_against(monkeypatch):
    monkeypatch.setattr(software, "torch_facts", lambda: ("2.12.0", "", "/t/torch"))
    fact = by_name(software.build())["built against torch"]
    assert fact.ok is False and "pip install ." in fact.advice
