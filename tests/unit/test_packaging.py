# SPDX-License-Identifier: Apache-2.0
"""What the build backend (setup.py) promises."""
import importlib.util
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def backend():
    spec = importlib.util.spec_from_file_location("deepspeed_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_one():
    from deepspeed import __version__, _native
    assert re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] == __version__
    assert _native.core().VERSION == __version__


def test_scripts_name_what_exists():
    text = (ROOT / "pyproject.toml").read_text()
    scripts = text.partition("[project.scripts]")[2].partition("\n[")[0]
    targets = re.findall(r'= "([\w.]+):(\w+)"', scripts)
    assert targets
    for module, function in targets:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), f"{module}:{function}"


def test_torch_is_found_where_this_python_has_it(backend):
    import torch
    found = backend._outer_torch()
    assert Path(found["dir"]).samefile(torch.__path__[0])
    assert found["version"] == torch.__version__ and found["cuda"] == torch.version.cuda


def test_no_torch_is_one_clear_message(backend, monkeypatch):
    monkeypatch.setenv("DS_TORCH_PYTHON", "/nonexistent/python")
    with pytest.raises(SystemExit, match=r"(?s)none was found by:\s+/nonexistent/python\s+Install torch>=2.11 there first"):
        backend._outer_torch()


def test_an_old_torch_is_refused(backend, monkeypatch):
    monkeypatch.setattr(backend, "_probe", lambda *_: {"dir": "/t/torch", "version": "2.10.3+cpu", "cuda": None})
    with pytest.raises(SystemExit, match=r"needs torch >= 2.11; /t/torch is torch 2.10.3"):
        backend._outer_torch()


@pytest.mark.parametrize("command, expected", [
    (["uv", "pip", "install", "--python", "envs/a", "."], "/cwd/envs/a/bin/python"),
    (["uv", "pip", "install", "-p", "/envs/a/bin/python", "."], "/envs/a/bin/python"),
    (["uv", "pip", "install", "--python=/envs/a", "."], "/envs/a/bin/python"),
    (["/envs/a/bin/python", "-m", "build"], "/envs/a/bin/python"),
    (["uv", "pip", "install", "."], "/active/bin/python"),
    (["uv", "pip", "install", "."], "/cwd/.venv/bin/python"),
    (["uv", "pip", "install", ".", "-p"], "/active/bin/python"),
])
def test_front_ends_say_where_they_install(backend, command, expected):
    assert expected in list(backend._told_interpreters(command, {"VIRTUAL_ENV": "/active"}, "/cwd"))


def test_the_source_distribution_can_be_built_from(backend, tmp_path):
    """Everything that compiling needs is inside, and nothing compiled."""
    code = f"import setup; print(setup.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)
    archive, = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = {str(path.relative_to(ROOT)) for top in ("csrc", "deepspeed", "tests/cpp")
               for path in (ROOT / top).rglob("*") if path.suffix in {".py", ".h", ".cpp", ".cc", ".cu", ".txt"}}
    assert tracked | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]
