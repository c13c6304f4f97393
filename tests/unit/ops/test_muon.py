# SPDX-License-Identifier: Apache-2.0
"""Muon against its formula in float64, and what its two halves and groups promise."""
import pytest
import torch

from deepspeed.ops.muon import (Muon, MuonWithAuxAdam, muon_update, zeropower_via_gram_newtonschulz, zeropower_via_newtonschulz5)


def newton_schulz_exact(g, steps=5):
    x = g.double()
    tall = x.size(0) > x.size(1)
    x = x.t() if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.t() if tall else x


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 5), (33, 31)])
@pytest.mark.parametrize("method", [zeropower_via_newtonschulz5, zeropower_via_gram_newtonschulz])
def test_orthogonalises(shape, method):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # Five iterations amplify a relative error by at most 3.4445 each (the slope at 0), from float32 roundings of sums of up to 40 terms.
    torch.testing.assert_close(method(g).double(), newton_schulz_exact(g), rtol=0, atol=40 * 3.4445**5 * torch.finfo(torch.float32).eps)
    values = torch.linalg.svdvals(newton_schulz_exact(g))
    assert values.max() < 1.3


@pytest.mark.parametrize("ns_method", ["standard", "gram"])
def test_100_steps_against_the_formula(ns_method):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 16, generator=generator)
    p, exact = torch.nn.Parameter(start.clone()), start.double()
    optimizer = Muon([p], lr=0.02, weight_decay=0.1, momentum=0.95, ns_method=ns_method)
    momentum = torch.zeros_like(exact)
    for step in range(100):
        g = torch.randn(24, 16, generator=generator)
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
        momentum = 0.95 * momentum + 0.05 * g.double()
        update = newton_schulz_exact(0.05 * g.double() + 0.95 * momentum) * (24 / 16)**0.5
        exact = exact * (1 - 0.02 * 0.1) - 0.02 * update
        # Each step adds at most lr times the error of one orthogonalisation; see above.
        bound = (step + 1) * 0.02 * 24 * 3.4445**5 * torch.finfo(torch.float32).eps + 1e-6
        torch.testing.assert_close(p.detach().double(), exact, rtol=0, atol=bound)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"].double(), momentum, rtol=1e-5, atol=1e-6)


def test_filters_count_as_rows():
    g = torch.randn(8, 3, 2, 2)
    update = muon_update(g, torch.zeros_like(g))
    assert update.shape == g.shape
    torch.testing.assert_close(update.flatten(1), muon_update(g.flatten(1), torch.zeros(8, 12)))


