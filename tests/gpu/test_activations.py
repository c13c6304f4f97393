# SPDX-License-Identifier: Apache-2.0
"""The fused activations on a GPU: what tests/unit/ops/test_activations.py asks of them on the CPU, and the same masks as there."""
import pytest
import torch

from deepspeed.ops import activations
from deepspeed.ops._library import ops
from tests.unit.ops import activation_checks as checks
from tests.unit.ops.activation_checks import ACTS, DTYPES, SHAPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype, act, shape, with_bias):
    checks.check_bias_act(GPU, dtype, act, shape, with_bias)
    checks.check_gated_halves(GPU, dtype, act, shape, with_bias)
    if not with_bias:
        checks.check_gated(GPU, dtype, act, shape)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_add(dtype, shape, p, with_bias):
    checks.check_dropout_add(GPU, dtype, shape, p, with_bias)


@pytest.mark.parametrize("shape", [(4099, 1024), (1000, 24), (3, 50001)])
def test_sums_over_many_rows(shape):
    """More rows than parts of a sum, and rows both narrower and wider than a block."""
    checks.check_bias_act(GPU, torch.float32, "silu", shape, True)
    checks.check_gated_halves(GPU, torch.bfloat16, "gelu", shape, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float_bias(dtype):
    checks.check_float_bias(GPU, dtype)


def test_layouts_and_empty():
    checks.check_layouts(GPU)
    checks.check_empty(GPU)


def test_masks():
    checks.check_mask(GPU)
    checks.check_generator(GPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_is_that_of_the_cpu(dtype):
    for shape in ((129, 96), (17, 33)):
        x = torch.randn(shape, dtype=dtype)
        state = torch.tensor([2**62 + 12345, 2**33 + 4])
        on_cpu = ops().dropout_add(x, x, None, 0.37, state)
        assert torch.equal(ops().dropout_add(x.cuda(), x.cuda(), None, 0.37, state.cuda()).cpu() == x, on_cpu == x)


def test_captured_graphs_draw_anew():
    x = torch.ones(4, 1000, device=GPU)
    zero = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        activations.dropout_add(x, zero, 0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = activations.dropout_add(x, zero, 0.5)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(y.clone())
    assert not torch.equal(*masks)


def test_operators_pass_opcheck():
    for op, arguments in checks.opcheck_arguments(GPU):
        torch.library.opcheck(op.default, arguments)


def test_same_bits_twice():
    x, bias = checks.inputs(0, GPU, torch.bfloat16, (3000, 520), (520,))
    grad = torch.ones_like(x)
    for a, b in zip(*(checks.results(activations.bias_gelu, [x, bias], grad) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_other_devices_are_refused_by_name():
    with pytest.raises(ValueError, match="bias lies on"):
        activations.bias_gelu(torch.ones(2, 4, device=GPU), torch.ones(4))
