# SPDX-License-Identifier: Apache-2.0
"""No process groups here: a rank is a number, so the ranks of a job are simply several loaders."""

import gc
import time

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from deepspeed.data import DeepSpeedDataLoader, DeepSpeedDataSampler, RepeatingLoader, ResumableDistributedSampler


class Numbers(torch.utils.data.Dataset):
    """Sample i is i; notes what has been loaded."""

    def __init__(self, numel):
        self.numel = numel
        self.loaded = []

    def __len__(self):
        return self.numel

    def __getitem__(self, index):
        self.loaded.append(index)
        return index


def loader(numel=20, batch=3, world=2, rank=0, **options):
    return DeepSpeedDataLoader(Numbers(numel), batch, data_parallel_world_size=world, data_parallel_rank=rank, **options)


def take(iterator, count):
    return [next(iterator).tolist() for _ in range(count)]


def epoch_of(a_loader):
    return [batch.tolist() for batch in a_loader]


@pytest.mark.parametrize("numel", [1, 5, 20, 21])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_sampler_from_the_start_is_torchs(numel, world, drop_last, shuffle):
    if drop_last and numel < world:
        return  # torch computes a negative length
    data = range(numel)
    for rank in range(world):
        ours = ResumableDistributedSampler(data, world, rank, shuffle=shuffle, seed=3, drop_last=drop_last)
        torchs = DistributedSampler(data, world, rank, shuffle=shuffle, seed=3, drop_last=drop_last)
        for epoch in (0, 1):
            ours.set_epoch(epoch), torchs.set_epoch(epoch)
            assert list(ours) == list(torchs) and len(ours) == len(torchs)


def test_an_epoch_is_dealt_out_completely_and_orders_differ():
    loaders = [loader(rank=rank) for rank in range(2)]
    orders = []
    for _ in range(2):
        batches = [epoch_of(one) for one in loaders]
        assert [len(b) for b in batches[0]] == [3, 3, 3, 1] and len(loaders[0]) == 4
        orders.append(sum(batches[0] + batches[1], []))
        assert sorted(orders[-1]) == list(range(20))
    assert orders[0] != orders[1]


def test_drop_last():
    one = loader(numel=21, dataloader_drop_last=True)
    assert [len(b) for b in epoch_of(one)] == [3, 3, 3] and len(one) == 3


def test_collate_and_timer_and_post_processing():
    calls = []

    class Timer:
        def start(self):
            calls.append("start")

    one = loader(collate_fn=lambda samples: sum(samples), tput_timer=Timer(), shuffle=False)
    one.post_process_func = lambda batch, state: (batch, state["consumed_samples"])
    assert next(iter(one)) == (0 + 2 + 4, 6) and calls == ["start"]


@pytest.mark.parametrize("stop,workers", [(0, 0), (1, 0), (3, 0), (4, 0), (6, 0), (9, 0), (1, 2), (6, 2)])
def test_resumes_at_the_exact_sample(stop, workers):
    """With workers too: what they have fetched ahead does not count as consumed."""
    options = dict(num_local_io_workers=workers, seed=5)
    straight = take(iter(RepeatingLoader(loader(**options))), 12)

    first = RepeatingLoader(loader(**options))
    head = take(first, stop)
    state = first.state_dict()
    second = RepeatingLoader(loader(**options))
    second.load_state_dict(state)
    assert head + take(second, 12 - stop) == straight


def test_what_was_consumed_is_not_loaded_again():
    first = loader()
    take(iter(first), 2)
    second = loader()
    second.load_state_dict(first.state_dict())
    take(iter(second), 1)
    assert len(second.dataset.loaded) == 3


