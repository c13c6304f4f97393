# SPDX-License-Identifier: Apache-2.0
"""Difficulties by step, and batches that keep to them."""
import json
import logging
from collections import Counter

import numpy as np
import pytest

from deepspeed.data import CurriculumScheduler, DeepSpeedDataSampler
from deepspeed.data.indexed_dataset import close_mmap_dataset_builder, create_mmap_dataset_builder
from deepspeed.data.metric_index import MetricIndex, shuffled
from deepspeed.telemetry import logger


def linear(first=8, last=64, steps=10, multiple=8, **more):
    return {"min_difficulty": first, "max_difficulty": last, "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": steps, "difficulty_step": multiple}, **more}


# ---- schedules


def test_linear():
    scheduler = CurriculumScheduler(linear())
    # 8 + 56 * step / 10, down to a multiple of 8
    assert [scheduler.update_difficulty(step) for step in range(1, 13)] == [8, 16, 24, 24, 32, 40, 40, 48, 56, 64, 64, 64]


def test_root():
    config = linear(steps=100, multiple=1, last=108)
    config.update(schedule_type="fixed_root", schedule_config={**config["schedule_config"], "root_degree": 2})
    scheduler = CurriculumScheduler(config)
    assert [scheduler.get_difficulty(step) for step in (1, 4, 25, 50, 81, 100, 1000)] == [18, 28, 58, 78, 98, 108, 108]


@pytest.mark.parametrize("first,multiple", [(8, 16), (9, 4), (3, 8)])
def test_never_below_the_start(first, multiple):
    found = [CurriculumScheduler(linear(first, 64, 50, multiple)).get_difficulty(step) for step in range(60)]
    assert min(found) >= first and found == sorted(found) and all(value % multiple == 0 for value in found)


def test_an_end_that_no_multiple_reaches_is_said_once():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        schedulers = [CurriculumScheduler(linear(7, 61, 50, 8)) for _ in range(2)] + [CurriculumScheduler(linear(7, 64, 50, 8))]
    finally:
        logger.removeHandler(handler)
    assert schedulers[0].get_difficulty(1000) == 56 and len(said) == 1
    assert "max_difficulty 61" in said[0] and "difficulty_step 8" in said[0] and "ends at 56" in said[0]


