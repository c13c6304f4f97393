# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepspeed.checkpointing import checkpoint as own_checkpoint
from deepspeed.data import RandomLayerTokenDrop, RandomLTDScheduler, convert_to_random_ltd, save_without_random_ltd
from deepspeed.data.token_drop import (configure_token_drop, draw_tokens, gather_tokens, mask_of_tokens, remove_random_ltd_state_dict,
                                       scatter_tokens)

CONFIG = {
    "total_layer_num": 3, "random_ltd_layer_num": 1, "random_ltd_layer_id": [1], "model_mask_name": "attention_mask", "model_type":
    "decoder", "hidden_state_order": "batch_seq_dim", "global_batch_size": 8, "random_ltd_schedule":
    {"min_value": 16, "max_value": 64, "schedule_type": "fixed_linear", "schedule_config": {"require_steps": 10, "seq_per_step": 16}}
}


# ---- schedule


def test_schedule():
    scheduler = RandomLTDScheduler(CONFIG)
    kept = []
    for step in range(13):
        for _ in range(2):  # micro-batches of one step count once
            scheduler.update_seq(step)
        kept.append(scheduler.get_current_seq())
    assert kept == [16, 16, 16, 16, 32, 32, 32, 48, 48, 48, 64, 64, 64]
    # 8 sequences a step: one layer with the tokens it keeps, two with 64
    assert scheduler.state_dict() == {
        "consumed_layer_tokens": 8 * (sum(kept) + 13 * 128), "current_steps": 12, "current_value": 64, "min_value": 16, "max_value": 64
    }
    assert scheduler.get_total_layer_tokens(13) == scheduler.consumed_layer_tokens
    again = RandomLTDScheduler(CONFIG)
    again.load_state_dict(scheduler.state_dict())
    assert again.state_dict() == scheduler.state_dict()
    scheduler.reset_to_init()
    assert scheduler.state_dict() == RandomLTDScheduler(CONFIG).state_dict()


