# SPDX-License-Identifier: Apache-2.0
"""isinstance by the stages' names tells layouts apart, although all are one class."""
import types

import pytest

kinds = pytest.importorskip("deepspeed.zero.optimizer_kinds")
NAMES = ["DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer", "BF16_Optimizer", "FP16_Optimizer"]


def optimizer(partial_slices, sharded_api, on_bad):
    made = kinds.ShardedOptimizer.__new__(kinds.ShardedOptimizer)
    made.options = types.SimpleNamespace(partial_slices=partial_slices, on_bad=on_bad)
    made.managed = types.SimpleNamespace(sharded_api=sharded_api)
    return made


@pytest.mark.parametrize("layout,expected", [
    ((True, True, "skip"), "DeepSpeedZeroOptimizer_Stage3"), ((True, False, "scale"), "DeepSpeedZeroOptimizer"),
    ((False, False, "skip"), "BF16_Optimizer"), ((False, False, "scale"), "FP16_Optimizer"), ((False, False, "raise"), None),
])
def test_exactly_one_fits(layout, expected):
    made = optimizer(*layout)
    assert [name for name in NAMES if isinstance(made, getattr(kinds, name))] == ([expected] if expected else [])
    assert isinstance(made, kinds.ZeROOptimizer)


def test_other_things_do_not_fit_and_cannot_be_made():
    assert not isinstance(3, kinds.DeepSpeedZeroOptimizer) and issubclass(kinds.FP16_Optimizer, kinds.ZeROOptimizer)
    with pytest.raises(TypeError, match="deepspeed.initialize"):
        kinds.BF16_Optimizer([])


def test_import_paths():
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert [DeepSpeedZeroOptimizer_Stage3, DeepSpeedZeroOptimizer, BF16_Optimizer, FP16_Optimizer] == [getattr(kinds, n) for n in NAMES]
