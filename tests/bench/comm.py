# SPDX-License-Identifier: Apache-2.0
"""Collectives between the ranks of one host: shared memory and Gloo through our transport, torch's all_reduce beside it.

    python tests/bench/comm.py [--ranks 2] [--seconds 1.0] [--pin] [--sizes 4096,1048576,33554432]

For each message size (the bucket, before it is scattered): reduce_scatter (the sink adds the contributions into a vector that
stays in cache as it does in training: fp32, torch's add) followed by all_gather of the sum, what a stage-2 step does to a
bucket; each half alone; torch.distributed.all_reduce over Gloo, which moves the same bytes. GB/s is bucket bytes over time.
The ceiling is what plain memory operations of the same amount take in the same processes at the same time, all ranks at
once: one add of size/ranks elements a contribution, one memcpy of (ranks-1)/ranks of the bucket. Nothing is timed that has not
given the right bits first.
"""
import argparse
import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

MEMMOVE = ctypes.CDLL(None).memmove
MEMMOVE.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
MEMMOVE.restype = ctypes.c_void_p


class Case:
    """One bucket of `bytes` on one transport: reduced, then gathered back in place."""

    def __init__(self, transport, n_bytes):
        import torch

        self.t = transport
        self.part = n_bytes // transport.size
        self.bucket = transport.allocate(n_bytes)
        self.result = transport.allocate(n_bytes)
        mine = slice(self.part * transport.rank, self.part * (transport.rank + 1))
        self.sum = self.result.tensor()[mine].view(torch.float32)
        self.values = self.bucket.tensor().view(torch.float32)
        self.all = self.result.tensor()
        self.torch = torch

    def sink(self, srcs):
        parts = [s.view(self.torch.float32) for s in srcs]
        self.torch.add(parts[0], parts[1], out=self.sum)
        for part in parts[2:]:
            self.sum += part

    def reduce_scatter(self):
        self.t.reduce_scatter(self.bucket, 0, self.part, 0, self.torch.float32, self.sink).wait_drained()

    def all_gather(self):
        self.result.publish()
        self.t.all_gather(self.all, self.result, 0, self.part, self.part).wait()

    def both(self):
        self.reduce_scatter()
        self.all_gather()
        self.t.barrier()  # the next round overwrites what the others gather: a step has its norm here

    def check(self):
        torch, rank = self.torch, self.t.rank
        base = torch.arange(self.values.numel(), dtype=torch.float32) % 1001
        self.values.copy_(base * (0.1 + rank))
        self.both()
        expected = base * 0.1
        for r in range(1, self.t.size):
            expected = expected + base * (0.1 + r)
        if not torch.equal(self.all.view(torch.float32), expected):
            raise SystemExit(f"{self.t.name}: wrong sum, not timed")


BATCH = 10


def best_time(action, seconds, dist, torch):
    """Seconds per action in the best batch of ten, the slowest rank's. A batch evens out who arrives first; the best one is
    the one that other programs on the machine disturbed least."""
    for _ in range(3):
        action()
    best = float("inf")
    go_on = torch.ones(1)
    end = time.perf_counter() + seconds
    while go_on.item():
        dist.barrier()
        start = time.perf_counter()
        for _ in range(BATCH):
            action()
        best = min(best, (time.perf_counter() - start) / BATCH)
        go_on.fill_(float(time.perf_counter() < end))
        dist.broadcast(go_on, 0)
    result = torch.tensor(best)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result.item()


def gather_rounds(case):
    """A gather must not meet the next round's publish."""
    def action():
        case.all_gather()
        case.t.barrier()
    return action


def ceiling(n_bytes, size, torch):
    part = n_bytes // size
    source = torch.ones(n_bytes, dtype=torch.uint8)
    target = torch.empty(n_bytes, dtype=torch.uint8)
    parts = [source[r * part:(r + 1) * part].view(torch.float32) for r in range(size)]
    total = target[:part].view(torch.float32)

    def add():
        torch.add(parts[0], parts[1], out=total)
        for p in parts[2:]:
            total.add_(p)

    def copy():
        MEMMOVE(target.data_ptr(), source.data_ptr(), n_bytes - part)

    def both():
        add()
        copy()
    return add, copy, both


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--sizes", default="4096,1048576,33554432")
    parser.add_argument("--pin", action="store_true", help="rank r on core r: without it, what else runs here moves the ranks about")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks), __file__,
                   *sys.argv[1:]]
        os.execvpe(sys.executable, command, dict(os.environ, OMP_NUM_THREADS="1"))

    import torch
    import torch.distributed as dist

    from deepspeed._native import lib

    torch.set_num_threads(1)
    if arguments.pin:
        os.sched_setaffinity(0, {int(os.environ["LOCAL_RANK"]) % os.cpu_count()})
    dist.init_process_group("gloo")
    name = dist.group.WORLD.group_name
    transports = [lib().make_transport(name, "cpu", choice) for choice in ("shm", "c10d")]
    size = dist.get_world_size()
    if dist.get_rank() == 0:
        print(f"{size} ranks, one thread each, {os.cpu_count()} cores; fp32; best mean of {BATCH} on the slowest rank")
        print(f"{'bytes':>10} {'what':<26} {'rs us':>10} {'ag us':>10} {'rs+ag us':>10} {'GB/s':>8} {'of ceiling':>10}")

    def line(what, n_bytes, rs, ag, both, top):
        if dist.get_rank() == 0:
            cell = lambda t: f"{t * 1e6:10.1f}" if t else " " * 10
            print(f"{n_bytes:>10} {what:<26} {cell(rs)} {cell(ag)} {cell(both)} {n_bytes / both / 1e9:8.2f} {top / both:10.0%}", flush=True)

    for n_bytes in map(int, arguments.sizes.split(",")):
        n_bytes -= n_bytes % (4 * size)
        timed = lambda action: best_time(action, arguments.seconds, dist, torch)
        add, copy, both = map(timed, ceiling(n_bytes, size, torch))
        line("memory: add, memcpy", n_bytes, add, copy, both, both)
        for transport in transports:
            case = Case(transport, n_bytes)
            case.check()
            line(f"ours over {transport.name}", n_bytes, timed(case.reduce_scatter), timed(gather_rounds(case)), timed(case.both), both)
        tensor = torch.ones(n_bytes // 4)
        dist.all_reduce(tensor)
        if not torch.equal(tensor, torch.full_like(tensor, size)):
            raise SystemExit("gloo all_reduce: wrong sum, not timed")
        tensor.zero_()
        line("torch gloo all_reduce", n_bytes, None, None, timed(lambda: dist.all_reduce(tensor)), both)
    dist.barrier()
    del transports
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
