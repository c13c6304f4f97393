# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding on the CPU: accuracy beside plain torch, forms of tables and strides, tracing, threads, refusals."""
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from deepspeed.ops.rope import RotaryEmbedding, apply_rotary
from tests.unit.ops import rope_checks as checks

CPU = torch.device("cpu")


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dim, rotary_dim", [(64, 64), (128, 128), (80, 32), (6, 2), (66, 66)])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_accuracy(dtype, layout, style, dim, rotary_dim, batched):
    checks.check_accuracy(CPU, dtype, layout, style, dim, rotary_dim, batched)


def test_forms_agree():
    checks.check_forms_agree(CPU)


def test_empty():
    checks.check_empty(CPU)


def test_operator_passes_opcheck():
    for op, arguments in checks.opcheck_arguments(CPU):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_the_dtype_of_q(dtype):
    q = checks.heads(0, CPU, dtype, 2, 5, 3, 16, "bshd").detach()
    cos, sin = checks.tables([5], 16, CPU, dtype)
    narrow = apply_rotary(q, q, cos, sin)[0]
    assert torch.equal(narrow, apply_rotary(q, q, cos.float(), sin.float())[0])


def test_strides_are_kept():
    q = torch.randn(2, 5, 3, 16).transpose(1, 2)
    cos, sin = checks.tables([5], 16, CPU)
    assert apply_rotary(q, q, cos, sin, layout="bhsd")[0].stride() == q.stride()


def test_different_tables_for_the_halves_have_the_transposed_gradient():
    """Wide tables whose halves differ are not a rotation; the gradient is still that of the formula."""
    q = torch.randn(1, 3, 2, 8, dtype=torch.float32, requires_grad=True)
    cos, sin = torch.randn(3, 8), torch.randn(3, 8)
    grad = torch.randn(1, 3, 2, 8)
    (got,) = torch.autograd.grad(apply_rotary(q, None, cos, sin)[0], q, grad)
    turned = torch.cat([-q[..., 4:], q[..., :4]], -1)
    (want,) = torch.autograd.grad(q * cos[:, None] + turned * sin[:, None], q, grad)
    torch.testing.assert_close(got, want)


def test_module_is_the_formula():
    module = RotaryEmbedding(16, max_positions=4, base=500.0, rotary_dim=8, style="interleaved", layout="bhsd").to(torch.bfloat16)
    assert module.cos.dtype == torch.float32 and not module.state_dict()
    q = torch.randn(2, 3, 7, 16)  # longer than the tables
    angles = torch.outer(torch.arange(7.0, dtype=torch.float64), 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    want = checks.plain(q.double(), angles.cos(), angles.sin(), "interleaved", "bhsd")
    got = module(q, q)
    assert module.cos.shape[0] >= 7
    torch.testing.assert_close(got[0].double(), want, rtol=0, atol=8 * torch.finfo(torch.float32).eps * q.abs().max().item())
    positions = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    torch.testing.assert_close(module(q.flip(2), None, positions)[0], got[0].flip(2), rtol=0, atol=0)


def test_fullgraph_compile_with_changing_shapes():
    module = RotaryEmbedding(16, max_positions=64)

    def block(q, k):
        q, k = module(q, k)
        return (q.sum(2) * k.sum(2)).square()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (3, 11, 7):
        q, k = torch.randn(2, seq, 4, 16, requires_grad=True), torch.randn(2, seq, 2, 16, requires_grad=True)
        outcomes = [torch.autograd.grad(function(q, k).sum(), [q, k]) for function in (block, compiled)]
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)


FAR = torch.tensor([[70, 3, 9], [0, 150, 7]])


def rotated_far(q, positions=FAR):
    return RotaryEmbedding(16, max_positions=200)(q, None, positions)[0]


def test_tables_grow_to_the_largest_position():
    q = torch.randn(2, 3, 4, 16)
    module = RotaryEmbedding(16, max_positions=8)
    assert torch.equal(module(q, None, FAR[0])[0], rotated_far(q, FAR[0])) and module.cos.shape[0] == 71
    with torch.inference_mode():
        assert torch.equal(module(None, q, FAR)[1], rotated_far(q)) and module.cos.shape[0] == 151
    q.requires_grad_()
    module(q, q, FAR)[0].sum().backward()
    assert torch.equal(module(q, None, torch.tensor([1 << 40, 3, 9]))[0][:, 1:], rotated_far(q, FAR[0])[:, 1:]) and module.cos.shape[0] == 151


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_modules_take_any_position_and_length(backend):
    torch._dynamo.reset()
    module = RotaryEmbedding(16, max_positions=8)
    q, longer = torch.randn(2, 3, 4, 16, requires_grad=True), torch.randn(2, 40, 4, 16)
    compiled = torch.compile(lambda q, positions=None: module(q, None, positions)[0], fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(q, FAR), rotated_far(q))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, FAR).sum(), q), torch.autograd.grad(rotated_far(q).sum(), q))
    torch.testing.assert_close(compiled(longer), rotated_far(longer, None))
    assert compiled(q, torch.tensor([0, -1, 2])).isnan().any(-1).any(-1).tolist() == [[False, True, False]] * 2


