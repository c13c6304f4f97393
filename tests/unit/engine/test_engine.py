# SPDX-License-Identifier: Apache-2.0
"""What the engine answers and keeps: accessors, param groups, boundaries, schedules, data, life and end."""
import gc
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from tests.parity.launch import on_ranks
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole

STAGES = [0, 1, 2, 3]

# Section 3.2 of what scripts ask: name -> answer of an engine of `config(stage, gradient_accumulation_steps=3)` on two ranks.
ANSWERS = {
    "train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "get_batch_info": (12, 2, 3),
    "get_lr": [1e-2], "get_mom": [(0.9, 0.999)], "get_type": [None], "get_global_grad_norm": None, "was_step_applied": False,
    "fp16_enabled": False, "bfloat16_enabled": False, "fp16_auto_cast": False, "loss_scale": 1.0, "dynamic_loss_scale": False,
    "initial_dynamic_scale": 2**16, "get_data_types": (torch.float32, torch.float32), "torch_autocast_enabled": False,
    "torch_autocast_dtype": None, "zero_offload_optimizer": None, "zero_offload_param": None, "zero_cpu_offload": False,
    "zero_use_cpu_optimizer": False, "zero_has_nvme_offload": False, "zero_reduce_bucket_size": 500_000_000, 
    "zero_sub_group_size": 1_000_000_000, "zero_prefetch_bucket_size": 100, "zero_param_persistence_threshold": 0,
    "zero_max_live_parameters": 1_000_000_000, "zero_contiguous_gradients": True, "zero_reduce_scatter": True,
    "zero_allgather_partitions": True, "zero_elastic_checkpoint": False, "zero_ignore_unused_parameters": True,
    "zero_hpz_partition_size": 1, "gradient_clipping": 1.0, "optimizer_name": "AdamW", "scheduler_name": None,
    "gradient_predivide_factor": 1.0, "postscale_gradients": True, "wall_clock_breakdown": False, "memory_breakdown": False,
    "dataloader_drop_last": False, "sparse_gradients_enabled": False, "managed_gradient_accumulation": True,
    "zero_gather_16bit_weights_on_model_save": False, "get_model_parallel_rank": 0, "get_tensor_parallel_rank": 0,
    "is_gradient_accumulation_boundary": False, "optimizer_legacy_fusion": False, "prescale_gradients": False,
}


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_accessors(stage):
    engine = engine_of(tiny(), config(stage, gradient_accumulation_steps=3))
    wrong = {}
    for name, expected in ANSWERS.items():
        answer = getattr(engine, name)()
        if answer != expected:
            wrong[name] = (answer, expected)
    assert not wrong, wrong
    assert engine.zero_optimization() == (stage > 0) and engine.zero_optimization_stage() == stage
    assert engine.zero_optimization_partition_gradients() == (stage >= 2) and engine.zero_optimization_partition_weights() == (stage == 3)
    assert engine.optimizer_params() == {"lr": 1e-2} and engine.steps_per_print() is None
    assert engine.get_data_parallel_rank() == dist.get_rank()
    assert [int(v) for v in engine.all_gather_scalar(dist.get_rank())] == [0, 1]
    for name in ("swap_tensor_config", "aio_config", "dynamic_loss_scale_args", "get_sequence_parallel_group", "scheduler_params",
                 "get_wall_clock_timers", "collect_python_gc", "empty_partition_cache", "dump_state"):
        getattr(engine, name)()