@pytest.mark.parametrize("name", ["total_curriculum_step", "difficulty_step", "root_degree"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(name, value):
    config = linear()
    config.update(schedule_type="fixed_root", schedule_config={**config["schedule_config"], "root_degree": 2, name: value})
    with pytest.raises(ValueError, match=f"schedule_config.{name}: found {value}; allowed: at least 1"):
        CurriculumScheduler(config)


def test_discrete():
    scheduler = CurriculumScheduler({"min_difficulty": 1, "max_difficulty": 9, "schedule_type": "fixed_discrete",
                                     "schedule_config": {"difficulty": [1, 5, 9], "max_step": [2, 4]}})
    assert [scheduler.update_difficulty(step) for step in range(1, 8)] == [1, 1, 5, 5, 9, 9, 9]


def test_custom():
    scheduler = CurriculumScheduler({"min_difficulty": 1, "max_difficulty": 9, "schedule_type": "custom"})
    with pytest.raises(RuntimeError, match="set_custom_curriculum_learning_schedule"):
        scheduler.update_difficulty(1)
    scheduler.set_custom_get_difficulty(lambda step: 2.0 * step)
    assert [scheduler.update_difficulty(step) for step in (1, 2)] == [2, 4] and isinstance(scheduler.get_current_difficulty(), int)


def test_resumes():
    first, second = CurriculumScheduler(linear()), CurriculumScheduler(linear())
    first.update_difficulty(7)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.get_current_difficulty() == first.get_current_difficulty() == 40


@pytest.mark.parametrize("change,message",
                         [({"min_difficulty": None}, "lacks min_difficulty"), ({"schedule_type": "x"}, "found 'x'"),
                          ({"schedule_config": {}}, "lacks total_curriculum_step, difficulty_step"),
                          ({"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1], "max_step": [1]}}, "one more")])
def test_bad_schedules(change, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        CurriculumScheduler({**linear(), **change})


# ---- shuffling without memory


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 64, 65, 1000])
def test_shuffled_is_a_permutation(numel):
    places = np.arange(numel)
    orders = [shuffled(places, numel, (1, 2, key)) for key in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == places.tolist()
    assert orders[0].tolist() == [shuffled(np.array([i]), numel, (1, 2, 0))[0] for i in range(numel)]
    if numel >= 64:
        assert len({tuple(order.tolist()) for order in orders}) == 4


def test_shuffled_is_even():
    """Where 0..6 go over 2100 keys: each place expects 300; chi-square with 6 degrees is below 30 with chance 0.99996."""
    counts = np.zeros((7, 7))
    for key in range(2100):
        counts[np.arange(7), shuffled(np.arange(7), 7, (key, ))] += 1
    assert ((counts - 300)**2 / 300).sum(1).max() < 30


# ---- batches


def write_index(folder, name, values):
    """Files as DataAnalyzer makes them."""
    values = np.asarray(values)
    for what, items in (("index_to_metric", [[v] for v in np.unique(values)]),
                        ("index_to_sample", [np.flatnonzero(values == v) for v in np.unique(values)])):
        builder = create_mmap_dataset_builder(f"{folder}/{name}_{what}", np.int64)
        builder.add_items(items)
        close_mmap_dataset_builder(builder, f"{folder}/{name}_{what}")
    return {"index_to_sample_path": f"{folder}/{name}_index_to_sample", "index_to_metric_path": f"{folder}/{name}_index_to_metric"}


VALUES = np.random.default_rng(0).integers(1, 65, 500)


@pytest.fixture
def metrics(tmp_path):
    return {
        "length": {**linear(), **write_index(tmp_path, "length", VALUES), "difficulty_type": "value", "clustering_type": "schedule_based"}
    }


def section(metrics, epochs=3):
    return {"seed": 7, "data_sampling": {"num_epochs": epochs, "curriculum_learning": {"enabled": True, "curriculum_metrics": metrics}}}


def sampler(metrics, rank=0, world=1, micro=4, gas=2, samples=500, epochs=3, **options):
    return DeepSpeedDataSampler(section(metrics, epochs), samples, micro, rank, world, None, gas, rank, **options)


def take(one, count):
    iterator = iter(one)
    return [next(iterator) for _ in range(count)]


def test_every_batch_keeps_to_its_difficulty(metrics):
    one = sampler(metrics)
    schedule = CurriculumScheduler(linear())
    iterator = iter(one)
    last = 0
    for step in range(1, 30):
        difficulty = schedule.update_difficulty(step)
        assert difficulty >= last
        last = difficulty
        for _ in range(2):  # accumulation
            batch = next(iterator)
            assert len(batch) == 4 and VALUES[batch].max() <= difficulty
            assert one.curriculum_step == step and one.current_difficulties == {"length": difficulty}
    assert last == 64 and VALUES[sum(take(one, 60), [])].max() > 56


def test_a_cluster_is_walked_through_before_it_repeats(metrics):
    metrics["length"].update(schedule_type="custom", min_difficulty=64)
    one = sampler(metrics, gas=1)
    one.set_custom_curriculum_learning_schedule({"length": lambda step: 64})
    batches = take(one, 250)
    assert sorted(sum(batches[:125], [])) == sorted(sum(batches[125:], [])) == list(range(500))
    assert batches[:125] != batches[125:]


def test_ranks_share_one_batch(metrics):
    alone = take(sampler(metrics, micro=6, gas=1), 40)
    parts = [take(sampler(metrics, rank, 3, micro=2, gas=1), 40) for rank in range(3)]
    assert [sum((parts[rank][i] for rank in range(3)), []) for i in range(40)] == alone


@pytest.mark.parametrize("stop", [0, 1, 7, 31])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_resumes_at_the_exact_sample(metrics, stop, world):
    """6 samples a micro-batch of all ranks, 12 a step; stopped on 2 ranks (within a step, too), continued on another number."""
    straight = take(sampler(metrics, micro=6), 40)
    before = [sampler(metrics, rank, 2, micro=3) for rank in range(2)]
    assert [sum(pair, []) for pair in zip(*(take(one, stop) for one in before))] == straight[:stop]
    states = [one.state_dict() for one in before]
    assert states[0] == states[1] and states[0]["consumed_samples"] == 6 * stop
    after = [sampler(metrics, rank, world, micro=6 // world) for rank in range(world)]
    for one in after:
        one.load_state_dict(json.loads(json.dumps(states[0])))
    rest = [take(one, 40 - stop) for one in after]
    assert [sum(part, []) for part in zip(*rest)] == straight[stop:]


def test_percentiles(tmp_path):
    metric = {
        **linear(10, 100, 10, 10), **write_index(tmp_path, "m", VALUES), "difficulty_type": "percentile", "clustering_type":
        "schedule_based"
    }
    one = sampler({"m": metric})
    order = np.argsort(VALUES, kind="stable")
    iterator = iter(one)
    for step in range(1, 15):
        allowed = set(order[:500 * min(10 * max(1, step), 100) // 100].tolist())
        assert set(next(iterator) + next(iterator)) <= allowed or one.current_difficulties["m"] > 10 * step
        assert set(one.batch) == set()


def test_two_measures_must_both_allow(tmp_path, metrics):
    other = np.random.default_rng(1).integers(1, 65, 500)
    metrics["rarity"] = {
        **linear(32, 64, 20), **write_index(tmp_path, "rarity", other), "difficulty_type": "value", "clustering_type": "schedule_based"
    }
    one = sampler(metrics)
    seen = Counter()
    for batch in take(one, 120):
        assert VALUES[batch].max() <= one.current_difficulties["length"] and other[batch].max() <= one.current_difficulties["rarity"]
        seen.update(batch)
    again = sampler(metrics)
    again.load_state_dict(one.state_dict())
    assert take(again, 3) == take(one, 3) and len(seen) > 300


def test_single_cluster_chooses_nothing(tmp_path):
    one = sampler({"truncate": {**linear(), "clustering_type": "single_cluster"}}, gas=1)
    assert sorted(sum(take(one, 125), [])) == list(range(500)) and one.current_difficulties == {"truncate": 64}


def test_a_custom_schedule_may_step_back(metrics):
    metrics["length"].update(schedule_type="custom")
    one = sampler(metrics, gas=1)
    one.set_custom_curriculum_learning_schedule({"length": lambda step: 40 if step < 5 else 10})
    for step, batch in enumerate(take(one, 10), 1):
        assert VALUES[batch].max() <= (40 if step < 5 else 10)


@pytest.mark.parametrize("drop_last,numel", [(True, 496), (False, 500)])
def test_epochs_end(metrics, drop_last, numel):
    batches = list(sampler(metrics, world=2, epochs=1, drop_last=drop_last))
    assert sum(map(len, batches)) == numel // 2 and len(sampler(metrics)) == 1500


def test_errors(tmp_path, metrics):
    with pytest.raises(ValueError, match="no sample is as easy as {'length': 0}"):
        metrics["length"].update(schedule_type="custom")
        low = sampler(metrics)
        low.set_custom_curriculum_learning_schedule({"length": lambda step: 0})
        next(iter(low))
    with pytest.raises(ValueError, match="no curriculum measure is called x"):
        low.set_custom_curriculum_learning_schedule({"x": None})
    with pytest.raises(ValueError, match="the data set has 10: analyse"):
        small = sampler(metrics, samples=10)
        small.set_custom_curriculum_learning_schedule({"length": lambda step: 64})
        take(small, 2)
    with pytest.raises(ValueError, match="index_to_sample_path: missing"):
        sampler({"m": linear()})
    with pytest.raises(ValueError, match="not written by this library"):
        low.load_state_dict({"batch": []})
    with pytest.raises(ValueError, match="data_parallel_rank: found 2"):
        sampler(metrics, rank=2, world=2)
    other = write_index(tmp_path, "other", VALUES[:20])
    with pytest.raises(ValueError, match="must come from the same analysis"):
        MetricIndex("m", metrics["length"]["index_to_sample_path"], other["index_to_metric_path"], True, 64)