def test_halves():
    matrix, embedding, bias = (torch.nn.Parameter(torch.randn(s)) for s in ((8, 8), (8, 8), (8,)))
    embedding.use_muon = False
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (embedding, bias)]
    optimizer = MuonWithAuxAdam([matrix, embedding, bias], muon_lr=0.05, adam_lr=1e-3, weight_decay=0.1)
    assert [g["use_muon"] for g in optimizer.param_groups] == [True, False]
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 1e-3]
    adam = torch.optim.AdamW(twins, lr=1e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for _ in range(5):
        for p in (matrix, embedding, bias):
            p.grad = torch.randn(p.shape)
        for p, q in zip((embedding, bias), twins):
            q.grad = p.grad.clone()
        optimizer.step()
        adam.step()
    for p, q in zip((embedding, bias), twins):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    assert set(optimizer.state[matrix]) == {"momentum_buffer"}
    assert set(optimizer.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_groups_are_kept_and_their_values_win():
    p, q = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    groups = [{"params": [p], "use_muon": True, "lr": 0.5}, {"params": [q], "use_muon": False, "weight_decay": 0.3}]
    optimizer = MuonWithAuxAdam(groups, lr=0.1)
    assert optimizer.param_groups[0] is groups[0] and groups[0]["lr"] == 0.5 and groups[1]["lr"] == 0.1
    assert groups[1]["weight_decay"] == 0.3
    with pytest.raises(ValueError, match="learning rates differ"):
        MuonWithAuxAdam([{"params": [p, q]}])
    with pytest.raises(ValueError, match="ns_method"):
        Muon([p], ns_method="quintic")


def test_state_dict_round_trip():
    p, b = torch.nn.Parameter(torch.randn(4, 4).bfloat16()), torch.nn.Parameter(torch.randn(4).bfloat16())
    q, c = (torch.nn.Parameter(x.detach().clone()) for x in (p, b))
    first, second = MuonWithAuxAdam([p, b]), MuonWithAuxAdam([q, c])
    p.grad, b.grad = torch.randn(4, 4).bfloat16(), torch.randn(4).bfloat16()
    first.step()
    with torch.no_grad():
        q.copy_(p), c.copy_(b)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[q]["momentum_buffer"], first.state[p]["momentum_buffer"])  # float32, not rounded to the parameter's dtype
    q.grad, c.grad = p.grad.clone(), b.grad.clone()
    first.step(), second.step()
    assert torch.equal(p.detach(), q.detach()) and torch.equal(b.detach(), c.detach())


def test_set_optimizer_flags_marks_what_muon_takes():
    import deepspeed
    for kind, marked in (("Muon", True), ("AdamW", None)):
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 4), "linear": torch.nn.Linear(4, 4)})
        config = deepspeed.DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": kind, "params": {"lr": 0.1}}})
        deepspeed.set_optimizer_flags(config, model)
        flags = [getattr(p, "use_muon", None) for p in (model["linear"].weight, model["linear"].bias, model["embed"].weight)]
        assert flags == ([True, False, False] if marked else [None, None, None])
    assert (deepspeed.MUON_OPTIMIZER, deepspeed.ADAM_OPTIMIZER, deepspeed.LAMB_OPTIMIZER) == ("muon", "adam", "lamb")
    assert deepspeed.is_compile_supported()


@pytest.mark.parametrize("kind", [Muon, MuonWithAuxAdam])
def test_matrices_without_elements_stay(kind):
    for shape in ((3, 0), (0, 3)):
        p, q = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.eye(2))
        p.grad, q.grad = torch.ones(shape), torch.eye(2)
        kind([p, q]).step()
        assert p.shape == shape and not torch.equal(q.detach(), torch.eye(2))


def test_named_parameters_are_split_and_continued():
    module = torch.nn.Linear(4, 3)
    first, second = MuonWithAuxAdam(module.named_parameters()), MuonWithAuxAdam(module.named_parameters())
    assert [(g["use_muon"], g["param_names"]) for g in first.param_groups] == [(True, ["weight"]), (False, ["bias"])]
    module(torch.ones(2, 4)).sum().backward()
    first.step()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[module.weight]["momentum_buffer"], first.state[module.weight]["momentum_buffer"])
    saved = first.state_dict()
    saved["state"][0] = {"momentum_buffer": torch.ones(1)}
    with pytest.raises(ValueError, match=r"parameter 'weight': the saved momentum_buffer has shape \[1\], here it is \[3, 4\]"):
        second.load_state_dict(saved)
    assert second.state[module.weight]["momentum_buffer"].shape == (3, 4)


@pytest.mark.parametrize("kind", [Muon, MuonWithAuxAdam])
def test_what_muon_cannot_step_is_refused_by_name_before_anything_moves(kind):
    matrix, vector = torch.nn.Parameter(torch.eye(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = kind([("matrix", matrix)])
    with pytest.raises(ValueError, match=r"parameter 'vector' has shape \[4\]: Muon needs at least two dimensions"):
        optimizer.add_param_group({"params": [("vector", vector)], "use_muon": True})
    assert len(optimizer.param_groups) == 1
    table = torch.nn.Parameter(torch.eye(4))
    optimizer.add_param_group({"params": [("table", table)], "use_muon": True})
    matrix.grad, table.grad = torch.eye(4), torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 'table' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(matrix.detach(), torch.eye(4))
    with pytest.raises(ValueError, match="lr must not be negative or NaN"):
        optimizer.add_param_group({"params": [("other", torch.nn.Parameter(torch.eye(2)))], "lr": float("nan")})
    assert len(optimizer.param_groups) == 2