@on_ranks(2)
def test_attributes():
    engine = engine_of(tiny(), config(1))
    expected = {"global_steps": 0, "global_samples": 0, "micro_steps": 0, "skipped_steps": 0, "global_rank": dist.get_rank(),
                "local_rank": dist.get_rank(), "world_size": 2, "dp_world_size": 2, "mp_world_size": 1, "device": torch.device("cpu"),
                "lr_scheduler": None, "client_optimizer": None, "client_lr_scheduler": None, "training_dataloader": None, "mpu": None,
                "communication_data_type": torch.float32, "is_compiled": False, "enable_backward_allreduce": True}
    assert {name: getattr(engine, name) for name in expected} == expected
    for name in ("monitor", "timers", "tput_timer", "flops_profiler", "checkpoint_engine", "data_parallel_group",
                 "seq_data_parallel_group", "losses"):
        getattr(engine, name)
    assert engine.param_names[engine.module.head.weight] == "head.weight"
    assert engine.basic_optimizer.param_groups is engine.optimizer.param_groups
    train(engine, 2)
    assert (engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps) == (2, 2, 8, 0)
    assert engine.was_step_applied() and engine.losses is not None
    engine.enable_backward_allreduce = False


@on_ranks(2)
def test_what_is_not_built_says_so():
    engine = engine_of(tiny(), config(1))
    with pytest.raises(NotImplementedError, match="not built yet"):
        engine.register_compile_pass("mine", print)
    assert engine.get_compile_time() == [] and engine.clip_fp32_gradients() is None


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_communication_data_type_may_be_set(stage):
    engine, narrow = engine_of(tiny(), config(stage)), engine_of(tiny(), config(stage, communication_data_type="bf16"))
    train(engine, 1)
    after_one = whole(engine.module)
    engine.communication_data_type = torch.bfloat16
    assert engine.communication_data_type is torch.bfloat16
    train(engine, 1, first=1)
    with pytest.raises(ValueError, match="cannot travel as Double"):
        engine.communication_data_type = torch.float64
    narrow.communication_data_type = torch.float32   # wider buckets than it was built with
    train(narrow, 1)
    assert_same(whole(narrow.module), after_one)
    narrow.communication_data_type = torch.bfloat16
    train(narrow, 1, first=1)
    assert_same(whole(narrow.module), whole(engine.module))
    plain = engine_of(tiny(), config(stage))
    train(plain, 2)
    assert not torch.equal(whole(plain.module)["head.weight"], whole(narrow.module)["head.weight"])


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1])
def test_backward_without_allreduce(stage):
    """Gradients wait, whole, for allreduce_gradients() or step()."""
    engine, other = engine_of(tiny(), config(stage)), engine_of(tiny(), config(stage))
    engine.enable_backward_allreduce = False
    for step in range(2):
        engine.backward(engine(batch(step)))
        assert engine._managed.reducer.has_carry()
        with engine.no_sync():
            pass
        if step == 0:
            engine.allreduce_gradients()
            assert not engine._managed.reducer.has_carry()
        engine.step()
    train(other, 2)
    assert_same(whole(engine.module), whole(other.module))
    engine.enable_backward_allreduce = True
    engine.backward(engine(batch(2)))
    assert not engine._managed.reducer.has_carry()


@on_ranks(2)
def test_batch_sizes_change():
    engine = engine_of(tiny(), config(1))
    engine.set_train_batch_size(12)
    assert engine.get_batch_info() == (12, 2, 3)
    with pytest.raises(ValueError, match="13"):
        engine.set_train_batch_size(13)
    engine.set_train_micro_batch_size(4)
    assert engine.get_batch_info() == (24, 4, 3)


