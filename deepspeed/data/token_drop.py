# SPDX-License-Identifier: Apache-2.0
"""Random layer-token dropping: middle layers process a random part of the tokens, the others go round them unchanged
(Yao et al. 2022, "Random-LTD", arXiv 2211.11586).

Each wrapped layer draws anew at every forward and for every sequence, from torch's generator of the device: recomputation under
activation checkpointing, which restores that generator, draws the same tokens. Tokens keep their order, so causal masks stay causal.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

_WRAPPED = "random_ltd_layer"
# Keywords of transformer layers that hold something for each token, and the dimension of the tokens.
_PER_TOKEN = {"position_ids": 1, "position_embeddings": 1}


def draw_tokens(batch: int, seq: int, kept: int, device: torch.device) -> torch.Tensor:
    """Which tokens stay: (batch, kept) positions, int64, ascending, every subset equally likely."""
    return torch.rand(batch, seq, device=device).argsort(1)[:, :kept].sort(1).values


def _along(tokens: torch.Tensor, like: torch.Tensor, batch_dim: int, token_dim: int) -> torch.Tensor:
    """`tokens` as an index of gather/scatter on `like`; a view."""
    shape = [1] * like.dim()
    shape[batch_dim], shape[token_dim] = tokens.shape
    index = tokens if batch_dim < token_dim else tokens.t()
    size = list(like.shape)
    size[token_dim] = tokens.shape[1]
    return index.reshape(shape).expand(size)


def gather_tokens(hidden: torch.Tensor, tokens: torch.Tensor, batch_first: bool = True) -> torch.Tensor:
    """The tokens that stay, out of (batch, seq, ...) or, not batch_first, (seq, batch, ...). Differentiable."""
    batch_dim, token_dim = (0, 1) if batch_first else (1, 0)
    return hidden.gather(token_dim, _along(tokens, hidden, batch_dim, token_dim))


def scatter_tokens(hidden: torch.Tensor, part: torch.Tensor, tokens: torch.Tensor, batch_first: bool = True) -> torch.Tensor:
    """`hidden` with its `tokens` replaced by `part`; a new tensor of part's dtype. The gradient of a replaced token is exactly 0,
    that of `part` exactly the gradient at its tokens."""
    batch_dim, token_dim = (0, 1) if batch_first else (1, 0)
    return hidden.to(part.dtype).scatter(token_dim, _along(tokens, part, batch_dim, token_dim), part)


def _select(value: torch.Tensor, tokens: torch.Tensor, dim: int) -> torch.Tensor:
    """Tokens of a tensor whose first dimension is the batch, or 1."""
    if value.shape[0] == 1 and len(tokens) > 1:
        value = value.expand(len(tokens), *value.shape[1:])
    return value.gather(dim, _along(tokens, value, 0, dim))


def mask_of_tokens(mask: torch.Tensor, tokens: torch.Tensor, seq: int, decoder: bool, name: str) -> torch.Tensor:
    """The attention mask between the tokens that stay.

    mask: (batch, seq) of keys; (seq, seq) of a decoder, which must be causal, for then its corner is the mask of any tokens in order;
    or (batch or 1, ..., seq or 1, seq), of which rows and columns are taken.
    """
    batch, kept = tokens.shape
    if mask.dim() == 2 and mask.shape == (seq, seq) and (decoder or batch != seq):
        if decoder:
            return mask[:kept, :kept]
    elif mask.dim() == 2 and mask.shape == (batch, seq):
        return _select(mask, tokens, 1)
    elif mask.dim() > 2 and mask.shape[0] in (1, batch) and mask.shape[-1] == seq and mask.shape[-2] in (1, seq):
        if mask.shape[-2] == seq:
            mask = _select(mask, tokens, mask.dim() - 2)
        return _select(mask, tokens, mask.dim() - 1)
    raise ValueError(
        f"random_ltd: {name} has shape {tuple(mask.shape)}; for {batch} sequences of {seq} tokens it may be ({batch}, {seq}), or have 3 "
        f"or 4 dimensions that begin with {batch} or 1 and end with ({seq} or 1, {seq}); of a decoder also ({seq}, {seq})")


class RandomLayerTokenDrop(torch.nn.Module):
    """A layer that in training sees only the tokens the schedule lets it keep. Its parameters stay its own: as a child it is called
    `random_ltd_layer`.

    The layer's forward takes hidden states first, (batch, seq, width) or (seq, batch, width), and gives them back in the same shape, or
    a tuple that begins with them (the rest is handed on as it is). The mask (`model_mask_name`), position_ids and position_embeddings
    are cut to the same tokens. In eval mode, and once the schedule keeps whole sequences, it is the layer itself.
    """

    def __init__(self, layer: torch.nn.Module, layer_id: int | None = None) -> None:
        super().__init__()
        self.random_ltd_layer = layer
        self.random_ltd_layer_id = layer_id
        self.random_ltd_scheduler = None
        parameters = list(inspect.signature(layer.forward).parameters.values())[1:]
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def init_config(self, config: Any, scheduler: Any, random_ltd_layer_id: int) -> None:
        """config: `data_efficiency.data_routing.random_ltd`. scheduler: says how many tokens stay. From now on tokens are dropped."""
        self.random_ltd_scheduler, self.random_ltd_layer_id = scheduler, random_ltd_layer_id
        self.batch_first = (config.get("hidden_state_order") or "batch_seq_dim") == "batch_seq_dim"
        self.model_type, self.mask_name = config["model_type"], config.get("model_mask_name")

    @property
    def reserved_length(self) -> int | None:
        """Tokens that stay now; None: all."""
        return self.random_ltd_scheduler.get_current_seq() if self.random_ltd_scheduler is not None else None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kept = self.reserved_length
        if not self.training or kept is None:
            return self.random_ltd_layer(hidden_states, *args, **kwargs)
        batch, seq = hidden_states.shape[:2] if self.batch_first else hidden_states.shape[1::-1]
        if kept >= seq:
            return self.random_ltd_layer(hidden_states, *args, **kwargs)
        tokens = draw_tokens(batch, seq, kept, hidden_states.device)
        known = dict(zip(self._names, args))
        known.update(kwargs)
        output = self.random_ltd_layer(gather_tokens(hidden_states, tokens, self.batch_first), *args[len(self._names):],
                                       **{name: self._cut(name, value, tokens, seq) for name, value in known.items()})
        if isinstance(output, tuple):
            return (scatter_tokens(hidden_states, output[0], tokens, self.batch_first), *output[1:])
        return scatter_tokens(hidden_states, output, tokens, self.batch_first)

    def _cut(self, name: str, value: Any, tokens: torch.Tensor, seq: int) -> Any:
        """An argument of the layer, for the tokens that stay."""
        if isinstance(value, (tuple, list)) and name in _PER_TOKEN:
            return type(value)(self._cut(name, one, tokens, seq) for one in value)
        if not isinstance(value, torch.Tensor):
            return value
        if name == self.mask_name:
            return mask_of_tokens(value, tokens, seq, self.model_type == "decoder", name)
        per_token = name in _PER_TOKEN and value.dim() > _PER_TOKEN[name] and value.shape[_PER_TOKEN[name]] == seq
        return _select(value, tokens, _PER_TOKEN[name]) if per_token else value


def convert_to_random_ltd(model: torch.nn.Module, convert_type: type) -> torch.nn.Module:
    """Wraps the layers of class `convert_type`; returns the model.

    model: an engine whose configuration has random_ltd (the layers in random_ltd_layer_id are wrapped, counted in the order of
    ``named_modules()``), or a plain model (all of them are, and do nothing until an engine is made from it).
    """
    root = getattr(model, "module", model) if hasattr(model, "random_ltd_initialize") else model
    layers = [layer for layer in root.modules() if isinstance(layer, convert_type)]
    if not layers:
        raise ValueError(f"convert_to_random_ltd: the model has no layer of class {convert_type.__name__}")
    wanted = range(len(layers)) if root is model else model.random_ltd_layer_ids(len(layers))
    wrapped = {id(layers[number]): RandomLayerTokenDrop(layers[number], number) for number in wanted}
    for parent in list(root.modules()):
        if not isinstance(parent, RandomLayerTokenDrop):
            for name, child in parent._modules.items():
                parent._modules[name] = wrapped.get(id(child), child)
    if root is not model:
        model.random_ltd_initialize()
    return wrapped.get(id(model), model)


def configure_token_drop(model: torch.nn.Module, config: Any, scheduler: Any) -> int:
    """Starts the wrapped layers of a model that the configuration names; returns how many there are."""
    wrapped = [module for module in model.modules() if isinstance(module, RandomLayerTokenDrop)]
    chosen = [module for module in wrapped if module.random_ltd_layer_id in config["random_ltd_layer_id"]]
    if wrapped and len({module.random_ltd_layer_id for module in chosen}) < len(set(config["random_ltd_layer_id"])):
        raise ValueError(
            f"data_efficiency.data_routing.random_ltd.random_ltd_layer_id: found {list(config['random_ltd_layer_id'])}, but the model "
            f"has {len(wrapped)} wrapped layers")
    for module in chosen:
        module.init_config(config, scheduler, module.random_ltd_layer_id)
    return len(chosen)


def without_wrappers(name: str) -> str:
    """The name that a parameter, buffer or module has without the wrappers."""
    return f".{name}.".replace(f".{_WRAPPED}.", ".")[1:-1]


def remove_random_ltd_state_dict(state_dict: dict) -> dict:
    """The same weights under the names they have without the wrappers."""
    return type(state_dict)((without_wrappers(key), value) for key, value in state_dict.items())


def save_without_random_ltd(model: torch.nn.Module) -> dict | None:
    """The model's state dict without the wrappers' part of the names. Of an engine with sharded parameters: collective, whole tensors
    on rank 0, None elsewhere."""
    if hasattr(model, "random_ltd_initialize"):
        sharded = model.zero_optimization_partition_weights()
        state = model._zero3_consolidated_16bit_state_dict() if sharded else model.module.state_dict()
    else:
        state = model.state_dict()
    return remove_random_ltd_state_dict(state) if state is not None else None
