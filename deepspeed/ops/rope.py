# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of queries and keys (Su et al., "RoFormer", 2021), fused."""
import torch

from deepspeed.ops._library import check_dense, ops

_LAYOUTS = {"bshd": False, "bhsd": True}
_STYLES = {"half": False, "interleaved": True}
_LARGEST_TABLE = 1 << 20  # positions beyond it (512 MiB of tables for heads of 128) get rows of their own: one stray number must not fill the memory


def _choice(table, value, name):
    if value not in table:
        raise ValueError(f"{name} must be one of {', '.join(table)}, not {value!r}")
    return table[value]


def apply_rotary(q, k, cos, sin, positions=None, *, layout="bshd", style="half", rotary_dim=None):
    """(q, k) with each pair of elements rotated by its token's angle; in float32, rounded once to the dtype of q.

    q, k: [batch, seq, heads, dim] (layout "bshd") or [batch, heads, seq, dim] ("bhsd"), float32, bfloat16 or float16, any strides; they may
    differ in the number of heads; either may be None and is None in the result then.
    cos, sin: of the angles, float32 or q's dtype: [seq, w] or [batch, seq, w], one row a token, or with `positions` (int64, [seq] or
    [batch, seq]) [rows, w], of which each token takes the row that its position says. w is rotary_dim / 2 or rotary_dim; the wide form is in the
    order of the elements (for "half" the narrow table twice side by side, for "interleaved" each column twice).
    style: "half" pairs element i with i + rotary_dim / 2 (Llama, NeoX), "interleaved" 2 i with 2 i + 1 (GPT-J).
    rotary_dim: how many elements of a head are rotated, None for all; the rest goes through.

    Differentiable in q and k; the tables are constants. ValueError names the argument that does not fit. On a GPU a position outside the table
    cannot raise and gives NaN."""
    heads_first = _choice(_LAYOUTS, layout, "layout")
    interleaved = _choice(_STYLES, style, "style")
    given = q if q is not None else k
    if given is None:
        raise ValueError("q and k are both None")
    if rotary_dim is not None and rotary_dim < 0:
        raise ValueError(f"rotary_dim must not be negative, got {rotary_dim}")
    no_heads = given.narrow(1 if heads_first else 2, 0, 0) if q is None or k is None else None
    q_out, k_out = ops().rope(given if q is not None else no_heads, k if k is not None else no_heads, cos, sin, positions,
                              -1 if rotary_dim is None else rotary_dim, interleaved, heads_first, False)
    return (None if q is None else q_out), (None if k is None else k_out)


class RotaryEmbedding(torch.nn.Module):
    """Makes and keeps the tables: angle of pair i at position t is scale * t * base ** (-2 i / rotary_dim).

    dim: elements of a head; max_positions: rows of the tables, which grow when a longer sequence or a larger position comes; rotary_dim:
    None for all of dim; scale: below 1 stretches positions linearly. The tables are float32 [max_positions, rotary_dim / 2] buffers, computed
    in float64, not saved with the model.

    The values of `positions` can be read only on the CPU. On a GPU that would wait for it, and torch.compile cannot: there the rows of the given
    positions are computed with each call (seq * rotary_dim / 2 cosines and sines in float64) instead of looked up, so that any position is right.
    Where all positions are known to lie in the tables, apply_rotary(q, k, module.cos, module.sin, positions) looks them up."""

    def __init__(self, dim, max_positions=2048, base=10000.0, rotary_dim=None, style="half", layout="bshd", scale=1.0, device=None):
        super().__init__()
        self.dim, self.base, self.scale = dim, base, scale
        self.rotary_dim = dim if rotary_dim is None else rotary_dim
        if not 0 <= self.rotary_dim <= dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and at most dim = {dim}, got {self.rotary_dim}")
        _choice(_STYLES, style, "style")
        _choice(_LAYOUTS, layout, "layout")
        self.style, self.layout = style, layout
        cos, sin = self._tables(max_positions, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _angles(self, positions):
        """float64 [..., rotary_dim / 2]; NaN for a position below 0."""
        pairs = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=positions.device)
        frequencies = self.scale * self.base ** (-pairs / max(1, self.rotary_dim))
        t = positions.unsqueeze(-1)
        return (t * frequencies).masked_fill(t < 0, torch.nan)

    @torch.inference_mode(False)  # tables that grew in evaluation serve training as well
    def _tables(self, rows, device):
        """On `device`, or on the default one; computed on the CPU whichever that is, unless there are no values at all."""
        device = torch.get_default_device() if device is None else torch.device(device)
        angles = self._angles(torch.arange(rows, device="meta" if device.type == "meta" else "cpu"))
        return angles.cos().float().to(device), angles.sin().float().to(device)

    def reset_parameters(self):
        """Computes the tables anew, where they are."""
        self.cos, self.sin = self._tables(self.cos.shape[0], self.cos.device)

    def _apply(self, function, recurse=True):
        """Tables stay float32 when the model is cast: bfloat16 cannot tell position 257 from 256. They get values when it leaves the meta device."""
        was_meta = self.cos.is_meta
        super()._apply(function, recurse)
        if self.cos.dtype != torch.float32 or (was_meta and not self.cos.is_meta):
            self.reset_parameters()
        return self

    def forward(self, q, k, positions=None):
        """(q, k) rotated; positions as in apply_rotary, by default 0, 1, .. seq - 1. One of q and k may be None."""
        given = k if q is None else q
        if given is None:
            raise ValueError("q and k are both None")
        check_dense(q=q, k=k, positions=positions)
        seq = given.shape[2 if self.layout == "bhsd" else 1]
        rows, cos, sin = seq, None, None
        if positions is not None:
            self._check_positions(positions, given, seq)
            rows = int(positions.max()) + 1 if _is_readable(positions) and positions.numel() else None
        if rows is not None and self._cover(rows):
            cos, sin = self.cos, self.sin
        else:
            angles = self._angles(torch.arange(seq, device=given.device) if positions is None else positions)
            cos, sin, positions = angles.cos().float(), angles.sin().float(), None
        return apply_rotary(q, k, cos, sin, positions, layout=self.layout, style=self.style, rotary_dim=self.rotary_dim)

    def _cover(self, rows):
        """Whether the tables have so many rows, now if need be."""
        have = self.cos.shape[0]
        if rows > have:
            if torch.compiler.is_compiling() or rows > _LARGEST_TABLE:
                return False
            self.cos, self.sin = self._tables(min(max(rows, 2 * have), max(rows, _LARGEST_TABLE)), self.cos.device)
        return True

    @staticmethod
    def _check_positions(positions, given, seq):
        if positions.device != given.device:
            raise ValueError(f"positions lies on {positions.device}, q on {given.device}")
        if positions.dtype != torch.int64:
            raise ValueError(f"positions must be int64, not {positions.dtype}")
        if tuple(positions.shape) not in ((seq,), (given.shape[0], seq), (1, seq)):
            raise ValueError(f"positions must have shape [{seq}] or [{given.shape[0]}, {seq}], not {list(positions.shape)}")

    def extra_repr(self):
        return f"dim={self.dim}, rotary_dim={self.rotary_dim}, base={self.base:g}, style={self.style!r}, layout={self.layout!r}"


def _is_readable(positions):
    """Whether their values can be had without a wait: plain memory of the CPU, and nobody traces."""
    return (positions.device.type == "cpu" and type(positions) is torch.Tensor and not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0 and not torch._C._functorch.is_functorch_wrapped_tensor(positions))