# ------------------------------------------------------------------------------------------- the contract with the HF libraries


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_param_groups_are_the_callers_own_dicts(stage):
    model = tiny()
    client = torch.optim.AdamW([{"params": list(model.layers.parameters()), "lr": 1e-2}, {"params": list(model.head.parameters()), "tag": "x"}],
                               lr=1e-3)
    mine = list(client.param_groups)
    cfg = config(stage, optimizer=None, zero_allow_untested_optimizer=True)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=client, config=cfg)
    assert all(a is b for a, b in zip(optimizer.param_groups, mine)) and len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["tag"] == "x" and optimizer.optimizer is client and engine.client_optimizer is client
    scheduler = torch.optim.lr_scheduler.LambdaLR(client, lambda step: 0.0)
    before = whole(model)
    train(engine, 1)
    scheduler.step()
    assert_same(whole(model), before)  # a rate of zero reached the step
    assert engine.get_lr() == [0.0, 0.0]
    for group in mine:
        group["lr"] = 0.1
    train(engine, 1)
    assert not torch.equal(whole(model)["head.weight"], before["head.weight"])


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradient_norm_survives_the_step(stage):
    engine = engine_of(tiny(), config(stage))
    assert engine.get_global_grad_norm() is None
    model = tiny()
    loss = sum(model(batch(0, rank)) for rank in range(2)) / 2
    loss.backward()
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    train(engine, 1)
    engine.zero_grad()
    assert float(engine.get_global_grad_norm()) == pytest.approx(expected, rel=1e-5)


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_boundary_from_outside(stage):
    engine = engine_of(tiny(), config(stage, gradient_accumulation_steps=4))
    before = whole(engine.module)
    for micro in range(3):
        last = micro == 2
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        assert engine.is_gradient_accumulation_boundary() is last
        engine.backward(engine(batch(micro)))
        engine.step()
        assert engine.global_steps == int(last)
        changed = not torch.equal(whole(engine.module)["head.weight"], before["head.weight"])
        assert changed == last


