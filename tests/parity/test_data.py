# SPDX-License-Identifier: Apache-2.0
"""The data path through the engine on several ranks: loaders, curricula, and layers that drop tokens."""
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.data import DataAnalyzer, convert_to_random_ltd, save_without_random_ltd
from tests.parity.launch import on_ranks, run
from tests.parity.tiny import Layer, assert_same, config, engine_of, tiny, whole

LINEAR = {
    "min_difficulty": 8, "max_difficulty": 32, "schedule_type": "fixed_linear", "schedule_config":
    {"total_curriculum_step": 4, "difficulty_step": 8}
}


class Numbers(torch.utils.data.Dataset):
    """Sample i is i, and as long as `length(i)`."""

    def __init__(self, numel=50):
        self.numel = numel

    def __len__(self):
        return self.numel

    def __getitem__(self, index):
        return index

    @staticmethod
    def length(index):
        return index * 7 % 40 + 1


def everyone(values):
    """The lists of all ranks."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return found


def loading_engine(data, **more):
    # Ranks come from a fork server and would start a loader's workers that way: seconds for importing torch anew.
    multiprocessing.set_start_method("fork", force=True)
    return deepspeed.initialize(model=nn.Linear(2, 1), training_data=data, config=config(0, **more))[0]


# ---- loaders


def _epochs(workers):
    engine = loading_engine(Numbers())
    loader = engine.deepspeed_io(Numbers(), num_local_io_workers=workers) if workers else engine.training_dataloader
    epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
    for epoch in epochs:
        parts = everyone(sum(epoch, []))
        assert sorted(sum(parts, [])) == list(range(50)) and len({len(part) for part in parts}) == 1
    assert epochs[0] != epochs[1]
    return epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_in_an_epoch(workers):
    run(_epochs, 2, workers)


def _consume(state, batches):
    """Samples of all ranks by batch, and the state after them."""
    engine = loading_engine(Numbers())
    if state is not None:
        engine.load_data_state_dict(state)
    loader = iter(deepspeed.utils.RepeatingLoader(engine.training_dataloader))
    seen = [sorted(sum(everyone(next(loader).tolist()), [])) for _ in range(batches)]
    states = everyone(engine.data_state_dict())
    assert all(one == states[0] for one in states)
    return seen, states[0]


def test_two_ranks_stop_and_three_go_on():
    """2 x 2 samples a batch, 3 batches; then 3 x 2 samples: 38 are left, 2 short of full batches, which the epoch's head fills up."""
    straight, _ = run(_consume, 2, None, 12)[0]
    order = sum(straight, [])
    before, state = run(_consume, 2, None, 3)[0]
    assert before == straight[:3] and state["data_sampler"]["consumed_samples"] == 12
    after, _ = run(_consume, 3, state, 6)[0]
    assert sorted(sum(before + after, [])) == sorted(set(sum(before + after, []))) and len(sum(before + after, [])) == 48
    assert set(sum(after, [])) >= set(order[12:36])


# ---- curricula


