# SPDX-License-Identifier: Apache-2.0
"""Sequential writes and reads of one file: this library's file engine, fio (the ceiling) and DeepSpeed's aio_handle, in turn on
the same blocks of the same file, with large blocks past the page cache; then reads and writes mixed at random, ours and fio.

    python tests/bench/aio.py --folder /mnt/nvme --size 1G --rounds 7 --peer-python peer/bin/python --out aio.json
"""
import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepspeed._native import core
from deepspeed.nvme.show import parse_size, size, table

BUFFER = 2**30   # a larger file is moved in pieces of this size, one after the other
DEFAULTS = {"block_size": 2**20, "queue_depth": 128, "single_submit": False, "overlap_events": False, "intra_op_parallelism": 1}  # of aio_handle
CEILING = {"ours": "fio", "fio": "fio"}  # of the same depth


class Ours:
    def __init__(self, path, total, **options):
        self.path, self.total = path, total
        self.handle = core().FileHandle(**options)
        self.memory = self.handle.new_buffer(min(total, BUFFER))
        ctypes.memset(self.memory.address, 1, self.memory.bytes)

    def sequential(self, is_write):
        begin = time.perf_counter()
        for offset in range(0, self.total, self.memory.bytes):
            self.handle.run(self.path, is_write, self.memory.address, self.memory.bytes, offset, False)
        return self.total / (time.perf_counter() - begin)

    def mixed(self, block):
        """Half of the blocks, drawn at random, are written, the others read; all are under way at once as far as the queue allows."""
        starts = list(range(0, min(self.total, BUFFER), block))
        random.Random(1).shuffle(starts)
        begin = time.perf_counter()
        for i, offset in enumerate(starts):
            self.handle.start(self.path, i % 2 == 0, self.memory.address + offset, block, offset, False, self.memory)
        self.handle.wait()
        return len(starts) * block / (time.perf_counter() - begin)


class Fio:
    """Several passes in one run, since its first hundred milliseconds are slow."""

    def __init__(self, path, total, block, depth, memory):
        self.base = ["fio", "--name=ceiling", f"--filename={path}", f"--bs={block}", f"--iodepth={depth}", "--ioengine=io_uring", "--direct=1",
                     "--fixedbufs=1", "--registerfiles=1", "--scramble_buffers=0", f"--iomem={memory}",
                     f"--loops={max(1, 2 * BUFFER // total)}", "--output-format=json"]
        self.total = total

    def _run(self, *flags):
        job = json.loads(subprocess.run([*self.base, *flags], check=True, capture_output=True, text=True).stdout)["jobs"][0]
        return (job["read"]["io_bytes"] + job["write"]["io_bytes"]) / (max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3)

    def sequential(self, is_write):
        return self._run("--rw=" + ("write" if is_write else "read"), f"--size={self.total}")

    def mixed(self, block):
        return self._run("--rw=randrw", "--rwmixread=50", f"--size={min(self.total, BUFFER)}")


PEER = """
import json, sys, time, torch
from deepspeed.ops.op_builder import AsyncIOBuilder
path, total, piece = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
handle = AsyncIOBuilder().load().aio_handle(**json.loads(sys.argv[4]))
memory = handle.new_cpu_locked_tensor(piece, torch.empty(0, dtype=torch.uint8))
memory.fill_(1)
print("ready", flush=True)
for line in sys.stdin:
    move = handle.sync_pwrite if line.strip() == "True" else handle.sync_pread
    begin = time.perf_counter()
    for offset in range(0, total, piece):
        assert move(memory, path, offset) == 1
    print("speed", total / (time.perf_counter() - begin), flush=True)
"""