def _plain_sums(pieces, gas):
    """Plain torch: the mean over the ranks of sums of micro-batches, each divided by gas; SGD at every boundary."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    micro = 0
    for numel in pieces:
        for _ in range(numel):
            (model(batch(micro)) / gas).backward()
            micro += 1
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gas", [1, 2])
def test_the_caller_owns_the_boundary(stage, gas):
    """managed_gradient_accumulation false: whatever was accumulated since the last step() is one update."""
    engine = engine_of(tiny(), config(stage, gradient_accumulation_steps=gas, managed_gradient_accumulation=False, gradient_clipping=0.0,
                                      optimizer={"type": "SGD", "params": {"lr": 0.1}}))
    micro = 0
    for update, numel in enumerate((1, 3, 2), 1):  # 2 samples a micro-batch and rank
        for _ in range(numel):
            before = whole(engine.module)
            engine.backward(engine(batch(micro)))
            assert_same(whole(engine.module), before)
            assert engine.is_gradient_accumulation_boundary()
            micro += 1
        engine.step()
        assert engine.global_steps == engine.micro_steps == update and engine.was_step_applied() and engine.global_samples == 4 * micro
    expected = _plain_sums((1, 3, 2), gas)
    # Sums of six gradients in another order: a few eps of their size, 1, times the step of 0.1.
    for name, value in whole(engine.module).items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-6), name
    with pytest.raises(AssertionError, match="every step\\(\\) is a boundary"):
        engine.set_gradient_accumulation_boundary(is_boundary=True)


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_scale_wrt_gas(stage):
    losses, params = [], []
    for by_engine in (True, False):
        engine = engine_of(tiny(), config(stage, gradient_accumulation_steps=2))
        for micro in range(4):
            loss = engine(batch(micro))
            if by_engine:
                assert engine.backward(loss).item() == pytest.approx(loss.item() / 2)
            else:
                engine.backward(loss / 2, scale_wrt_gas=False)
            engine.step()
        params.append(whole(engine.module))
    assert_same(*params)


@on_ranks(2)
def test_steps_per_print_may_be_infinite():
    engine = engine_of(tiny(), config(1, steps_per_print=float("inf")))
    train(engine, 2)
    assert engine.steps_per_print() == math.inf


@on_ranks(2)
def test_class_and_config():
    cfg = config(2)
    engine = engine_of(tiny(), cfg)
    from deepspeed.runtime.engine import DeepSpeedEngine
    assert type(engine) is DeepSpeedEngine is deepspeed.DeepSpeedEngine
    assert engine.config is cfg and engine.config["zero_optimization"]["stage"] == 2
    model = tiny()
    model.config = "the module's own"
    assert engine_of(model, cfg).config is cfg and engine.module is not model
    assert engine.layers is engine.module.layers and engine.body(batch(0)).shape == (2, 1)
    with pytest.raises(AttributeError, match="no_such_thing"):
        engine.no_such_thing
    assert not hasattr(engine, "no_such_thing")


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_module_wrapped_twice(stage):
    model = tiny()
    first = engine_of(model, config(stage, optimizer=None))
    with torch.no_grad():
        reference = first(batch(0)).item()
    engine = engine_of(model, config(stage))
    assert engine.module is model is first.module
    assert engine(batch(0)).item() == reference
    engine.zero_grad()
    losses = train(engine)
    assert losses == train(engine_of(tiny(), config(stage)))
    with torch.no_grad():
        assert first(batch(0)).item() == engine(batch(0)).item()  # the first one sees the trained weights
    del first
    gc.collect()
    train(engine, 1)


@on_ranks(2)
@pytest.mark.parametrize("case", ["fp32", "bf16", "stage 3", "scheduler left over", "no parameters"])
def test_without_an_optimizer(case):
    cfg = config(3 if case == "stage 3" else 0, optimizer=None)
    if case == "bf16":
        cfg["bf16"] = {"enabled": True}
    if case == "scheduler left over":
        cfg["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    extra = {"model_parameters": []} if case == "no parameters" else {}
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=tiny(), config=cfg, **extra)
    engine.eval()
    with torch.no_grad():
        loss = engine(batch(0).to(engine.get_data_types()[0]))
    if case != "bf16":
        assert loss.item() == tiny()(batch(0)).item()
    assert scheduler is None and loader is None
    if case == "stage 3":
        assert optimizer is not None and optimizer.module is engine.module and optimizer.forward_hooks
    else:
        assert optimizer is None or case == "bf16"
    with pytest.raises(AssertionError, match="no optimizer"):
        engine.backward(engine(batch(0).to(engine.get_data_types()[0])))


@on_ranks(2)
@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_need_an_optimizer(stage):
    with pytest.raises(AssertionError, match="there is no optimizer"):
        engine_of(tiny(), config(stage, optimizer=None))


# -------------------------------------------------------------------------------------------------------------------- schedules


SCHEDULES = {
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 2},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 2},
    "WarmupLR": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4, "warmup_type": "linear"},
    "WarmupDecayLR": {"total_num_steps": 8, "warmup_max_lr": 1e-2, "warmup_num_steps": 3},
    "WarmupCosineLR": {"total_num_steps": 8, "warmup_num_steps": 3},
    "StepLR": {"step_size": 2, "gamma": 0.5},
}


def own_sequence(name, params, steps):
    """The rates of the same schedule by hand."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2)
    kind = getattr(torch.optim.lr_scheduler, name, None) or getattr(deepspeed.runtime.lr_schedules, name)
    schedule, rates = kind(optimizer, **params), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@on_ranks(2)
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_from_the_config(name):
    engine = engine_of(tiny(), config(1, gradient_accumulation_steps=2, scheduler={"type": name, "params": SCHEDULES[name]}))
    assert type(engine.lr_scheduler).__name__ == name == engine.scheduler_name()
    rates = []
    for step in range(6):
        rates.append(engine.get_lr()[0])
        train(engine, 2)
        assert engine.lr_scheduler.get_last_lr() == engine.get_lr()
    assert rates == own_sequence(name, SCHEDULES[name], 6)


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_skipped_steps_do_not_advance_the_schedule(stage):
    engine = engine_of(tiny(), config(stage, fp16={"enabled": True, "initial_scale_power": 4},
                                      scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 9}}))
    train(engine, 1)
    rates, before, scale = engine.get_lr(), whole(engine.module), engine.loss_scale()
    engine.backward(engine(batch(1).half()) * (float("inf") if dist.get_rank() == 1 else 1.0))
    engine.step()
    assert engine.skipped_steps == 1 and engine.optimizer.overflow and not engine.was_step_applied()
    assert engine.get_lr() == rates and engine.loss_scale() <= scale
    assert_same(whole(engine.module), before)
    train(engine, 1, first=2)
    assert engine.was_step_applied() and not engine.optimizer.overflow and engine.get_lr() != rates


