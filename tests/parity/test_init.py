# SPDX-License-Identifier: Apache-2.0
"""zero.Init: sharded while it is built; afterwards indistinguishable from a model sharded by initialize()."""
import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from tests.parity.launch import on_ranks
from tests.parity.tiny import Tiny, assert_same, batch, config, engine_of, tiny, train, whole

_CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")


def torch_state():
    """What a context might leave patched."""
    modules = (nn.Module.__init__, nn.Module.apply, nn.Module.__setattr__, nn.Module.register_parameter, nn.Linear.__init__,
               torch.Tensor.__new__, torch.get_default_dtype())
    hooks = torch.nn.modules.module
    return (*(getattr(torch, name) for name in _CONSTRUCTORS), *modules, len(hooks._global_parameter_registration_hooks),
            len(hooks._global_module_registration_hooks))


def assert_sharded(model):
    for name, parameter in model.named_parameters():
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE, name
        assert parameter.data.numel() == 0, name
        assert parameter.ds_numel == parameter.numel() and parameter.ds_shape == parameter.shape, name


def built_in_init(**arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        with deepspeed.zero.Init(**arguments):
            return Tiny()


@on_ranks(2)
def test_values_are_those_of_a_plain_model():
    model = built_in_init()
    assert_sharded(model)
    assert_same(whole(model), {name: p.detach() for name, p in tiny().named_parameters()})
    assert_sharded(model)


@on_ranks(2)
def test_rank_zero_counts():
    torch.manual_seed(7 + dist.get_rank())
    with deepspeed.zero.Init():
        layer = nn.Linear(5, 3)
    torch.manual_seed(7)
    assert_same(whole(layer), {name: p.detach() for name, p in nn.Linear(5, 3).named_parameters()})


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_trains_like_a_model_without_init(stage):
    plain, sharded = engine_of(tiny(), config(stage)), engine_of(built_in_init(), config(stage))
    assert train(plain) == train(sharded)
    assert_same(whole(plain.module), whole(sharded.module))


@on_ranks(2)
def test_bf16_from_the_config():
    cfg = config(3, bf16={"enabled": True}, gradient_accumulation_steps="auto")
    model = built_in_init(config_dict_or_path=cfg)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    engine = engine_of(model, cfg)
    before = whole(model)
    train(engine)
    assert engine.was_step_applied() and not torch.equal(whole(model)["head.weight"], before["head.weight"])


@on_ranks(2)
def test_dtype_argument_wins():
    model = built_in_init(config_dict_or_path=config(3, bf16={"enabled": True}), dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@on_ranks(2)
def test_nested_contexts():
    before = torch_state()
    with deepspeed.zero.Init():
        with deepspeed.zero.Init():
            inner = nn.Sequential(nn.Linear(3, 3))
        outer = nn.Linear(3, 5)
    assert torch_state() == before
    for module in (inner, outer):
        assert_sharded(module)
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")


@on_ranks(2)
def test_disabled_does_nothing():
    before = torch_state()
    with deepspeed.zero.Init(enabled=False):
        assert torch_state() == before
        model = Tiny()
    assert not any(hasattr(p, "ds_id") for p in model.parameters())


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        raise KeyError("from the constructor")


@on_ranks(2)
@pytest.mark.parametrize("depth", [1, 2])
def test_an_exception_unpatches_everything(depth):
    before = torch_state()
    with pytest.raises(KeyError, match="from the constructor"):
        with deepspeed.zero.Init(dtype=torch.bfloat16):
            if depth == 2:
                with deepspeed.zero.Init():
                    Failing()
            Failing()
    assert torch_state() == before
    assert not hasattr(nn.Linear(2, 2).weight, "ds_id")
    model = built_in_init()  # and the next one works
    assert_sharded(model)


@on_ranks(2)
def test_after_the_fact():
    model = tiny()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    deepspeed.zero.Init(module=model)
    assert_sharded(model)
    assert_same(whole(model), expected)
    deepspeed.zero.Init(module=model)  # again: nothing left to do
    assert_same(whole(model), expected)
    assert train(engine_of(model, config(3))) == train(engine_of(tiny(), config(3)))


@on_ranks(2)
def test_layer_by_layer():
    with deepspeed.zero.Init():
        layers = [nn.Linear(9, 9) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(9, 1))
    deepspeed.zero.Init(module=model)
    assert_sharded(model)
    with deepspeed.zero.GatheredParameters(model.parameters()):
        assert model(batch(0)).shape == (2, 1)


class Initialised(nn.Module):
    """Initialises itself in every way people do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.linear = nn.Linear(5, 7)
        self.own = nn.Parameter(torch.empty(7))
        self.register_buffer("table", torch.arange(4, dtype=torch.float32))
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.constant_(self.own, 2.0)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
            self.linear.weight[0].fill_(3.0)
        self.linear.bias.data.zero_()
        self.apply(self._fill)

    @staticmethod
    def _fill(module):
        if isinstance(module, nn.Linear):
            module.weight.data.add_(1.0)
            nn.init.ones_(module.bias)


@on_ranks(2)
def test_initialisers_inside():
    torch.manual_seed(5)
    plain = Initialised()
    torch.manual_seed(5)
    with deepspeed.zero.Init():
        model = Initialised()
    assert_sharded(model)
    assert_same(whole(model), {name: p.detach() for name, p in plain.named_parameters()})
    assert torch.equal(model.table, plain.table)


@on_ranks(2)
def test_apply_from_outside_inside_the_context():
    with deepspeed.zero.Init():
        model = Tiny()
        model.apply(lambda m: nn.init.constant_(m.weight, 0.25) if isinstance(m, nn.Linear) else None)
    values = whole(model)
    assert all((value == 0.25).all() for name, value in values.items() if "linear.weight" in name or name == "head.weight")
    assert (values["layers.0.norm.weight"] == 1).all()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 9)
        self.head = nn.Linear(9, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens)).square().mean()


@on_ranks(2)
def test_tied_weights():
    with deepspeed.zero.Init():
        model = Tied()
    assert model.head.weight is model.embed.weight and len(list(model.parameters())) == 1
    engine = engine_of(model, config(3))
    for _ in range(2):
        loss = engine(torch.tensor([[1, 2]]))
        engine.backward(loss)
        engine.step()
    assert model.head.weight is model.embed.weight


@on_ranks(2)
def test_initialize_inside_the_context():
    with deepspeed.zero.Init():
        model = Tiny()
        engine = engine_of(model, config(3))
        late = nn.Linear(3, 3)
    train(engine, 4)
    assert_sharded(late)


@on_ranks(2)
def test_inference_without_an_engine():
    model = built_in_init().eval()
    plain = tiny().eval()
    with torch.no_grad(), deepspeed.zero.GatheredParameters(model.parameters()):
        assert model(batch(0)) == plain(batch(0))
    assert_sharded(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="sharded by ZeRO-3"):
        model(batch(0))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(16))  # 4 MB each


def peak_rss_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@on_ranks(2, fresh=True)  # what earlier tests left in malloc would be counted
def test_memory_never_holds_the_whole_model():
    with deepspeed.zero.Init():
        nn.Linear(8, 8)  # what opening the transport costs is not the model's
    reset_peak()
    before = peak_rss_mb()
    with deepspeed.zero.Init():
        model = Wide()
    grown = peak_rss_mb() - before
    assert grown < 32 + 28, f"64 MB of parameters on two ranks: peak grew by {grown:.0f} MB"
    assert_sharded(model)


@on_ranks(2, fresh=True)
def test_memory_after_the_fact_is_never_two_copies():
    model = Wide()
    deepspeed.zero.Init(module=nn.Linear(8, 8))
    reset_peak()
    before = peak_rss_mb()
    deepspeed.zero.Init(module=model)
    grown = peak_rss_mb() - before
    assert grown < 16, f"64 MB of parameters, cut in place: peak grew by {grown:.0f} MB"


@on_ranks(2, fresh=True)
def test_memory_from_init_to_engine():
    cfg = config(3, optimizer={"type": "SGD", "params": {"lr": 0.1}}, zero={"stage3_prefetch_bucket_size": 1_000_000})
    train(engine_of(tiny(), cfg), 1)  # what is loaded once
    with deepspeed.zero.Init():
        model = Wide()
    reset_peak()
    before = peak_rss_mb()
    engine = engine_of(model, cfg)
    grown = peak_rss_mb() - before
    # The shards move a unit at a time, and chunks of 64 MB are given back when their last unit has gone.
    assert grown < 32 + 24, f"32 MB of shards were moved: peak grew by {grown:.0f} MB"
    assert engine.module is model


@on_ranks(1)
def test_one_rank_alone():
    """It owns everything; an engine takes the model over as from many."""
    wanted = train(engine_of(tiny(), config(3)), 2)
    model = built_in_init()
    assert train(engine_of(model, config(3)), 2) == wanted