class Peer:
    """DeepSpeed 0.19.8 in its own interpreter, started once."""

    def __init__(self, python, path, total, **settings):
        environment = {**os.environ, "PATH": os.path.dirname(python) + ":" + os.environ["PATH"], "DS_ACCELERATOR": "cpu"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen([python, "-c", PEER, path, str(total), str(min(total, BUFFER)), json.dumps(settings)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        self._answer("ready")

    def _answer(self, word):
        for line in self.process.stdout:   # it prints other things, too
            if line.startswith(word):
                return line.split()[-1]
        raise RuntimeError("the peer ended")

    def sequential(self, is_write):
        self.process.stdin.write(f"{is_write}\n")
        self.process.stdin.flush()
        return float(self._answer("speed"))


def check(ours):
    """A benchmark of wrong bytes is none."""
    pattern = random.Random(2).randbytes(2**20)
    ctypes.memmove(ours.memory.address, pattern, len(pattern))
    ours.sequential(True)
    with open(ours.path, "rb") as file:
        assert file.read(len(pattern)) == pattern, "the file holds other bytes than were written"
    ctypes.memset(ours.memory.address, 0, len(pattern))
    ours.sequential(False)
    piece = (ctypes.c_char * len(pattern)).from_address(ours.memory.address)
    assert ours.total > BUFFER or bytes(piece) == pattern, "other bytes were read than the file holds"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--size", type=parse_size, default=2**30)
    parser.add_argument("--block", type=parse_size, default=2**20)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fio-memory", default="malloc", help="fio's --iomem; shmhuge, the like of our buffers, needs sysctl vm.nr_hugepages=100")
    parser.add_argument("--peer-python")
    parser.add_argument("--out")
    options = parser.parse_args()
    path = os.path.join(options.folder, "_bench_aio.bin")
    try:
        results = measure(options, path)
    finally:
        if os.path.exists(path):
            os.unlink(path)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1))


def measure(options, path):
    tuned = {**DEFAULTS, "block_size": options.block, "queue_depth": options.depth, "overlap_events": True}
    contenders = {"ours": Ours(path, options.size, **tuned), "ours, defaults": Ours(path, options.size, **DEFAULTS),
                  "fio": Fio(path, options.size, options.block, options.depth, options.fio_memory),
                  "fio, depth 128": Fio(path, options.size, DEFAULTS["block_size"], DEFAULTS["queue_depth"], options.fio_memory)}
    check(contenders["ours"])
    if options.peer_python:
        contenders["DeepSpeed, defaults"] = Peer(options.peer_python, path, options.size)
        # What its training uses when the section `aio` is left out.
        contenders["DeepSpeed, aio section"] = Peer(options.peer_python, path, options.size, queue_depth=8, overlap_events=True)
    results = {}
    for number in range(options.rounds + 1):   # the first does not count
        for name in sorted(contenders, key=lambda _: random.random()):
            contender = contenders[name]
            works = {"write": lambda: contender.sequential(True), "read": lambda: contender.sequential(False)}
            if hasattr(contender, "mixed"):
                works["mixed"] = lambda: contender.mixed(options.block)
            for work, run in works.items():
                speed = run()
                if number:
                    results.setdefault(work, {}).setdefault(name, []).append(speed)
    show(results, options)
    return {"size": options.size, "block": options.block, "depth": options.depth, "load": os.getloadavg(), "bytes_per_second": results}


def show(results, options):
    middle = {work: {name: statistics.median(speeds) for name, speeds in by_name.items()} for work, by_name in results.items()}
    peers = [f"/ {name}" for name in middle["write"] if name.startswith("DeepSpeed")]
    head, rows = ["", "GB/s median", "least", "most", "/ fio", *peers], []
    for work, by_name in middle.items():
        for name, speed in by_name.items():
            spread = results[work][name]
            ratios = [speed / by_name[CEILING.get(name, "fio, depth 128")],
                      *[speed / by_name[peer[2:]] for peer in peers if peer[2:] in by_name]]
            figures = [speed / 1e9, min(spread) / 1e9, max(spread) / 1e9, *ratios]
            rows.append([f"{work}, {name}", *[f"{figure:.2f}" for figure in figures], *["-"] * (len(head) - 1 - len(figures))])
    print(f"{size(options.size)}, blocks of {size(options.block)}, depth {options.depth}, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(table(head, rows))


if __name__ == "__main__":
    main()