@on_ranks(2)
def test_a_client_scheduler():
    model = tiny()
    client = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = engine_of(model, config(2, optimizer=None), optimizer=client, lr_scheduler=torch.optim.lr_scheduler.StepLR(client, 1, 0.5))
    train(engine, 2)
    assert engine.get_lr() == [1e-2 / 4]
    engine.lr_scheduler = None
    train(engine, 1)
    assert engine.get_lr() == [1e-2 / 4]
    engine = engine_of(tiny(), config(2), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    train(engine, 1)
    assert engine.get_lr() == [1e-2 / 2]


# ------------------------------------------------------------------------------------------------------------------------- data


@on_ranks(2)
def test_training_data():
    data = [(torch.full((9,), float(i)), i) for i in range(10)]
    engine, _, loader, _ = deepspeed.initialize(model=tiny(), config=config(1), training_data=data)
    assert loader is engine.training_dataloader and len(loader) == 3
    seen = []
    for inputs, numbers in loader:
        assert inputs.shape[1] == 9 and len(inputs) <= 2
        seen += numbers.tolist()
        engine.backward(engine(inputs))
        engine.step()
    found = [None, None]
    dist.all_gather_object(found, seen)
    assert set(found[0]) | set(found[1]) == set(range(10)) and len(found[0]) == len(found[1]) == 5


# ----------------------------------------------------------------------------------------------------------------- life and end


class Big(nn.Module):
    """50 MB."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(12))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def resident_mb():
    """Private memory and the shared memory of ranks; what files map comes and goes."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


def use_big(stage, end):
    engine = engine_of(Big(), config(stage, zero={"stage3_prefetch_bucket_size": 3_000_000}))
    model = engine.module
    for _ in range(2):
        loss = engine(torch.randn(2, 1024))
        engine.backward(loss)
        engine.step()
    del loss
    if end == "destroy":
        engine.destroy()
        engine.destroy()
    del engine
    gc.collect()
    if stage < 3:
        with torch.no_grad():
            assert model(torch.randn(2, 1024)).isfinite()
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(2, 1024)).backward()
        plain.step()


def trim():
    import ctypes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("end", ["destroy", "del"])
def test_memory_comes_back(stage, end):
    train(engine_of(tiny(), config(stage)), 1)  # what is loaded once
    trim()
    before = resident_mb()
    use_big(stage, end)
    dist.barrier()
    trim()
    grown = resident_mb() - before
    assert grown < 12, f"{grown:.0f} MB are left of a 50 MB model"


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_the_model_after_destroy(stage):
    engine = engine_of(tiny(), config(stage))
    train(engine, 1)
    expected = whole(engine.module)
    model = engine.module
    engine.destroy()
    if stage == 3:   # sharded, as zero.Init would have left them
        with pytest.raises(RuntimeError, match="(?s)head.weight.*GatheredParameters"):
            model.head.weight + 1
    else:
        assert_same({name: p.detach() for name, p in model.named_parameters()}, expected)
    again = engine_of(model, config(3))
    assert_same(whole(model), expected)
    train(again, 1)


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_compile_in_place(stage):
    engine = engine_of(tiny(), config(stage))
    engine.compile(backend="eager")
    assert engine.is_compiled
    assert train(engine, 2) == train(engine_of(tiny(), config(stage)), 2)


@on_ranks(2)
def test_train_and_eval():
    engine = engine_of(tiny(), config(3))
    assert engine.eval() is engine and not engine.module.training
    engine.train()
    assert engine.module.training and engine.module.layers[0].training
