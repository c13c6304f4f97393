# SPDX-License-Identifier: Apache-2.0
import copy
import io

import pytest
import torch

import deepspeed
from deepspeed.ops import replace_modules, restore_modules
from tests.parity.launch import on_ranks

D = 48


class LlamaLikeRMSNorm(torch.nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class GemmaLikeRMSNorm(torch.nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class MisleadingRMSNorm(LlamaLikeRMSNorm):
    """Has the name and the attributes of a norm, and computes something else."""

    def forward(self, x):
        return super().forward(x) * 1.001


class GatedMLP(torch.nn.Module):
    def __init__(self, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(D, 2 * D, bias=False), torch.nn.Linear(D, 2 * D, bias=False)
        self.down_proj = torch.nn.Linear(2 * D, D, bias=False)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class T5LikeLayerNorm(LlamaLikeRMSNorm):
    """An RMS norm by another name."""


class JoinedMLP(torch.nn.Module):
    """Gate and up in one linear layer, in Phi-3's order or, `up_first`, in another."""

    def __init__(self, activation_fn, up_first=False):
        super().__init__()
        self.gate_up_proj, self.down_proj = torch.nn.Linear(D, 4 * D, bias=False), torch.nn.Linear(2 * D, D, bias=False)
        self.activation_fn, self.up_first = activation_fn, up_first

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if self.up_first:
            gate, up = up, gate
        return self.down_proj(up * self.activation_fn(gate))


class OddMLP(GatedMLP):
    """Does more than its kin: scales, drops out, clamps, as its attributes say."""

    def __init__(self, scale=1.0, dropout=0.0, clamp=None):
        super().__init__(torch.nn.SiLU())
        self.scale, self.dropout, self.clamp = scale, dropout, clamp

    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.clamp is not None:
            hidden = hidden.clamp(-self.clamp, self.clamp)
        hidden = torch.nn.functional.dropout(hidden, self.dropout, self.training)
        scale = self.scale[0] if isinstance(self.scale, list) else self.scale
        return scale * self.down_proj(hidden)


class ScaledRMSNorm(LlamaLikeRMSNorm):
    def __init__(self, scale):
        super().__init__(D)
        self.scale = scale

    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states) * (self.scale if gate is None else gate)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(D, D), torch.nn.LayerNorm(D), torch.nn.GELU(), GatedMLP(torch.nn.SiLU()), LlamaLikeRMSNorm(D),
            GatedMLP(torch.nn.functional.gelu), torch.nn.RMSNorm(D, eps=1e-6), GemmaLikeRMSNorm(D), torch.nn.Linear(D, 10))
        self.loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, labels):
        return self.loss(self.body(x), labels)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def batch():
    torch.manual_seed(1)
    return torch.randn(12, D), torch.randint(10, (12,))


def loss_and_grads(model):
    model.zero_grad()
    loss = model(*batch())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_everything_known_is_replaced_and_computes_the_same(model):
    loss, grads = loss_and_grads(model)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    done = replace_modules(model)
    assert done.refused == {}
    assert done.replaced == {"body.1": "layer_norm", "body.2": "activation", "body.3": "gated_mlp", "body.3.act_fn": "activation", "body.4": "rms_norm",
                             "body.5": "gated_mlp", "body.6": "rms_norm", "body.7": "rms_norm", "loss": "cross_entropy"}
    assert list(model.state_dict()) == keys and all(p is parameters[name] for name, p in model.named_parameters())
    assert isinstance(model.body[1], torch.nn.LayerNorm) and isinstance(model.body[4], LlamaLikeRMSNorm)
    fused_loss, fused_grads = loss_and_grads(model)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=0, atol=1e-5 * grad.abs().max().item())


def test_restore_gives_back_the_very_same_bits(model):
    before, grads = loss_and_grads(model)
    classes = [type(m) for m in model.modules()]
    done = replace_modules(model)
    assert [type(m) for m in model.modules()] != classes
    done.restore()
    assert [type(m) for m in model.modules()] == classes and done.replaced == {}
    after, again = loss_and_grads(model)
    assert torch.equal(before, after) and all(torch.equal(grads[n], again[n]) for n in grads)
    assert restore_modules(model) == 0


def test_twice_is_once(model):
    first = replace_modules(model)
    assert replace_modules(model).replaced == {} and len(first.replaced) == 9


