# SPDX-License-Identifier: Apache-2.0
"""What passes through, what is held, and that no byte is lost, whatever the pieces it arrives in."""

import fcntl
import os

import pytest

from deepspeed.launcher import relay as relay_module
from deepspeed.launcher.relay import HEADER, Relay, last_line, without_store_warnings

TRACEBACK = HEADER + b"\n  File \"x.py\", line 1, in <module>\n    f()\nValueError: no\nsecond line\n"


@pytest.fixture
def terminal(monkeypatch):
    written = bytearray()
    monkeypatch.setattr(relay_module.terminal, "write", lambda data, source: written.extend(data))
    return written


@pytest.fixture
def pipe():
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    relay = Relay(read_end)
    yield relay, lambda data, now=0.0: (os.write(write_end, data), relay.read(now))
    relay.close()
    os.close(write_end)


def test_partial_lines_pass_at_once(terminal, pipe):
    relay, write = pipe
    write(b"\r 10%|#   ")
    assert terminal == b"\r 10%|#   " and relay.mid_line and not relay.holding


# As torch.distributed prints it.
RANKED = b"".join(b"[rank12]: " + line for line in TRACEBACK.splitlines(keepends=True))


@pytest.mark.parametrize("size", [1, 2, 7, 33, 34, 35, 1000])
@pytest.mark.parametrize("text", [TRACEBACK, RANKED])
def test_held_from_the_header_on_in_any_pieces(terminal, pipe, size, text):
    relay, write = pipe
    data = b"\r 50%|##" + text + b"after\n"
    for start in range(0, len(data), size):
        write(data[start:start + size], now=5.0)
    assert terminal == b"\r 50%|##" and relay.holding and relay.failed_at == 5.0
    assert relay.take_held() == text + b"after\n" and not relay.holding


def test_what_only_looks_like_a_header_passes(terminal, pipe):
    relay, write = pipe
    for piece in (b"[rank3]", b" [", b"rank]: Trace", b"back (most", b" recent) no\n", b"Traceback (most recent call last", b"ing)\n"):
        write(piece)
    assert terminal == b"[rank3] [rank]: Traceback (most recent) no\nTraceback (most recent call lasting)\n"


def test_release_gives_it_back_in_order(terminal, pipe):
    relay, write = pipe
    write(b"a\n" + TRACEBACK)
    relay.release()
    write(b"b\n")
    assert terminal == b"a\n" + TRACEBACK + b"b\n" and relay.failed_at is not None


def test_held_text_is_bounded(terminal, pipe, monkeypatch):
    monkeypatch.setattr(relay_module, "_MAX_HELD_BYTES", 1000)
    relay, write = pipe
    write(TRACEBACK)
    write(b"x" * 2000)
    assert not relay.holding and terminal == TRACEBACK + b"x" * 2000


def test_with_a_log_everything_goes_there(terminal, tmp_path):
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    relay = Relay(read_end, log)
    os.write(write_end, b"a\n" + TRACEBACK)
    os.close(write_end)
    relay.read_rest(0.0)
    assert relay.at_end and (tmp_path / "log").read_bytes() == b"a\n" + TRACEBACK
    assert terminal == b"" and relay.take_held() == TRACEBACK
    os.close(log)


def test_a_turn_of_the_loop_is_bounded(terminal, pipe):
    """A rank may write as fast as it is read from."""
    relay, write = pipe
    fcntl.fcntl(relay.fd, fcntl.F_SETPIPE_SZ, 1 << 18)
    write(b"x" * 200_000)
    assert 0 < len(terminal) <= 1 << 16
    relay.read_rest(0.0)
    assert len(terminal) == 200_000 and not relay.at_end


def test_a_prompt_is_not_kept_for_ever(terminal, pipe):
    relay, write = pipe
    write(b"press T")
    assert terminal == b"press "
    relay.settle()
    assert terminal == b"press T"


@pytest.mark.parametrize("text,expected", [
    (TRACEBACK, "ValueError: no"),
    (RANKED, "ValueError: no"),
    (TRACEBACK + b"\nDuring handling of the above exception, another exception occurred:\n\n" + HEADER +
     b"\n  File \"y\", line 2\nKeyError: 'k'\n", "KeyError: 'k'"),
    (b"", ""),
    (HEADER + b"\n  cut off", ""),
])  # yapf: disable
def test_last_line(text, expected):
    assert last_line(text) == expected


def test_what_torch_says_of_its_lost_store_is_left_out():
    cause = "[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: no such file\n"
    noise = ("[rank1]:[W1121 14:38:29.824397254 TCPStore.cpp:125] [c10d] recvValue failed on SocketImpl(fd=9): Failed to recv, got 0 bytes.\n"
             "Exception raised from recvBytes at /pytorch/torch/csrc/distributed/c10d/Utils.hpp:682 (most recent call first):\n"
             "frame #0: c10::Error::Error() + 0x9d (0x7fe7aeb7305d in libc10.so)\n<omitting python frames>\nframe #20: <unknown> + 0x1098ec\n\n")
    assert without_store_warnings(cause + noise + "more\n") == cause + "more\n"
    assert without_store_warnings(cause) == cause
