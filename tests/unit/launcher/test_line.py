# SPDX-License-Identifier: Apache-2.0
"""The line between the launching host and the others, and who is on it."""

import socket
import time

import pytest

from deepspeed.launcher import line as line_module
from deepspeed.launcher.head import Head, Listener
from deepspeed.launcher.line import STRANGER_BYTES, Line, Lost, connect, own_addresses
from deepspeed.launcher.say import Voice


@pytest.fixture
def ends(monkeypatch):
    monkeypatch.setenv("DS_HOST_TIMEOUT", "7")
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    pair = Line(here, "there"), Line(there, "here")
    yield pair
    for end in pair:
        end.close()


def received(end, count=1):
    stop, found = time.monotonic() + 5, []
    while len(found) < count and time.monotonic() < stop:
        found += end.receive(time.monotonic())
    return found


def test_messages_arrive_in_order_and_signs_of_life_are_no_messages(ends):
    here, there = ends
    here.send(alive=1)
    for number in range(3):
        here.send(signal=number)
    here.send(text="ä\n" * 100_000)
    messages = received(there, 4)
    assert messages[:3] == [{"signal": number} for number in range(3)] and messages[3]["text"].endswith("ä\n")


def test_a_closed_line_gives_its_last_message_first(ends):
    here, there = ends
    here.send(done=0)
    here.close()
    assert received(there) == [{"done": 0}]
    with pytest.raises(Lost, match="here closed the connection; its launcher was killed or has crashed"):
        received(there)
    assert there.lost


def test_silence(ends):
    here, there = ends
    now = time.monotonic()
    assert there.receive(now + 6) == []
    here.send(alive=1)
    time.sleep(0.05)
    assert there.receive(now + 6) == [] and there.receive(now + 12) == []
    with pytest.raises(Lost, match="no sign of life from here for 7 s; the network between the hosts is cut"):
        there.receive(now + 14)


def test_nonsense_is_no_message(ends):
    ends[0]._socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(Lost, match="speaks another language"):
        received(ends[1])


def test_a_stranger_may_not_say_much():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stranger = socket.create_connection(server.getsockname())
        line = Line(server.accept()[0], "a caller", STRANGER_BYTES)
    try:
        stranger.sendall(b"x" * 100_000)
        with pytest.raises(Lost, match="a caller sent a message that is too long"):
            received(line)
        assert len(line._text) <= 2 * STRANGER_BYTES
    finally:
        stranger.close()
        line.close()


def test_who_is_known_may_say_more(ends):
    here, there = ends
    there._max_bytes = STRANGER_BYTES
    here.send(hello="token")
    assert received(there) == [{"hello": "token"}]
    there.trust("host here")
    here.send(text="x" * 100_000)
    assert len(received(there)[0]["text"]) == 100_000 and there.other == "host here"


def test_waiting_to_begin(ends):
    here, there = ends
    here.send(go=1, node_rank=3)
    assert there.wait_for("go", 5)["node_rank"] == 3
    here.send(kill=1)
    with pytest.raises(Lost, match="ended before it began"):
        there.wait_for("go", 5)


def test_nobody_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Lost, match=rf"cannot connect to the launching host: 127.0.0.1 port {port}: Connection refused.*firewall"):
        connect(["127.0.0.1"], port, "the launching host")


def test_own_addresses(monkeypatch):
    monkeypatch.setattr(line_module, "_all_addresses", lambda: ["127.0.0.1", "10.0.0.5"])
    monkeypatch.setattr(line_module, "_route", {"far": "10.9.9.9", "near": "127.0.0.1"}.get)
    assert own_addresses(["near", "far"]) == ["10.9.9.9", "10.0.0.5"]
    monkeypatch.setattr(line_module, "_all_addresses", lambda: ["127.0.0.1"])
    assert own_addresses(["near"]) == ["127.0.0.1"]


@pytest.mark.parametrize("hello,expected", [
    (dict(node_rank=1, names=["x"], place=0), "beta"),
    (dict(node_rank=-1, names=["beta", "alpha.cluster"], place=0), "beta"),
    (dict(node_rank=-1, names=["gamma.cluster", "gamma"], place=0), "gamma.example.org"),
    (dict(node_rank=-1, names=["vm"], place=2), "gamma.example.org"),
    (dict(node_rank=-1, names=["vm"], place=-1), None),
    (dict(node_rank=0, names=["alpha"], place=0), None),  # has called already
])  # yapf: disable
def test_who_is_calling(hello, expected):
    names = ["alpha", "beta", "gamma.example.org"]
    listener = Listener(["localhost"])
    try:
        head = Head(names, [], listener, Voice("critical"), master_addr="", master_port=29500)
        head.hosts[0].state = type(head.hosts[0].state).READY
        host = head._host_of(hello)
        assert (host and host.name) == expected
    finally:
        listener.socket.close()