@pytest.mark.parametrize("world,batch", [(1, 3), (2, 1), (3, 2), (4, 5)])
def test_resumes_on_other_ranks_and_batches(world, batch):
    """4 ranks x 3 samples, stopped after 2 batches: the rest of the epoch is seen once, by whoever is there."""
    numel = 60
    before = [loader(numel, 3, 4, rank) for rank in range(4)]
    seen = sum((sum(take(iter(one), 2), []) for one in before), [])
    states = [one.state_dict() for one in before]
    assert all(state == states[0] for state in states) and states[0]["consumed_samples"] == 24

    after = [loader(numel, batch, world, rank) for rank in range(world)]
    for one in after:
        one.load_state_dict(states[0])
        seen += sum(epoch_of(one), [])
    assert sorted(seen) == list(range(numel))
    assert all(one.epoch == 1 and one.state_dict()["consumed_samples"] == 0 for one in after)


def test_saved_after_the_last_batch_continues_with_the_next_epoch():
    reference = RepeatingLoader(loader())
    take(reference, 4)
    first = loader()
    take(iter(first), 4)  # the end has not been noticed yet
    second = loader()
    second.load_state_dict(first.state_dict())
    assert epoch_of(second) == []
    assert epoch_of(second) == take(reference, 4)


def test_a_pass_left_in_the_middle_is_followed_by_a_new_epoch():
    one = loader()
    for _ in one:
        break
    assert one.epoch == 0
    old = iter(one)
    assert one.epoch == 1 and len(list(old)) == 4 and one.epoch == 2
    assert list(old) == []


def test_iterating_an_iterator_continues_it():
    one = loader()
    iterator = iter(one)
    head = next(iterator).tolist()
    assert [head] + [batch.tolist() for batch in iterator] == epoch_of(loader())


def test_next_on_the_loader_itself():
    one = loader()
    assert take(one, 4) == epoch_of(loader())
    with pytest.raises(StopIteration):
        next(one)
    assert next(one).tolist() == next(_second_epoch()).tolist()


def _second_epoch():
    one = loader()
    epoch_of(one)
    return one


def test_two_passes_at_once_are_refused():
    one = loader()
    first = iter(one)
    iter(one)
    with pytest.raises(RuntimeError, match="newer pass"):
        next(first)


def test_another_data_set_is_refused():
    with pytest.raises(ValueError, match="20 samples, this one has 19"):
        loader(19).load_state_dict(loader(20).state_dict())


@pytest.mark.parametrize("options,message", [(dict(batch=0), "batch_size"), (dict(batch=1.5), "batch_size"),
                                             (dict(rank=None), "data_parallel_rank")])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


def test_own_sampler_resumes_by_position():
    data = Numbers(10)
    make = lambda: DeepSpeedDataLoader(data, 2, data_sampler=SequentialSampler(data))
    first = make()
    assert take(iter(first), 2) == [[0, 1], [2, 3]]
    second = make()
    second.load_state_dict(first.state_dict())
    assert epoch_of(second) == [[4, 5], [6, 7], [8, 9]]


def test_iterable_data_set():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(7))

    one = DeepSpeedDataLoader(Stream(), 2)
    iterator = iter(one)
    assert take(iterator, 2) == [[0, 1], [2, 3]]
    second = DeepSpeedDataLoader(Stream(), 2)
    second.load_state_dict(one.state_dict())
    assert epoch_of(second) == [[4, 5], [6]]
    with pytest.raises(ValueError, match="data_sampler"):
        DeepSpeedDataLoader(Stream(), 2, data_sampler=[0])


def test_repeating_loader_over_any_loader():
    repeating = RepeatingLoader(DataLoader(range(4), batch_size=2))
    assert take(repeating, 5) == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]] and len(repeating) == 2
    with pytest.raises(ValueError, match="DataLoader is empty"):
        next(RepeatingLoader(DataLoader([], batch_size=2)))


def test_restoring_the_inner_loader_moves_the_repeating_one():
    first = loader()
    take(iter(first), 3)
    inner = loader()
    repeating = RepeatingLoader(inner)
    take(repeating, 1)
    inner.load_state_dict(first.state_dict())
    assert take(repeating, 1) == take(first, 1)


def test_the_seed_travels():
    first = loader(seed=11)
    take(iter(first), 2)
    assert first.state_dict()["seed"] == 11
    second = loader(seed=12)
    second.load_state_dict(first.state_dict())
    assert epoch_of(second) == take(RepeatingLoader(_resumed(first)), 2) and epoch_of(second) == _second_epoch_of(11)


