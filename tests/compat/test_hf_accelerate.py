# SPDX-License-Identifier: Apache-2.0
"""Accelerate without the Trainer: one model or several, beside Accelerate without this library."""
import importlib.util
import tempfile

import pytest
import torch
from torch import nn

from tests.parity.launch import on_ranks

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

from tests.compat.hf import training  # noqa: E402

TIMEOUT_S = 170
BAR = 1e-5
CLIP = 0.4    # clipping is the JSON's: with "auto" Accelerate writes 1.0 there, whatever clip_grad_norm_ is told


def config(stage, named=False, clip=CLIP):
    """What people write: "auto" wherever Accelerate knows better. named: optimizer and scheduler are in the JSON."""
    section = {"stage": stage, "reduce_bucket_size": 5e8}
    if stage == 3:
        section.update(stage3_gather_16bit_weights_on_model_save=True, stage3_param_persistence_threshold=0)
    found = {"zero_optimization": section, "gradient_clipping": clip, "gradient_accumulation_steps": "auto",
             "train_micro_batch_size_per_gpu": 4}
    if named:
        found["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
        found["scheduler"] = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto",
                                                             "warmup_type": "linear"}}
    return found


def accelerator(plugin=None, **settings):
    """On a machine without a GPU Accelerate takes DeepSpeed only if it is not told cpu=True, and two ranks only if told their backend."""
    from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
    if plugin is None:
        return Accelerator(cpu=True, **settings)
    which = "deepspeed_plugins" if isinstance(plugin, dict) else "deepspeed_plugin"
    found = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **{which: plugin}, **settings)
    assert found.distributed_type == DistributedType.DEEPSPEED and found.num_processes == 2
    return found


def plugin(stage, named=False, accumulation=1, clip=CLIP):
    from accelerate import DeepSpeedPlugin
    return DeepSpeedPlugin(hf_ds_config=config(stage, named, clip), gradient_accumulation_steps=accumulation)


def network(seed, width=17):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))


def loader():
    generator = torch.Generator().manual_seed(1)
    rows = torch.utils.data.TensorDataset(torch.randn(64, 9, generator=generator), torch.randint(0, 5, (64,), generator=generator))
    return torch.utils.data.DataLoader(rows, batch_size=4)


def _optimizer(model, named):
    if named:
        from accelerate.utils import DummyOptim, DummyScheduler
        optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.01)
        return optimizer, DummyScheduler(optimizer, warmup_num_steps=4, total_num_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def trained(stage, named=False, epochs=1, save=None, load=None):
    """An ordinary loop; losses, norms, whole weights."""
    training.forget_accelerate()
    runs = accelerator(plugin(stage, named, 2) if stage is not None else None, gradient_accumulation_steps=2)
    model = network(0)
    optimizer, scheduler = _optimizer(model, named)
    model, optimizer, batches, scheduler = runs.prepare(model, optimizer, loader(), scheduler)
    if load:
        runs.load_state(load)
    figures = []
    for _ in range(epochs):
        for x, y in batches:
            with runs.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                runs.backward(loss)
                norm = runs.clip_grad_norm_(model.parameters(), CLIP) if runs.sync_gradients else 0.0
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                figures += [loss.item(), float(norm)]
    weights = runs.get_state_dict(model)
    if save:
        runs.save_state(save)
    unwrapped = runs.unwrap_model(model)
    assert type(unwrapped) is nn.Sequential
    return figures, {name: value.clone() for name, value in (weights or {}).items()}


def assert_close(found, wanted):
    assert len(found) == len(wanted) > 0
    assert max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(found, wanted)) <= BAR


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="accelerate-") as path:
        yield path


@on_ranks(2, timeout=TIMEOUT_S)
def test_an_ordinary_loop():
    import torch.distributed as dist
    plain, wanted = trained(None)
    for stage in (0, 1, 2, 3):
        figures, weights = trained(stage)
        assert_close(figures, plain)
        assert weights.keys() == wanted.keys() or (stage == 3 and dist.get_rank() != 0 and not weights)
        for name, value in weights.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


