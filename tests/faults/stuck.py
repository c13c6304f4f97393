# SPDX-License-Identifier: Apache-2.0
"""Ranks that get stuck, each way in a function of its own, and what becomes of the job: real processes, forked from a server that
has imported torch."""
import os
import signal
import sys
import time
from types import SimpleNamespace

import torch

from tests.parity.launch import _context

SILENCE_S = 1.5


def _rank_main(rank, size, port, case, transport, log, folder, silence_s):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      DS_TRANSPORT=transport, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    code = 0
    try:
        CASES[case](folder, silence_s)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _free_port():
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(case, size, transport, tmp_path, silence_s=SILENCE_S, timeout_s=50):
    """(exit codes, outputs, seconds from the moment the first rank got stuck to the end of the last). Nobody survives it."""
    folder, port, context = tmp_path / "flight", _free_port(), _context()
    logs = [tmp_path / f"rank{r}.log" for r in range(size)]
    processes = [context.Process(target=_rank_main, args=(r, size, port, case.__name__, transport, str(logs[r]), str(folder), silence_s))
                 for r in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        ended_s = time.time()
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    outputs = [log.read_text() if log.exists() else "" for log in logs]
    stuck_s = [float(line.split()[1]) for text in outputs for line in text.splitlines() if line.startswith("STUCK ")]
    return codes, outputs, ended_s - min(stuck_s, default=ended_s)


# ------------------------------------------------------------------------------------------------------------ the cases
def _engine(folder, silence_s, stage=3):
    """An engine after one step; from here on the short silence holds (starting up may take longer than it on a busy machine)."""
    import deepspeed
    from deepspeed import comm as dist
    from deepspeed.comm import watch
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)])
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
              "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 300,
                                    "stage3_prefetch_bucket_size": 300}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    _step(engine)
    while watch._watch._rank0 is None:  # until everybody has said who it is and has heard who rank 0 is
        time.sleep(0.01)
    dist.barrier()
    watch.start(section=SimpleNamespace(enabled=True, silence_s=silence_s, flight_record=folder))
    return engine, dist.get_rank()


def _step(engine):
    loss = engine(torch.ones(2, 16)).square().mean()
    engine.backward(loss)
    engine.step()


def _stuck():
    print(f"STUCK {time.time()}", flush=True)


def sleeps_in_data_loader(folder, silence_s):
    engine, rank = _engine(folder, silence_s)
    for number in range(3):
        if rank == 1 and number == 1:
            _stuck()
            time.sleep(1000)  # the data never comes
        _step(engine)


def skips_a_backward(folder, silence_s):
    engine, rank = _engine(folder, silence_s)
    loss = engine(torch.ones(2, 16)).square().mean()
    _stuck()
    if rank != 1:
        engine.backward(loss)
    engine.step()


def another_order(folder, silence_s):
    from deepspeed import comm as dist
    _, rank = _engine(folder, silence_s)
    x = torch.ones(8)
    dist.all_reduce(x)
    _stuck()
    if rank == 1:
        dist.all_reduce(x)
    else:
        dist.barrier()


def stopped(folder, silence_s):
    engine, rank = _engine(folder, silence_s)
    if rank == 1:
        _stuck()
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(3):
        _step(engine)


def rank_0_stopped(folder, silence_s):
    engine, rank = _engine(folder, silence_s)
    if rank == 0:
        _stuck()
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(3):
        _step(engine)


def busy_loop(folder, silence_s):
    engine, rank = _engine(folder, silence_s)
    if rank == 1:
        _stuck()
        spin_for_ever()
    for _ in range(3):
        _step(engine)


def spin_for_ever():
    number = 0
    while True:
        number += 1


def plain_torch_collective(folder, silence_s):
    import torch.distributed as torch_dist
    _, rank = _engine(folder, silence_s)
    _stuck()
    if rank == 1:
        torch_dist.all_reduce(torch.ones(4))  # the others never come
    time.sleep(1000)


def slow_but_alive(folder, silence_s):
    engine, rank = _engine(folder, silence_s)
    for _ in range(2):
        if rank == 1:
            time.sleep(0.6 * silence_s)
        _step(engine)
    print("DONE")


def one_rank_raises(folder, silence_s):
    engine, rank = _engine(folder, 60.0)
    if rank == 1:
        _stuck()
        raise ValueError("the cause")
    _step(engine)


CASES = {case.__name__: case for case in (sleeps_in_data_loader, skips_a_backward, another_order, stopped, rank_0_stopped, busy_loop,
                                          plain_torch_collective, slow_but_alive, one_rank_raises)}
