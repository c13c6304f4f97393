# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding on a GPU: what tests/unit/ops/test_rope.py asks of it on the CPU."""
import pytest
import torch

from deepspeed.ops.rope import RotaryEmbedding, apply_rotary
from tests.unit.ops import rope_checks as checks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dim, rotary_dim", [(64, 64), (128, 128), (80, 32), (6, 2), (66, 66)])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_accuracy(dtype, layout, style, dim, rotary_dim, batched):
    checks.check_accuracy(GPU, dtype, layout, style, dim, rotary_dim, batched)


def test_forms_agree_and_empty():
    checks.check_forms_agree(GPU)
    checks.check_empty(GPU)


def test_operator_passes_opcheck():
    for op, arguments in checks.opcheck_arguments(GPU):
        torch.library.opcheck(op.default, arguments)


def test_positions_outside_the_tables_become_nan():
    q = torch.ones(1, 3, 2, 8, device=GPU)
    cos, sin = checks.tables([4], 8, GPU)
    out = apply_rotary(q, q, cos, sin, torch.tensor([0, 4, -1], device=GPU))[0]
    assert out[0, 0].isfinite().all() and out[0, 1:].isnan().all()


def test_module_takes_any_position_without_a_wait():
    module, far = RotaryEmbedding(16, max_positions=8, device=GPU), torch.tensor([[70, 3, 9], [0, 150, 7]], device=GPU)
    q = torch.randn(2, 3, 4, 16, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = module(q, None, far)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out, RotaryEmbedding(16, max_positions=200, device=GPU)(q, None, far)[0])