def test_positions_that_cannot_be_read():
    """Of sizes alone, and while somebody traces: the graph holds for other positions, too."""
    q, module = torch.randn(2, 3, 4, 16), RotaryEmbedding(16, max_positions=8)
    traced = make_fx(lambda q, positions: module(q, None, positions)[0])(q, torch.zeros_like(FAR))
    assert torch.equal(traced(q, FAR), rotated_far(q))
    assert torch.equal(torch.export.export(module, (q, q, torch.zeros_like(FAR))).module()(q, q, FAR)[0], rotated_far(q))
    slices = torch.vmap(lambda q, positions: module(q[None], None, positions)[0][0])(q, FAR)
    assert torch.equal(slices, rotated_far(q))
    assert module(q.to("meta"), None, FAR.to("meta"))[0].shape == q.shape and module.cos.shape[0] == 8


def test_threads_change_no_bit():
    q, k = torch.randn(2, 300, 8, 64), torch.randn(2, 300, 2, 64)
    cos, sin = checks.tables([300], 64, CPU)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outcomes.append(apply_rotary(q, k, cos, sin))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


Q = torch.zeros(2, 3, 4, 8)
COS, SIN = checks.tables([3], 8, CPU)
REFUSED = {
    "q must be": lambda: apply_rotary(Q[0], Q, COS, SIN),
    "k must be": lambda: apply_rotary(Q, Q[0], COS, SIN),
    "k has shape": lambda: apply_rotary(Q, Q[:1], COS, SIN),
    "k is": lambda: apply_rotary(Q, Q.half(), COS, SIN),
    "q: dtype": lambda: apply_rotary(Q.double(), Q, COS, SIN),
    "cos: dtype": lambda: apply_rotary(Q, Q, COS.double(), SIN),
    "cos is": lambda: apply_rotary(Q, Q, COS.half(), SIN.half()),
    "sin has shape": lambda: apply_rotary(Q, Q, COS, SIN[:2]),
    "cos has 2 rows": lambda: apply_rotary(Q, Q, COS[:2], SIN[:2]),
    "cos has batch": lambda: apply_rotary(Q, Q, COS.expand(3, 3, 4), SIN.expand(3, 3, 4)),
    "cos must be": lambda: apply_rotary(Q, Q, COS[0], SIN[0]),
    "columns": lambda: apply_rotary(Q, Q, COS, SIN, rotary_dim=6),
    "rotary_dim must be even": lambda: apply_rotary(Q, Q, COS, SIN, rotary_dim=10),
    "rotary_dim must not": lambda: apply_rotary(Q, Q, COS, SIN, rotary_dim=-2),
    "positions must be int64": lambda: apply_rotary(Q, Q, COS, SIN, torch.zeros(3)),
    "positions must have": lambda: apply_rotary(Q, Q, COS, SIN, torch.zeros(4, dtype=torch.int64)),
    "positions: 3": lambda: apply_rotary(Q, Q, COS, SIN, torch.tensor([0, 3, 1])),
    "positions: -1": lambda: apply_rotary(Q, Q, COS, SIN, torch.tensor([0, -1, 1])),
    "positions must be int64, not torch.int32": lambda: RotaryEmbedding(8)(Q, Q, torch.zeros(3, dtype=torch.int32)),
    r"positions must have shape \[3\] or \[2, 3\]": lambda: RotaryEmbedding(8)(Q, Q, torch.zeros(1, 4, dtype=torch.int64)),
    "positions lies on meta": lambda: RotaryEmbedding(8)(Q, Q, torch.zeros(3, dtype=torch.int64, device="meta")),
    "positions: -2": lambda: RotaryEmbedding(8)(Q, Q, torch.tensor([0, -2, 1])),
    "layout must": lambda: apply_rotary(Q, Q, COS, SIN, layout="sbhd"),
    "style must": lambda: apply_rotary(Q, Q, COS, SIN, style="neox"),
    "both None": lambda: apply_rotary(None, None, COS, SIN),
    "constants": lambda: apply_rotary(Q, Q, COS.clone().requires_grad_(), SIN),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refuses_by_name(said):
    with pytest.raises(ValueError, match=said):
        REFUSED[said]()


@pytest.mark.parametrize("context", ["meta", "cpu"])
@pytest.mark.parametrize("home", ["meta", "cpu"])
def test_tables_grow_where_they_lie(home, context):
    with torch.device(home):
        module = RotaryEmbedding(8, max_positions=4)
    q = torch.randn(1, 9, 2, 8, device=home)
    with torch.device(context):
        rotated = module(q, q)[0]
        assert module.cos.shape == (9, 4) and module.cos.device.type == module.sin.device.type == rotated.device.type == home
        module.reset_parameters()
        assert module.cos.device.type == home
    if home == "cpu":
        assert torch.equal(module.cos, RotaryEmbedding(8, max_positions=9).cos)
