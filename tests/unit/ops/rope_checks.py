# SPDX-License-Identifier: Apache-2.0
"""What rotary embedding is held to, on any device: tests/unit/ops runs it on the CPU, tests/gpu on a GPU."""
import torch

from deepspeed.ops._library import ops
from deepspeed.ops.rope import apply_rotary
from tests.unit.ops.activation_checks import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(rows, rotary_dim, device, dtype=torch.float32, wide=None, seed=0):
    """Cosines and sines of random angles, [rows, rotary_dim / 2], or widened for a style ("half" or "interleaved")."""
    angles = 6.3 * torch.rand(*rows, rotary_dim // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if wide == "half":
        angles = torch.cat([angles, angles], -1)
    elif wide == "interleaved":
        angles = angles.repeat_interleave(2, -1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def plain(x, cos, sin, style, layout):
    """By the books, with tables [.., seq, rotary_dim / 2]."""
    rotary = 2 * cos.shape[-1]
    if layout == "bshd":
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    elif cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., :rotary], x[..., rotary:]
    if style == "half":
        a, b = turned.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
    a, b = turned[..., ::2], turned[..., 1::2]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2), rest], -1)


def heads(seed, device, dtype, batch, seq, count, dim, layout):
    shape = (batch, count, seq, dim) if layout == "bhsd" else (batch, seq, count, dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def check_accuracy(device, dtype, layout, style, dim, rotary_dim, batched):
    q = heads(0, device, dtype, 2, 5, 6, dim, layout)
    k = heads(1, device, dtype, 2, 5, 2, dim, layout)
    cos, sin = tables([2, 5] if batched else [5], rotary_dim, device)
    grads = [heads(2, device, dtype, 2, 5, n, dim, layout).detach() for n in (6, 2)]
    outputs = apply_rotary(q, k, cos, sin, layout=layout, style=style, rotary_dim=rotary_dim)
    ours = [*outputs, *torch.autograd.grad(outputs, [q, k], grads)]

    def by_torch(q, k, grads):
        leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
        # Tables in x's dtype, as models hold them; in float64 the ones that we were given.
        c, s = cos.to(q.dtype), sin.to(q.dtype)
        out = [plain(leaf, c, s, style, layout) for leaf in leaves]
        return [*out, *torch.autograd.grad(out, leaves, grads)]

    assert_no_worse(ours, by_torch(q, k, grads), by_torch(q.double(), k.double(), [g.double() for g in grads]), f"{layout} {style} {dtype}")


def check_forms_agree(device):
    """Narrow and wide tables, rows and positions, [seq] and [batch, seq], strided and dense inputs: the same bits."""
    for style in ("half", "interleaved"):
        for layout in ("bshd", "bhsd"):
            q, k = (heads(n, device, torch.float32, 2, 5, n + 1, 24, layout).detach() for n in (3, 0))
            narrow, wide = tables([9], 16, device), tables([9], 16, device, wide=style)
            positions = torch.tensor([[4, 0, 8, 8, 1], [2, 3, 3, 7, 5]], device=device)
            keywords = {"layout": layout, "style": style, "rotary_dim": 16}
            want = apply_rotary(q, k, narrow[0][positions], narrow[1][positions], **keywords)
            others = [apply_rotary(q, k, *narrow, positions, **keywords), apply_rotary(q, k, *wide, positions, **keywords)]
            strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
            others.append(apply_rotary(*strided, *narrow, positions, **keywords))
            backwards = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k)]
            others.append(apply_rotary(*backwards, *narrow, positions, **keywords))
            padded = [torch.cat([x, x], -1)[..., :24] for x in (q, k)]
            others.append(apply_rotary(*padded, *narrow, positions, **keywords))
            others.append((apply_rotary(q, None, *narrow, positions, **keywords)[0], apply_rotary(None, k, *narrow, positions, **keywords)[1]))
            shared = apply_rotary(q[:1], k[:1], *narrow, positions[0], **keywords)
            for other in [*others, shared]:
                for a, b in zip(other, want, strict=True):
                    assert torch.equal(a, b[:a.shape[0]])


def check_empty(device):
    cos, sin = tables([4], 8, device)
    for shape in ((0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)):
        q = torch.empty(shape, device=device, requires_grad=True)
        out = apply_rotary(q, q, cos, sin)
        assert out[0].shape == shape
        out[0].sum().backward()
    zero = torch.randn(1, 4, 2, 8, device=device)
    assert torch.equal(apply_rotary(zero, zero, cos[:, :0], sin[:, :0], rotary_dim=0)[0], zero)


def opcheck_arguments(device):
    cos, sin = tables([7], 8, device)
    positions = torch.tensor([3, 0, 6], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for heads_first in (False, True):
            layout = "bhsd" if heads_first else "bshd"
            q, k = heads(0, device, dtype, 2, 3, 4, 10, layout), heads(1, device, dtype, 2, 3, 1, 10, layout)
            yield ops().rope, (q, k, cos, sin, positions, 8, heads_first, heads_first, False)
            yield ops().rope, (q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin, None, 8, False, heads_first, True)