def test_losses_of_other_shapes_are_torch_s():
    own, fused = torch.nn.CrossEntropyLoss(), torch.nn.Sequential(torch.nn.CrossEntropyLoss())
    replace_modules(fused)
    for logits, target in ((torch.randn(4, 5, 5), torch.randint(5, (4, 5))), (torch.randn(4, 5), torch.softmax(torch.randn(4, 5), -1)),
                           (torch.randn(5), torch.tensor(2))):
        assert torch.equal(fused[0](logits, target), own(logits, target))


@pytest.mark.parametrize("module, dtype", [(torch.nn.GELU(), torch.float64), (LlamaLikeRMSNorm(D), torch.bfloat16), (torch.nn.Softmax(-1), torch.float64),
                                           (LlamaLikeRMSNorm(D).bfloat16(), torch.float32)])
def test_what_was_not_tried_is_computed_as_before(module, dtype):
    model = torch.nn.Sequential(module)
    x = torch.randn(3, D).to(dtype)
    expected = model(x)
    assert replace_modules(model).replaced
    assert torch.equal(model(x), expected) and model(x).dtype == expected.dtype
    if dtype is torch.float64:
        logits, target = torch.randn(3, 5, dtype=dtype), torch.tensor([0, 4, 1])
        loss = torch.nn.Sequential(torch.nn.CrossEntropyLoss())
        replace_modules(loss)
        assert torch.equal(loss[0](logits, target), torch.nn.functional.cross_entropy(logits, target))


def test_what_computes_something_else_stays(model):
    model.body[4] = MisleadingRMSNorm(D)
    done = replace_modules(model)
    assert type(model.body[4]) is MisleadingRMSNorm
    assert "rms_norm: the output differs by" in done.refused["body.4"] and "body.4: kept" in str(done)