@pytest.mark.parametrize("change,message", [({"min_value": 65}, "min_value: found 65"), ({"schedule_type": "x"}, "found 'x'")])
def test_bad_schedules(change, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        RandomLTDScheduler({**CONFIG, "random_ltd_schedule": {**CONFIG["random_ltd_schedule"], **change}})


# ---- gather and scatter


def test_drawn_tokens():
    torch.manual_seed(0)
    drawn = [draw_tokens(4, 6, 3, torch.device("cpu")) for _ in range(500)]
    every = torch.cat(drawn)
    assert (every.diff() > 0).all() and every.min() == 0 and every.max() == 5
    # each token stays with chance 1/2; 2000 draws: standard deviation 22
    assert (every.flatten().bincount() - 1000).abs().max() < 100
    assert len({tuple(row) for row in every.tolist()}) == 20 and not (drawn[0] == drawn[0][:1]).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_gather_and_scatter(batch_first):
    hidden = torch.randn(2, 5, 3)
    tokens = torch.tensor([[0, 2, 3], [1, 3, 4]])
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    part = turn(gather_tokens(turn(hidden), tokens, batch_first))
    assert torch.equal(part, torch.stack([hidden[b, tokens[b]] for b in range(2)]))
    result = turn(scatter_tokens(turn(hidden), turn(part * 2), tokens, batch_first))
    expected = hidden.clone()
    for b in range(2):
        expected[b, tokens[b]] *= 2
    assert torch.equal(result, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_are_exact(batch_first):
    shape = (2, 5, 3) if batch_first else (5, 2, 3)
    tokens = torch.tensor([[0, 2, 3], [1, 3, 4]])
    hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def through(x):
        return scatter_tokens(x, gather_tokens(x, tokens, batch_first).square(), tokens, batch_first)

    assert torch.autograd.gradcheck(through, hidden)
    part = torch.zeros_like(gather_tokens(hidden, tokens, batch_first), requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    (scatter_tokens(hidden, part, tokens, batch_first) * weight).sum().backward()
    assert torch.equal(part.grad, gather_tokens(weight, tokens, batch_first))
    assert torch.equal(hidden.grad, scatter_tokens(weight, torch.zeros_like(part), tokens, batch_first))


# ---- masks


def test_masks():
    tokens = torch.tensor([[0, 2], [1, 4]])
    keys = torch.arange(10).reshape(2, 5)
    assert mask_of_tokens(keys, tokens, 5, False, "m").tolist() == [[0, 2], [6, 9]]
    assert mask_of_tokens(keys[:, None, None], tokens, 5, False, "m").tolist() == [[[[0, 2]]], [[[6, 9]]]]
    causal = torch.ones(5, 5).tril()
    assert torch.equal(mask_of_tokens(causal, tokens, 5, True, "m"), torch.ones(2, 2).tril())
    every = mask_of_tokens(torch.arange(25).reshape(1, 1, 5, 5), tokens, 5, True, "m")
    assert every.tolist() == [[[[0, 2], [10, 12]]], [[[6, 9], [21, 24]]]]
    heads = mask_of_tokens(torch.arange(150).reshape(2, 3, 5, 5), tokens, 5, True, "m")
    assert heads.shape == (2, 3, 2, 2) and heads[1, 2].tolist() == [[131, 134], [146, 149]]
    for shape in ((5, 5), (3, 5), (4, 5, 5), (2, 3, 5)):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            mask_of_tokens(torch.zeros(shape), tokens, 5, False, "attention_mask")


# ---- layers


class Layer(nn.Module):
    """Notes what it sees."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen = []

    def forward(self, x, attention_mask=None, scale=1.0, position_ids=None):
        self.seen.append((x, attention_mask, position_ids))
        return torch.tanh(self.linear(x)) * scale


class Model(nn.Module):
    def __init__(self, way="plain"):
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            if self.way == "plain":
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.way == "reentrant") if self.way != "own" else own_checkpoint(layer, x)
        return x


def dropping(model, kept):
    scheduler = RandomLTDScheduler(CONFIG)
    scheduler.set_current_seq(kept)
    model = convert_to_random_ltd(model, Layer)
    assert configure_token_drop(model, CONFIG, scheduler) == 1
    return model


def test_only_the_named_layer_drops():
    model = dropping(Model(), 16)
    x = torch.randn(2, 20, 4)
    y = model(x)
    seen = [model.layers[i].random_ltd_layer.seen[0][0] for i in range(3)]
    assert [tuple(one.shape) for one in seen] == [(2, 20, 4), (2, 16, 4), (2, 20, 4)] and y.shape == x.shape
    # the third layer sees the second's output at the tokens that stayed, the first's at the others
    dense = torch.tanh(model.layers[1].random_ltd_layer.linear(torch.tanh(model.layers[0].random_ltd_layer.linear(x))))
    changed = (seen[2] == dense).all(-1)
    assert changed.sum(1).tolist() == [16, 16] and not torch.equal(changed[0], changed[1])
    assert torch.equal(seen[2][~changed], torch.tanh(model.layers[0].random_ltd_layer.linear(x))[~changed])


@pytest.mark.parametrize("kept,train", [(20, True), (64, True), (16, False)])
def test_the_plain_layer(kept, train):
    torch.manual_seed(0)
    plain = Model()
    x = torch.randn(2, 20, 4)
    expected = plain(x)
    random_state = torch.get_rng_state()
    model = dropping(plain, kept).train(train)
    assert torch.equal(model(x), expected) and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("way", ["reentrant", "non_reentrant", "own"])
def test_recomputation_draws_the_same_tokens(way):
    gradients = []
    for one in ("plain", way):
        torch.manual_seed(0)
        model = dropping(Model(one), 16)
        x = torch.randn(2, 20, 4, requires_grad=True)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()] + [x.grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_arguments_are_cut_with_the_tokens():
    layer = RandomLayerTokenDrop(Layer())
    layer.init_config({**CONFIG, "hidden_state_order": "seq_batch_dim"}, dropping(Model(), 16).layers[1].random_ltd_scheduler, 0)
    x, ids = torch.randn(20, 2, 4), torch.arange(20)[None]
    causal = torch.ones(1, 1, 20, 20).tril()
    layer(x, causal, 2.0, position_ids=ids)
    part, mask, positions = layer.random_ltd_layer.seen[0]
    assert part.shape == (16, 2, 4) and positions.shape == (2, 16)
    for b in range(2):
        assert torch.equal(part[:, b], x[positions[b], b]) and torch.equal(mask[b, 0], torch.ones(16, 16).tril())
    layer(hidden_states=x)


def test_tuples_and_dtypes():
    class Pair(nn.Module):
        def forward(self, x):
            return x.bfloat16() * 2, "rest"

    layer = RandomLayerTokenDrop(Pair())
    layer.init_config(CONFIG, dropping(Model(), 16).layers[1].random_ltd_scheduler, 0)
    hidden, rest = layer(torch.ones(2, 20, 4))
    assert rest == "rest" and hidden.dtype == torch.bfloat16 and sorted(hidden[0, :, 0].tolist()) == [1.0] * 4 + [2.0] * 16


def test_names_without_the_wrapper():
    model = Model()
    names = list(model.state_dict())
    convert_to_random_ltd(model, Layer)
    assert list(model.state_dict()) == [name.replace("linear", "random_ltd_layer.linear") for name in names]
    assert list(save_without_random_ltd(model)) == names
    alone = convert_to_random_ltd(Layer(), Layer)
    assert isinstance(alone, RandomLayerTokenDrop) and list(remove_random_ltd_state_dict(
        alone.state_dict())) == ["linear.weight", "linear.bias"]


def test_errors():
    with pytest.raises(ValueError, match="no layer of class Conv1d"):
        convert_to_random_ltd(Model(), nn.Conv1d)
    model = convert_to_random_ltd(Model(), Layer)
    with pytest.raises(ValueError, match=r"random_ltd_layer_id: found \[3\], but the model has 3 wrapped layers"):
        configure_token_drop(model, {**CONFIG, "random_ltd_layer_id": [3]}, None)