def _resumed(first):
    again = loader(seed=first.state_dict()["seed"])
    again.load_state_dict(first.state_dict())
    return again


def _second_epoch_of(seed):
    one = loader(seed=seed)
    epoch_of(one)
    return epoch_of(one)


@pytest.mark.parametrize("numel", [19, 20, 22])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_uneven_lengths_resume_over_epochs(numel, drop_last, workers):
    """Stopped in the second epoch; ranks agree on the number of batches whatever the length."""
    options = dict(numel=numel, dataloader_drop_last=drop_last, num_local_io_workers=workers)
    per_epoch = len(loader(**options))
    for rank in range(2):
        straight = take(RepeatingLoader(loader(rank=rank, **options)), 3 * per_epoch)
        first = RepeatingLoader(loader(rank=rank, **options))
        take(first, per_epoch + 2)
        second = RepeatingLoader(loader(rank=rank, **options))
        second.load_state_dict(first.state_dict())
        assert take(second, 2 * per_epoch - 2) == straight[per_epoch + 2:]
    assert {len(loader(rank=rank, **options)) for rank in range(2)} == {per_epoch}


class Shard(IterableDataset):
    """Every world-th number from rank on: a stream that divides itself."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world

    def __iter__(self):
        return iter(range(self.rank, 24, self.world))


def stream(rank, world, batch):
    return DeepSpeedDataLoader(Shard(rank, world), batch, data_parallel_rank=rank, data_parallel_world_size=world)


def test_streams_count_and_skip_on_other_ranks():
    """12 samples consumed by 2 ranks x 2; 3 ranks x 2 skip two batches each, and nothing is lost or repeated."""
    before = [stream(rank, 2, 2) for rank in range(2)]
    seen = sum((sum(take(iter(one), 3), []) for one in before), [])
    state = before[0].state_dict()
    assert state == before[1].state_dict() and state["consumed_samples"] == 12
    for rank in range(3):
        one = stream(rank, 3, 2)
        one.load_state_dict(state)
        seen += sum(epoch_of(one), [])
    assert sorted(seen) == list(range(24))


def test_a_stream_that_cannot_stop_there_says_so(monkeypatch):
    said = []
    monkeypatch.setattr("deepspeed.data.loader.logger.warning", said.append)
    one = stream(0, 2, 2)
    take(iter(one), 2)
    other = stream(0, 3, 2)
    other.load_state_dict(one.state_dict())
    assert take(iter(other), 1) == [[6, 9]] and "the last 2 samples before it are read again" in said[0]


def test_a_curriculum_is_not_mixed_with_a_plain_order():
    plain = loader()
    sampler = DeepSpeedDataSampler({}, 20, 3, 0, 2)
    guided = loader(data_sampler=sampler)
    assert len(guided) == 20 * 1000 // 6
    for one, other in ((plain, guided), (guided, plain)):
        with pytest.raises(ValueError, match="follows a curriculum, the other does not"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_with_its_own_position(workers):
    """Worker processes ask for batches ahead; only those used count."""
    def make():
        return loader(num_local_io_workers=workers, data_sampler=DeepSpeedDataSampler({"seed": 5}, 20, 3, 0, 2))

    straight = take(iter(make()), 12)
    one = make()
    iterator = iter(one)
    assert take(iterator, 4) == straight[:4]
    state = one.state_dict()
    assert state["data_sampler"]["consumed_samples"] == state["consumed_samples"] == 24
    other = make()
    other.load_state_dict(state)
    assert take(iter(other), 4) == straight[4:8]
    assert take(iter(one), 8) == straight[4:]  # a new pass goes on where the old one was left


def test_workers_end_with_their_owner_at_once():
    """Even when the owner dies in the cycle collector, where torch would wait for each."""
    one = loader(num_local_io_workers=2)
    take(iter(one), 1)
    workers = list(one.dataloader._iterator._workers)
    one.itself = one
    del one
    began = time.monotonic()
    gc.collect()
    assert time.monotonic() - began < 4 and not any(worker.is_alive() for worker in workers)
