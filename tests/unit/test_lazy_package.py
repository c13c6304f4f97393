# SPDX-License-Identifier: Apache-2.0
"""`import deepspeed` is cheap, silent and free of torch; names arrive on first access; what is not built says so."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepspeed

ROOT = Path(__file__).resolve().parents[2]


def run_python(code, **environ):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environ})


def test_import_is_silent_and_imports_no_torch():
    done = run_python("import deepspeed, sys; sys.exit('torch' in sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["logger", "log_dist", "comm", "utils", "runtime", "accelerator", "checkpointing",
                                  "__version__", "version", "__git_hash__", "add_config_arguments"])
def test_light_names_need_no_torch(name):
    done = run_python(f"import deepspeed, sys; deepspeed.{name}; sys.exit('torch' in sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_makes_no_cuda_context_and_no_process_group():
    done = run_python("import deepspeed, torch, sys; deepspeed.get_accelerator(); from deepspeed import comm;"
                      "sys.exit(torch.cuda.is_initialized() or comm.is_initialized())")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_adds_few_modules():
    """A stand-in for the time: what costs is loading modules."""
    done = run_python("import sys; before = set(sys.modules); import deepspeed; print(len(set(sys.modules) - before))")
    assert int(done.stdout) <= 10, done.stdout


def test_version():
    assert deepspeed.__version__ == deepspeed.version == "1.0.0"
    assert (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__) == (1, 0, 0)
    assert isinstance(deepspeed.__git_hash__, str) and isinstance(deepspeed.__git_branch__, str)


def test_attribute_that_never_existed():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        deepspeed.no_such_name
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        from deepspeed import no_such_name  # noqa: F401


@pytest.mark.parametrize("name", ["init_inference", "PipelineModule", "InferenceEngine", "moe", "pipe"])
def test_not_built_yet(name):
    assert not hasattr(deepspeed, name) and name not in dir(deepspeed)
    with pytest.raises(AttributeError, match=rf"deepspeed\.{name} is not built yet"):
        getattr(deepspeed, name)
    with pytest.raises(ImportError, match=rf"deepspeed\.{name} is not built yet"):
        exec(f"from deepspeed import {name}")


def test_not_built_module_below_another():
    with pytest.raises(ImportError, match=r"deepspeed\.pipe is not built yet"):
        import deepspeed.pipe.module  # noqa: F401
    with pytest.raises(ImportError, match=r"deepspeed\.runtime\.swap_tensor is not built yet"):
        import deepspeed.runtime.swap_tensor  # noqa: F401
    with pytest.raises(ImportError, match=r"deepspeed\.module_inject\.set_autotp_mode is not built yet"):
        from deepspeed.module_inject import set_autotp_mode  # noqa: F401


def test_alias_is_the_very_module():
    import deepspeed.comm.groups
    import deepspeed.utils.groups

    assert deepspeed.utils.groups is deepspeed.comm.groups
    assert sys.modules["deepspeed.utils.groups"] is sys.modules["deepspeed.comm.groups"]


def test_add_config_arguments():
    import argparse

    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert args.deepspeed is True and args.deepspeed_config == "ds.json"
    assert args.deepscale is False and args.deepscale_config is None
    assert parser.parse_args([]).deepspeed is False


def test_star_import_brings_no_submodules():
    scope = {}
    exec("from deepspeed.comm import *\nfrom deepspeed.utils.logging import *", scope)
    assert scope["all_reduce"] is deepspeed.comm.all_reduce and scope["logger"] is deepspeed.logger
    assert not {"torch", "utils", "config", "constants"} & set(scope)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package with a home module, and a facade that mirrors it beside a lazy name of another home."""
    package = tmp_path / "room_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "home.py").write_text("def helper(): return 'first'\ndef work(): return helper()\n")
    (package / "other.py").write_text("elsewhere = 5\n")
    (package / "facade.py").write_text(
        "from deepspeed._lazy import attach, mirror, names\n"
        "__getattr__, __dir__, __all__ = attach(__name__, {**names('room_for_tests.home', 'helper', 'work'),\n"
        "                                                  **names('room_for_tests.other', 'elsewhere')})\n"
        "mirror(__name__, 'room_for_tests.home')\n")
    (package / "inner").mkdir()
    (package / "inner" / "__init__.py").write_text(
        "from deepspeed._lazy import attach, names\n"
        "__getattr__, __dir__, __all__ = attach(__name__, names('room_for_tests.inner.both', 'both'))\n")
    (package / "inner" / "both.py").write_text("def both(x): return x + 1\nmore = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("room_for_tests")
    for name in [name for name in sys.modules if name.startswith("room_for_tests")]:
        del sys.modules[name]


def test_what_is_replaced_on_a_mirror_is_what_the_library_calls(room):
    from unittest import mock

    from room_for_tests import facade, home

    assert facade.work() == "first" and facade.elsewhere == 5 and facade.__name__ == "room_for_tests.facade"
    facade.helper = lambda: "second"
    assert home.work() == "second" and facade.helper is home.helper
    with mock.patch.object(facade, "helper", lambda: "third"):
        assert home.work() == "third"
    assert home.work() == "second"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        facade.nothing


def test_a_name_that_is_module_and_function(room):
    from room_for_tests.inner.both import both as by_module, more
    from room_for_tests.inner import both

    assert both is by_module and both(1) == 2 and more == 3
    import deepspeed.utils.tensor_fragment
    import deepspeed.utils.z3_leaf_module  # noqa: F401

    assert deepspeed.utils.z3_leaf_module(object()) is False and isinstance(deepspeed.utils.tensor_fragment, type)
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_modules

    assert set_z3_leaf_modules is deepspeed.utils.set_z3_leaf_modules
