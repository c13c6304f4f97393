# SPDX-License-Identifier: Apache-2.0
"""Transports on several ranks: shared memory against Gloo bit for bit, delays, deaths, fallback."""
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist

from deepspeed._native import lib
from tests.parity.launch import RankFailure, on_ranks, run

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool]


def make(choice="auto", group=None, **options):
    return lib().make_transport((group or dist.group.WORLD).group_name, "cpu", choice, **options)


def data(rank, numel, dtype, version=0):
    generator = torch.Generator().manual_seed(1000 * version + rank)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (numel,), generator=generator).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def sum_in_rank_order(dtype, out):
    def sink(srcs):
        parts = [s.view(dtype) for s in srcs]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        out.append(total)
    return sink


def gathered(transport, numel, dtype, version=0):
    """All ranks' data, by a gather with an offset and a stride, and by pieces."""
    size = dtype.itemsize
    buffer = transport.allocate((8 + 2 * numel) * size * transport.size)
    mine = buffer.tensor().view(dtype)
    stride = (numel + 3) * size
    begin = 4 + transport.rank * (numel + 3)
    mine[begin:begin + numel] = data(transport.rank, numel, dtype, version)
    buffer.publish()
    out = torch.empty(numel * transport.size, dtype=dtype)
    transport.all_gather(out, buffer, 4 * size, stride, numel * size, phase="gather").wait()
    split = [torch.empty(numel // 2, dtype=dtype) for _ in range(transport.size)]
    transport.all_gather_pieces([(t, r, (numel - numel // 2) * size) for r, t in enumerate(split)], buffer, 4 * size, stride,
                                numel * size, phase="pieces").wait()
    for r, t in enumerate(split):
        assert torch.equal(bits(t), bits(out[(r + 1) * numel - numel // 2:(r + 1) * numel]))
    transport.barrier()
    return out


def reduced(transport, numel, dtype, version=0):
    buffer = transport.allocate(numel * transport.size * dtype.itemsize + 64)
    offset = 64 * (transport.rank % 2)  # offsets may differ among ranks
    mine = buffer.tensor()[offset:offset + numel * transport.size * dtype.itemsize].view(dtype)
    mine.copy_(data(transport.rank, numel * transport.size, dtype, version))
    out = []
    work = transport.reduce_scatter(buffer, offset, numel * dtype.itemsize, 0, dtype, sum_in_rank_order(dtype, out), phase="reduce")
    work.wait_drained()
    return out[0]


def check_every_dtype():
    shm, gloo = make("shm"), make("c10d")
    assert (shm.name, gloo.name) == ("shm", "gloo")
    assert gloo.needs_matching_order and not shm.needs_matching_order
    for dtype in DTYPES:
        for numel in (0, 1, 7, 4097):
            results = [gathered(t, numel, dtype) for t in (shm, gloo)]
            expected = torch.cat([data(r, numel, dtype) for r in range(dist.get_world_size())])
            for result in results:
                assert torch.equal(bits(result), bits(expected)), (dtype, numel)
            if dtype == torch.bool:
                continue
            results = [reduced(t, numel, dtype) for t in (shm, gloo)]
            assert torch.equal(bits(results[0]), bits(results[1])), (dtype, numel)
            begin = dist.get_rank() * numel
            expected = data(0, numel * shm.size, dtype)[begin:begin + numel].clone()
            for r in range(1, shm.size):
                expected += data(r, numel * shm.size, dtype)[begin:begin + numel]
            assert torch.equal(bits(results[0]), bits(expected)), (dtype, numel)
    for phase in ("gather", "pieces", "reduce"):
        assert shm.count(phase) == gloo.count(phase)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_shared_memory_and_gloo_give_the_same_bits_for_every_dtype(ranks):
    run(check_every_dtype, ranks)


def check_small():
    shm, gloo = make("shm"), make("c10d")
    rank, size = shm.rank, shm.size
    for n in (1, 2, 64, 65, 40001):
        values = data(rank, n, torch.float64).tolist()
        for op in ("sum", "max", "min"):
            assert shm.all_reduce(values, op) == gloo.all_reduce(values, op), (n, op)
    nan = [float("nan") if rank == size - 1 else 1.0]
    for transport in (shm, gloo):
        assert transport.all_reduce(nan, "max")[0] != transport.all_reduce(nan, "max")[0]
        assert transport.all_gather_host(bytes([rank] * 3)) == [bytes([r] * 3) for r in range(size)]
        for n in (0, 1, 700_001):
            sent = data(rank, n, torch.bfloat16)
            transport.broadcast(sent, size - 1)
            assert torch.equal(bits(sent), bits(data(size - 1, n, torch.bfloat16)))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_small_collectives_agree(ranks):
    run(check_small, ranks)


def training_like(choice, delays, steps=6):
    """Buckets on three channels, gathers in place, a norm: the shape of a step. Returns everything that was computed."""
    transport = make(choice, max_channels=3)
    rank, size = transport.rank, transport.size
    wait = random.Random(rank if delays else None)
    numel = 1013
    params = transport.allocate(numel * size * 4)
    buckets = [transport.allocate(numel * size * 4) for _ in range(4)]
    flat = params.tensor().view(torch.float32)
    part = slice(rank * numel, (rank + 1) * numel)
    trace = []
    for step in range(steps):
        flat[part] = data(rank, numel, torch.float32, step)
        params.publish()
        gather = transport.all_gather(params.tensor(), params, 0, numel * 4, numel * 4, phase="param", step=step)
        if delays:
            time.sleep(wait.random() * 0.004)
        gather.wait()
        trace.append(flat.clone())
        works, sums = [], {}
        for i in range(10):
            if i >= 4:
                works[i - 4].wait_drained()
            if delays:
                time.sleep(wait.random() * 0.002)
            values = buckets[i % 4].tensor().view(torch.float32)
            values.copy_(flat * (0.1 + i + rank / 3))
            out = sums[i] = []
            works.append(transport.reduce_scatter(buckets[i % 4], 0, numel * 4, i % 3, torch.float32,
                                                  sum_in_rank_order(torch.float32, out), phase="grad", step=step, unit=i))
        for work in reversed(works):
            work.wait()
        trace.extend(sums[i][0] for i in range(10))
        norm = sum(float((sums[i][0].double() ** 2).sum()) for i in range(10))
        trace.append(torch.tensor(transport.all_reduce([norm], phase="norm", step=step)))
        for work in works:
            work.wait_drained()
    assert transport.count("grad")[0] == 10 * steps and transport.count("param")[0] == steps
    return trace


def check_delays():
    plain = training_like("shm", False)
    for choice, delays in (("shm", True), ("c10d", False), ("c10d", True)):
        other = training_like(choice, delays)
        assert len(plain) == len(other)
        for a, b in zip(plain, other):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (choice, delays)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_delays_change_no_bit(ranks):
    run(check_delays, ranks, timeout=100)


def check_groups():
    world = make()
    rank = dist.get_rank()
    pair = dist.new_group([0, 1], use_local_synchronization=False)
    other = dist.new_group([2], use_local_synchronization=False)
    inner = make(group=pair if rank < 2 else other)
    again = make()
    assert len({world.id, inner.id, again.id}) == 3
    assert inner.name == ("shm" if rank < 2 else "local")
    assert world.all_reduce([1.0]) == [3.0]
    assert inner.all_reduce([1.0]) == ([2.0] if rank < 2 else [1.0])
    assert again.all_gather_host(bytes([world.id])) == [bytes([world.id])] * 3
    del world
    assert again.all_reduce([rank]) == [3.0]


def test_groups_and_transports_coexist():
    run(check_groups, 3)


def check_fallback(who, socket_too):
    denied = dist.get_rank() in who
    transport = make("auto", deny_proc=denied, deny_sockets=denied and socket_too)
    assert transport.name == ("gloo" if socket_too and who else "shm")
    assert torch.equal(gathered(transport, 33, torch.float32), torch.cat([data(r, 33, torch.float32) for r in range(transport.size)]))
    if socket_too and who:
        with pytest.raises(RuntimeError, match="shared memory was asked for, but .* denied by option"):
            make("shm", deny_proc=denied, deny_sockets=denied)


@pytest.mark.parametrize("who", [(), (0,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("socket_too", [False, True])
def test_all_ranks_fall_back_together(who, socket_too):
    run(check_fallback, 3, who, socket_too)


def check_disagreement():
    with pytest.raises(ValueError, match="asks for choice"):
        make("auto" if dist.get_rank() == 0 else "c10d")
    dist.barrier()


def test_ranks_that_ask_for_different_carriers_are_told():
    run(check_disagreement, 2)


def die_while_others_wait(choice, what, report):
    transport = make(choice)
    rank = dist.get_rank()
    buffer = transport.allocate(64 * 3)
    transport.barrier()
    if rank == 1:
        time.sleep(0.5)
        with open(f"{report}.{rank}", "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if choice == "shm":
        buffer.publish()
    try:
        if what == "gather":
            transport.all_gather(torch.empty(64 * 3, dtype=torch.uint8), buffer, 0, 0, 64, phase="param", step=4, unit=2).wait()
        elif what == "reduce":
            transport.reduce_scatter(buffer, 0, 64, 0, torch.float32, print, phase="param", step=4, unit=2).wait_drained()
        else:
            transport.all_reduce([1.0], phase="param", step=4, unit=2)
        text = "no error"
    except RuntimeError as error:
        text = str(error)
    with open(f"{report}.{rank}", "w") as file:
        file.write(f"{time.time()}\n{text}")


@pytest.mark.parametrize("what", ["gather", "reduce", "small"])
@pytest.mark.parametrize("choice", ["shm", "c10d"])
def test_a_killed_rank_is_named_by_the_waiters_within_two_seconds(choice, what, tmp_path):
    report = str(tmp_path / "report")
    with pytest.raises(RankFailure, match="SIGKILL"):
        run(die_while_others_wait, 3, choice, what, report, timeout=30)
    died = float((tmp_path / "report.1").read_text())
    for rank in (0, 2):
        noticed, text = (tmp_path / f"report.{rank}").read_text().split("\n", 1)
        assert float(noticed) - died < 2
        assert "rank 1 (pid " in text, text
        assert "step 4, phase param, unit 2" in text


def check_stall():
    lines = []
    lib().set_stall_handler(lines.append)
    try:
        for choice in ("shm", "c10d"):
            transport = make(choice, warn_s=0.2)
            lines.clear()
            if transport.rank == 1:
                time.sleep(0.6)
            transport.barrier(phase="late", step=7)
            if transport.rank == 0:
                assert lines and "step 7, phase late" in lines[0], (choice, lines)
                if choice == "shm":
                    assert "missing 1" in lines[0]
    finally:
        lib().set_stall_handler(None)


def test_a_stall_is_reported_to_the_handler():
    run(check_stall, 2)


def check_del():
    for choice in ("shm", "c10d"):
        transport = make(choice)
        buffer = transport.allocate(1 << 20)
        view = buffer.tensor()
        if transport.rank == 0:
            work = transport.reduce_scatter(buffer, 0, 4, 0, torch.float32, print)  # never matched
            del work
        del transport, buffer
        view.fill_(1)  # still mine
        del view
        if choice == "c10d":
            break
    # A left-over Gloo operation would spoil the group for the next test: end here, with the process.


def test_transports_can_be_dropped_at_any_time():
    run(check_del, 2, fresh=True)


def check_last_owner():
    for _ in range(30):
        group = dist.new_group([0, 1])
        transport = make("c10d", group)
        dist.barrier(group)
        dist.destroy_process_group(group)
        del group
        del transport  # now the last owner of the group, whose threads want the GIL while they end


def test_a_transport_may_be_the_last_owner_of_its_group():
    run(check_last_owner, 2)


@on_ranks(2)
def test_ctrl_c_ends_a_blocked_wait():
    transport = make("shm")
    if dist.get_rank() == 0:
        def handler(signum, frame):
            raise TimeoutError("alarm")
        old = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(TimeoutError, match="alarm"):
                transport.barrier()
        finally:
            signal.signal(signal.SIGALRM, old)
    dist.barrier()
    if dist.get_rank() == 1:
        transport.barrier()  # rank 0 had arrived at this one
        with pytest.raises(RuntimeError, match="rank 0 .* gave up"):
            transport.barrier()
    dist.barrier()
