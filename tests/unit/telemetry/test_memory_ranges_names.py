# SPDX-License-Identifier: Apache-2.0
import types

import torch

from deepspeed.runtime.utils import call_to_str, empty_cache, get_ma_status, memory_status, see_memory_usage
from deepspeed.telemetry import ranges
from deepspeed.utils import debug, instrument_w_nvtx


def test_memory_is_printed_only_when_forced(capsys):
    see_memory_usage("before the model")
    assert capsys.readouterr().out == ""
    see_memory_usage("before the model", force=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "before the model" and lines[1].startswith("MA ") and lines[2].startswith("CPU Virtual Memory: used = ")


def test_memory_status(capsys):
    memory_status("here", reset_max=True)
    assert capsys.readouterr().out.startswith("MEMSTATS here device=")
    assert get_ma_status() >= 0
    empty_cache()


def test_call_to_str():
    assert call_to_str("f") == "f()" and call_to_str("Pass", 1, "a", b=[2]) == "Pass(1, 'a', b=[2])"


def test_ranges_close_after_an_error(monkeypatch):
    seen = []
    monkeypatch.setattr(ranges, "get_accelerator", lambda: types.SimpleNamespace(range_push=seen.append, range_pop=lambda: seen.append("pop")))

    @instrument_w_nvtx
    def fails(x):
        """Text."""
        raise ValueError(x)

    try:
        fails(1)
    except ValueError:
        pass
    assert seen[0].endswith("fails") and seen[1] == "pop" and fails.__doc__ == "Text."


def test_debug_names():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    assert debug.debug_param2name(model[0].weight) == "unknown"
    debug.debug_extract_module_and_param_names(model)
    assert debug.debug_module2name(model[0]) == "0" and debug.debug_module2name_class(model[0]) == "name=0 class=Linear"
    assert debug.debug_param2name_id_shape(model[0].weight) == "name=0.weight id=none shape=(3, 2)"
    debug.debug_clear_module_and_param_names(model)
    assert debug.debug_module2name(model[0]) == "unknown"
