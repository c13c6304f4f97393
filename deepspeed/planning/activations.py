# SPDX-License-Identifier: Apache-2.0
"""What a transformer keeps for backward: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022.

A layer keeps 34·s·b·h bytes in a two-byte type (s tokens, b sequences, h hidden size), the attention scores not counted: fused
attention does not keep them. With recomputation a layer keeps its input, 2·s·b·h, and one layer at a time is whole. The loss keeps
its logits, and their fp32 copy with its gradient: s·b·V·(e + 8) bytes for a type of e bytes.
"""


def activation_bytes(shape, seq_length, micro_batch, element_bytes, recompute):
    """Bytes of one micro-batch on one rank. ValueError when the model's layers and hidden size are not known."""
    if not shape.layers or not shape.hidden:
        raise ValueError("activations need the model's --layers and --hidden beside --seq_length; or give --activations SIZE")
    tokens = seq_length * micro_batch
    whole = 17 * element_bytes * tokens * shape.hidden
    kept = shape.layers * element_bytes * tokens * shape.hidden + whole if recompute else shape.layers * whole
    return kept + tokens * shape.vocabulary * (element_bytes + 8)