@on_ranks(2, timeout=TIMEOUT_S)
def test_optimizer_and_scheduler_of_the_json():
    """DummyOptim and DummyScheduler: the stages agree, and the schedule warms up."""
    first = trained(0, named=True)[0]
    assert_close(first[:4], trained(None)[0][:4])    # before the first update
    for stage in (2, 3):
        assert_close(trained(stage, named=True)[0], first)


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [2, 3])
def test_save_state_and_load_state(stage, folder):
    through = trained(stage, epochs=2)[0]
    begun = trained(stage, save=folder)[0]
    rest = trained(stage, load=folder)[0]
    assert_close(begun + rest, through)


def _update(runs, model, optimizer, x, aim):
    """The loss."""
    loss = nn.functional.cross_entropy(model(x), aim)
    runs.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _distil(student_stage, teacher_stage):
    """A student learns from a teacher; both engines live in one process under one Accelerator."""
    training.forget_accelerate()
    student, teacher = network(0), network(5, width=33)
    if student_stage is None:
        runs = accelerator()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        student, optimizer, batches, teacher = runs.prepare(student, optimizer, loader(), teacher)
    else:
        plugins = {"student": plugin(student_stage, clip="auto"), "teacher": plugin(teacher_stage, clip="auto")}
        runs = accelerator(plugins)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        student, optimizer, batches = runs.prepare(student, optimizer, loader())
        runs.state.select_deepspeed_plugin("teacher")
        teacher = runs.prepare(teacher)
        assert student.zero_optimization_stage() == student_stage and teacher.zero_optimization_stage() == teacher_stage
    teacher.eval()
    losses = []
    for x, _ in batches:
        with torch.no_grad():
            aim = teacher(x).softmax(-1)
        losses.append(_update(runs, student, optimizer, x, aim))
    return losses


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stages", [(2, 3), (3, 3), (3, 0)], ids=str)
def test_a_student_and_a_teacher_with_configurations_of_their_own(stages):
    assert_close(_distil(*stages), _distil(None, None))


def _two_trained(stages):
    training.forget_accelerate()
    if stages is None:
        runs = [accelerator(), accelerator()]
    else:
        plugins = {"first": plugin(stages[0], clip="auto"), "second": plugin(stages[1], clip="auto")}
        runs = [accelerator(plugins), _another()]
    models, optimizers, batches = [], [], None
    for number, (each, name) in enumerate(zip(runs, ("first", "second"))):
        if stages is not None:
            runs[0].state.select_deepspeed_plugin(name)
        model = network(number)
        prepared = each.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), *([loader()] if number == 0 else []))
        models.append(prepared[0])
        optimizers.append(prepared[1])
        batches = prepared[2] if number == 0 else batches
    losses = []
    for x, y in batches:
        for each, model, optimizer in zip(runs, models, optimizers):
            losses.append(_update(each, model, optimizer, x, y))
    return losses


def _another():
    """Each trained engine needs an Accelerator of its own; they share the state."""
    from accelerate import Accelerator
    return Accelerator()


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stages", [(2, 3), (3, 2)], ids=str)
def test_two_models_are_trained_in_turn(stages):
    assert_close(_two_trained(stages), _two_trained(None))


@on_ranks(2, timeout=TIMEOUT_S)
def test_saving_whole_weights_that_nobody_gathers_is_an_error_that_names_the_key():
    training.forget_accelerate()
    from accelerate import DeepSpeedPlugin
    written = config(3)
    del written["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    runs = accelerator(DeepSpeedPlugin(hf_ds_config=written))
    model = network(0)
    model, _, _ = runs.prepare(model, torch.optim.AdamW(model.parameters()), loader())
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
        runs.get_state_dict(model)