@pytest.mark.parametrize("kind", [OddMLP, ScaledRMSNorm, lambda scale: OddMLP([scale])])
def test_modules_that_differ_in_an_attribute_are_tried_each(kind):
    model = torch.nn.ModuleList([kind(1.0), kind(3.0), kind(1.0)])
    x = torch.randn(3, D)
    expected = model[1](x)
    done = replace_modules(model, exclude=["activation"])
    assert set(done.replaced) == {"0", "2"} and "differs by" in done.refused["1"]
    assert torch.equal(model[1](x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_what_differs_in_one_mode_only_stays(training):
    model = OddMLP(dropout=0.5).train(training)
    done = replace_modules(model, exclude=["activation"])
    assert done.replaced == {} and "it draws random numbers" in done.refused[""] and model.training is training
    assert (model.train().down_proj.weight is model.down_proj.weight) and not torch.equal(model(torch.ones(3, D)), model(torch.ones(3, D)))


def test_what_differs_on_large_input_only_stays():
    assert "the output differs" in replace_modules(OddMLP(clamp=2000.0), exclude=["activation"]).refused[""]


def test_an_activation_with_hooks_stays_or_gets_them_later(model):
    seen = []
    watch = lambda module, args, output: seen.append(module)
    early, late = GatedMLP(torch.nn.SiLU()), GatedMLP(torch.nn.SiLU())
    early.act_fn.register_forward_hook(watch)
    body, x = torch.nn.Sequential(early, late), torch.randn(3, D)
    done = replace_modules(body)
    assert "hooks" in done.refused["0"] and done.replaced["1"] == "gated_mlp"
    late(x)
    handle = late.act_fn.register_forward_hook(watch)
    late.gate_proj.register_forward_hook(watch)
    body(x)
    assert seen == [early.act_fn, late.gate_proj, late.act_fn]
    handle.remove()
    late(x)
    assert seen[3:] == [late.gate_proj]


def test_settings_changed_after_replacement_count():
    x = torch.randn(3, D)
    for module, change in ((GatedMLP(torch.nn.SiLU()), {"act_fn": torch.nn.Tanh()}), (GatedMLP(torch.nn.functional.silu), {"act_fn": torch.tanh}),
                           (OddMLP(), {"scale": 3.0}), (torch.nn.GELU(), {"approximate": "tanh"}), (LlamaLikeRMSNorm(D), {"variance_epsilon": 1.0})):
        twin, fused = copy.deepcopy(module), module
        done = replace_modules(fused)
        assert done.replaced
        for name, value in change.items():
            setattr(twin, name, value), setattr(fused, name, value)
        torch.testing.assert_close(fused(x), twin(x))
        done.restore()
        assert set(fused.__dict__) == set(twin.__dict__)


def test_a_forward_computes_fused_still(monkeypatch):
    """Also of copies and pickles: none falls back to the module's own for nothing."""
    body = torch.nn.Sequential(GatedMLP(torch.nn.SiLU()), LlamaLikeRMSNorm(D, eps=1e-5), GatedMLP(torch.nn.functional.gelu))
    replace_modules(body)
    for kind in (GatedMLP, LlamaLikeRMSNorm):
        monkeypatch.setattr(kind, "forward", None)
    file = io.BytesIO()
    torch.save(body, file)
    file.seek(0)
    for model in (body, copy.deepcopy(body), torch.load(file, weights_only=False)):
        model(torch.randn(3, D))
        with torch.autocast("cpu", torch.bfloat16):
            model[0](torch.randn(3, D))


@pytest.mark.parametrize("module", [torch.nn.CrossEntropyLoss(), torch.nn.Softmax(-1), torch.nn.LayerNorm(D).bfloat16()])
def test_under_autocast_the_dtype_is_torch_s(module):
    x, labels = torch.randn(4, D).bfloat16(), torch.randint(D, (4,))
    args = (x, labels) if isinstance(module, torch.nn.CrossEntropyLoss) else (x,)
    fused = copy.deepcopy(module)
    assert replace_modules(fused).replaced
    with torch.autocast("cpu", torch.bfloat16):
        ours, own = fused(*args), module(*args)
    assert ours.dtype == own.dtype and torch.equal(ours, own)


@pytest.mark.parametrize("module, keyword", [(GatedMLP(torch.nn.SiLU()), "x"), (LlamaLikeRMSNorm(D), "hidden_states"), (torch.nn.RMSNorm(D), "x"),
                                             (torch.nn.LayerNorm(D), "input"), (torch.nn.GELU(), "input")])
def test_arguments_by_keyword(module, keyword):
    fused, x = copy.deepcopy(module), torch.randn(3, D)
    assert replace_modules(fused).replaced
    torch.testing.assert_close(fused(**{keyword: x}), module(**{keyword: x}))


def test_a_second_argument_is_the_module_s_own():
    norm, x, gate = ScaledRMSNorm(1.0), torch.randn(3, D), torch.randn(3, D)
    expected = norm(x, gate)
    assert replace_modules(norm).replaced
    assert torch.equal(norm(x, gate), expected) and torch.equal(norm(x, gate=gate), expected)


def test_what_cannot_be_tried_is_refused():
    mlp, watched = GatedMLP(torch.nn.SiLU()), LlamaLikeRMSNorm(D)
    mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(2 * D, D, dtype=torch.int8), requires_grad=False)
    watched.register_buffer("scale", torch.ones(()))
    refused = replace_modules(torch.nn.Sequential(mlp, watched), exclude=["activation"]).refused
    assert refused["0"].startswith("gated_mlp: the trial failed: ") and "it has buffers" in refused["1"]


def test_input_that_only_torch_takes():
    softmax, loss = torch.nn.Softmax(-1), torch.nn.CrossEntropyLoss()
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 1, 2], dtype=torch.uint8)
    replace_modules(torch.nn.ModuleList([softmax, loss]))
    assert softmax(torch.tensor(3.0)) == 1
    assert torch.equal(loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    loss.weight = torch.arange(5.0)
    assert torch.equal(loss(logits, labels.long()), torch.nn.functional.cross_entropy(logits, labels.long(), weight=loss.weight))


def test_the_trial_of_an_mlp_is_sparing():
    with torch.device("meta"):
        mlp = GatedMLP(torch.nn.SiLU())
    for name, shape in (("gate_proj", (1024, 2048)), ("up_proj", (1024, 2048)), ("down_proj", (2048, 1024))):
        setattr(mlp, name, torch.nn.Linear(*shape, bias=False))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        assert replace_modules(mlp, include=["gated_mlp"]).replaced
    alive = peak = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    weights = sum(p.nbytes for p in mlp.parameters())
    assert weights <= peak < 2.5 * weights


def test_a_forward_of_its_own_stays(model):
    model.body[1].forward = lambda x: x
    assert "a forward of its own" in replace_modules(model).refused["body.1"]


def test_include_and_exclude(model):
    assert set(replace_modules(model, include=["rms_norm"]).replaced.values()) == {"rms_norm"}
    assert "rms_norm" not in replace_modules(model, exclude=["activation"]).replaced.values()
    with pytest.raises(ValueError, match="no rule 'norms'; the rules are layer_norm"):
        replace_modules(model, include=["norms"])


def test_replaced_models_are_copied_and_pickled(model):
    replace_modules(model)
    loss, _ = loss_and_grads(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(loss_and_grads(twin)[0], loss)
        assert restore_modules(twin) == 9 and type(twin.body[1]) is torch.nn.LayerNorm


def test_hooks_stay(model):
    seen = []
    model.body[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    replace_modules(model)
    model(*batch())
    assert seen == [torch.Size([12, D])]


def test_the_trial_leaves_no_trace(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    replace_modules(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype):
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.LayerNorm(D), LlamaLikeRMSNorm(D), torch.nn.SiLU(), GatedMLP(torch.nn.SiLU())).to(dtype)
    assert len(replace_modules(body).replaced) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_rms_norm_without_eps_takes_torch_s_on_small_input(dtype):
    own, x = torch.nn.RMSNorm(D, dtype=dtype), (torch.randn(3, D) / 100).to(dtype)
    fused = copy.deepcopy(own)
    assert replace_modules(fused).replaced == {"": "rms_norm"}
    torch.testing.assert_close(fused(x), own(x))


def test_models_without_values():
    with torch.device("meta"):
        body = torch.nn.Sequential(torch.nn.LayerNorm(D), torch.nn.GELU())
    assert len(replace_modules(body).replaced) == 2


@on_ranks(2)
def test_under_an_engine():
    torch.manual_seed(0)
    model = Model()
    expected = float(model(*batch()).detach())
    engine, *_ = deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 12, "zero_optimization": {"stage": 3},
                                                           "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})
    try:
        assert len(replace_modules(engine.module).replaced) == 9
        losses = []
        for _ in range(5):
            loss = engine(*batch())
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(expected, rel=1e-6) and losses[-1] < losses[0]
    finally:
        engine.destroy()


def test_one_rule_may_be_a_plain_name():
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU())
    assert replace_modules(model, include="layer_norm").replaced == {"0": "layer_norm"}
    restore_modules(model)
    assert replace_modules(model, exclude="layer_norm").replaced == {"1": "activation"}


@pytest.mark.parametrize("activation, choice", [(torch.nn.SiLU(), "swiglu"), (torch.nn.GELU(), "geglu"), (torch.nn.GELU(approximate="tanh"), "geglu_tanh")])
def test_one_projection_for_gate_and_up(activation, choice):
    torch.manual_seed(0)
    plain = JoinedMLP(activation)
    mlp, x = copy.deepcopy(plain), torch.randn(5, D)
    assert replace_modules(mlp).replaced[""] == "gated_mlp"
    ours, theirs = [t.clone().requires_grad_() for t in (x, x)]
    a, b = mlp(ours), plain(theirs)
    (a * a).sum().backward()
    (b * b).sum().backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(mlp.gate_up_proj.weight.grad, plain.gate_up_proj.weight.grad)
    assert "" not in replace_modules(JoinedMLP(activation, up_first=True)).replaced


def test_a_norm_is_known_by_what_it_has():
    assert replace_modules(T5LikeLayerNorm(D)).replaced == {"": "rms_norm"}


def test_the_default_device_is_no_trial_s_concern():
    modules = torch.nn.Sequential(LlamaLikeRMSNorm(D), GatedMLP(torch.nn.SiLU()), torch.nn.CrossEntropyLoss())
    with torch.device("meta"):
        assert set(replace_modules(modules).replaced) >= {"0", "1", "2"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traced_or_refused_to_be_scripted(model):
    body, x = model.body[:5], batch()[0]
    expected = body(x)
    replace_modules(body)
    fused, classes = body(2 * x), [type(m) for m in body.modules()]
    traced, exported = torch.jit.trace(body, x), torch.export.export(body, (x,))
    assert torch.equal(traced(2 * x), fused) and str(traced.inlined_graph).count("= deepspeed::") == 4
    assert torch.equal(exported.module()(2 * x), fused) and str(exported.graph).count("torch.ops.deepspeed.") == 4
    with pytest.raises(RuntimeError, match=r"fused forward of FusedLayerNorm: call deepspeed.ops.restore_modules.model. first, or use torch.jit.trace"):
        torch.jit.script(body)
    assert [type(m) for m in body.modules()] == classes and torch.equal(body(2 * x), fused)
    restore_modules(body)
    assert torch.equal(torch.jit.script(body)(x), expected)