class Told(nn.Module):
    """Notes what forward is told."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.told = []

    def forward(self, x, curriculum_seqlen=None):
        self.told.append(curriculum_seqlen)
        return self.linear(x).square().mean()


def steps(engine, numel):
    for _ in range(numel):
        engine.backward(engine(torch.ones(2, 2)))
        engine.step()


@on_ranks(2)
def test_old_section_tells_the_model():
    section = {"enabled": True, "curriculum_type": "seqlen", **LINEAR}
    engine = engine_of(Told(), config(0, curriculum_learning=section, gradient_accumulation_steps=2))
    steps(engine, 8)
    assert engine.module.told == [8, 8, 16, 16, 24, 24, 32, 32] and engine.curriculum_scheduler.get_current_difficulty() == 32
    engine.eval()
    engine(torch.ones(2, 2))
    assert engine.module.told[-1] is None and engine.curriculum_enabled_legacy() and engine.curriculum_params_legacy(
    )["min_difficulty"] == 8
    again = engine_of(Told(), config(0, curriculum_learning=section))
    again.load_data_state_dict(engine.data_state_dict())
    steps(again, 1)
    assert again.module.told == [32]


@on_ranks(2)
def test_old_section_with_a_function():
    section = {"enabled": True, "curriculum_type": "other", "min_difficulty": 1, "max_difficulty": 100, "schedule_type": "custom"}
    engine = engine_of(Told(), config(0, curriculum_learning=section))
    engine.set_custom_curriculum_learning_schedule({"other": lambda step: 10 * step})
    steps(engine, 2)
    assert engine.module.told == [None, None] and engine.curriculum_scheduler.get_current_difficulty() == 20
    with pytest.raises(AssertionError, match="no curriculum is enabled"):
        engine_of(Told(), config(0)).set_custom_curriculum_learning_schedule({})


def _lengths(batch):
    return torch.tensor([Numbers.length(index) for index in batch])


def curriculum_config(folder, workers=0):
    path = f"{folder}/length/length_index_to_"
    metric = {"index_to_sample_path": path + "sample", "index_to_metric_path": path + "metric", "difficulty_type": "value",
              "clustering_type": "schedule_based", **LINEAR}
    truncate = {"clustering_type": "single_cluster", **LINEAR, "schedule_type": "custom"}
    sampling = {
        "num_epochs": 5, "num_workers": workers, "curriculum_learning":
        {"enabled": True, "curriculum_metrics": {"length": metric, "cut": truncate}}
    }
    return {
        "data_efficiency": {"enabled": True, "seed": 3, "data_sampling": {"enabled": True, **sampling}}, "gradient_accumulation_steps": 2
    }


def _curriculum(folder, workers, state, batches):
    engine = loading_engine(Numbers(400), **curriculum_config(folder, workers))
    engine.set_custom_curriculum_learning_schedule({"cut": lambda step: 8 + step})
    found = []
    engine.set_data_post_process_func(lambda batch, position: found.append((batch.tolist(), position["current_difficulties"])) or batch)
    if state is not None:
        engine.load_data_state_dict(state)
    loader = iter(engine.training_dataloader)
    for _ in range(batches):
        next(loader)
    together = everyone([batch for batch, _ in found])
    return [sorted(sum(parts, [])) for parts in zip(*together)], [told for _, told in found], engine.data_state_dict()


@pytest.fixture
def analysed(tmp_path):
    DataAnalyzer(Numbers(400),
                 batch_size=32,
                 metric_names=["length"],
                 metric_functions=[_lengths],
                 metric_types=["single_value_per_sample"],
                 save_path=str(tmp_path),
                 collate_fn=list).run_map_reduce()
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_curriculum_of_data_efficiency(analysed, workers):
    """Each batch keeps to its difficulty, which grows every second micro-batch; what workers fetch ahead is not told early."""
    batches, told, state = run(_curriculum, 2, analysed, workers, None, 12)[0]
    expected = [min(32, 8 + (24 * step // 4) // 8 * 8) for step in range(1, 7) for _ in range(2)]
    assert [one["length"] for one in told] == expected and [one["cut"]
                                                            for one in told] == [8 + step for step in range(1, 7) for _ in range(2)]
    assert all(max(map(Numbers.length, batch)) <= difficulty for batch, difficulty in zip(batches, expected))
    assert state["data_sampler"]["consumed_samples"] == 48
    _, _, early = run(_curriculum, 2, analysed, workers, None, 5)[0]
    again, told_again, _ = run(_curriculum, 2, analysed, workers, early, 7)[0]
    assert again == batches[5:] and told_again == told[5:]


def _stream_refused(folder):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(8))

    with pytest.raises(ValueError, match="a stream"):
        loading_engine(Stream(), **curriculum_config(folder))


def test_a_stream_cannot_follow_a_curriculum(analysed):
    run(_stream_refused, 2, analysed)


def test_curriculum_goes_on_with_three_ranks(analysed):
    """The same samples in the same order, in other micro-batches: 4 a micro-batch on two ranks, 6 on three."""
    straight, _, _ = run(_curriculum, 2, analysed, 0, None, 4)[0]
    before, _, state = run(_curriculum, 2, analysed, 0, None, 3)[0]
    after, told, last = run(_curriculum, 3, analysed, 0, state, 4)[0]
    assert before == straight[:3]
    assert set(straight[3]) <= set(after[0])  # what was left of the step comes first
    assert all(max(map(Numbers.length, batch)) <= one["length"] for batch, one in zip(after, told))
    assert last["data_sampler"]["data_sampler"]["consumed_samples"] == 12 + 24


# ---- layers that drop tokens


class Tokens(nn.Module):
    """forward(x) over (batch, seq, width) is the loss."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(tiny(seed=5).layers)
        self.head = nn.Linear(9, 1)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.head(x).square().mean()


