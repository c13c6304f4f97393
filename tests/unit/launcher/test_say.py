# SPDX-License-Identifier: Apache-2.0
"""A terminal that is slow, or that nobody reads."""

import os
import threading
import time
from types import SimpleNamespace

import pytest

from deepspeed.launcher import say
from deepspeed.launcher.say import Terminal, Voice


@pytest.fixture
def pipe(monkeypatch):
    """A stderr that is a pipe: its other end."""
    read_end, write_end = os.pipe()
    monkeypatch.setattr(say, "sys", SimpleNamespace(stderr=SimpleNamespace(fileno=lambda: write_end, flush=lambda: None)))
    yield read_end
    os.close(read_end)
    os.close(write_end)


def read(fd, count):
    data = b""
    while len(data) < count:
        data += os.read(fd, count - len(data))
    return data


def test_all_words_come_in_their_order(pipe):
    terminal = Terminal()
    terminal.start()
    pieces = [b"%d " % number * 300 for number in range(300)]
    for number, piece in enumerate(pieces):
        terminal.write(piece, number % 3 or None)
    assert read(pipe, sum(map(len, pieces))) == b"".join(pieces)
    terminal.stop()
    assert terminal.waiting(1) == 0


def test_nobody_reads(pipe):
    terminal = Terminal()
    terminal.start()
    terminal.write(b"x" * 300_000, "rank 0")
    terminal.write(b"the cause\n")
    assert terminal.waiting("rank 0") == 300_000
    begun = time.monotonic()
    terminal.stop(patience_s=0.1)
    terminal.write(b"dropped")
    assert time.monotonic() - begun < 5
    assert read(pipe, 1 << 16) == b"x" * (1 << 16)  # what the pipe holds; the thread may write what it was at
    terminal._thread.join(5)
    assert not terminal._thread.is_alive()


def test_the_launchers_words_go_before_those_of_the_ranks_in_the_end(pipe):
    terminal, got = Terminal(), bytearray()
    terminal.start()
    terminal.write(b"x" * 10_000_000, "rank 0")
    terminal.write(b"the cause\n")
    def slowly():
        while b"left out" not in got:
            time.sleep(0.005)
            got.extend(os.read(pipe, 4096))
    reader = threading.Thread(target=slowly)
    reader.start()
    terminal.stop(patience_s=0.5)
    reader.join(5)
    assert len(got) < 10_000_000 and b"xthe cause\n[deepspeed] 10000000 bytes of the ranks' output are left out" in got


def test_without_a_stderr(monkeypatch):
    monkeypatch.setattr(say, "sys", SimpleNamespace(stderr=None))
    terminal = Terminal()
    terminal.start()
    terminal.write(b"x")
    terminal.stop()
    Voice()("error", "nobody hears it")