def drop_config(stage, first, last, **more):
    section = {"enabled": True, "total_layer_num": 4, "random_ltd_layer_num": 2, "random_ltd_layer_id": [1, 2], "model_type": "decoder",
               "random_ltd_schedule": {"min_value": first, "max_value": last, "schedule_type": "fixed_linear",
                                       "schedule_config": {"require_steps": 4, "seq_per_step": 4}}}
    return config(stage, data_efficiency={"data_routing": {"enabled": True, "random_ltd": section}}, **more)


def _train_tokens(cfg, convert, checkpointed=False, steps=5):
    torch.manual_seed(1)
    model = Tokens(checkpointed)
    if convert == "model":
        convert_to_random_ltd(model, Layer)
    engine = engine_of(model, cfg)
    if convert == "engine":
        assert convert_to_random_ltd(engine, Layer) is engine
    torch.manual_seed(10 + dist.get_rank())
    losses, kept = [], []
    for _ in range(steps):
        loss = engine(torch.randn(2, 16, 9))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if engine.random_ltd_scheduler is not None:
            kept.append(engine.random_ltd_scheduler.get_current_seq())
    weights = {name.replace("random_ltd_layer.", ""): value for name, value in whole(engine.module).items()}
    return engine, losses, kept, weights


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("convert", ["model", "engine"])
def test_nothing_dropped_is_the_plain_model(stage, convert):
    _, losses, _, weights = _train_tokens(config(stage), None)
    _, found, kept, found_weights = _train_tokens(drop_config(stage, 16, 16), convert)
    assert kept == [16] * 5 and found == losses
    assert_same(found_weights, weights)


@on_ranks(2)
def test_dropping_is_the_same_at_every_stage_and_recomputed():
    """The same tokens are drawn, so the same bits come out."""
    _, losses, kept, weights = _train_tokens(drop_config(0, 8, 16), "engine")
    assert kept == [8, 8, 12, 12, 16]
    assert losses != _train_tokens(config(0), None)[1]
    for stage, convert, checkpointed in ((1, "engine", False), (2, "model", False), (3, "model", False), (3, "engine", True), (3, "model",
                                                                                                                               True)):
        engine, found, _, found_weights = _train_tokens(drop_config(stage, 8, 16), convert, checkpointed)
        assert found == losses, (stage, convert, checkpointed)
        assert_same(found_weights, weights)
        state = save_without_random_ltd(engine)
        if dist.get_rank() == 0:
            assert_same({name: value for name, value in state.items()}, weights)


@on_ranks(2)
def test_token_drop_resumes_and_complains():
    engine, _, kept, _ = _train_tokens(drop_config(1, 8, 16), "engine", steps=3)
    state = engine.data_state_dict()
    assert kept[-1] == 12 and list(state) == ["random_ltd"]
    again = engine_of(Tokens(), drop_config(1, 8, 16))
    again.load_data_state_dict(state)
    assert again.random_ltd_scheduler.state_dict() == engine.random_ltd_scheduler.state_dict()
    with pytest.raises(ValueError, match="the model has 5 layers of this class.*total_layer_num is 4"):
        convert_to_random_ltd(again, nn.Linear)
    with pytest.raises(ValueError, match="random_ltd.enabled is false"):
        convert_to_random_ltd(engine_of(Tokens(), config(0)), Layer)
