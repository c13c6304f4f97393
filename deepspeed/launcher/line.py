# SPDX-License-Identifier: Apache-2.0
"""The line between the launching host and the launcher of each host: JSON lines over TCP, and a sign of life every second.

Note [Why a line of our own]
    pdsh, ssh, mpirun and srun start a program elsewhere and bring its output back, but none of them brings all of this:
    signals to the other end, its exit code, the death of this end (a remote program survives its ssh), the death of the
    network (which none of them notices). So each host's launcher calls back. Whoever hears nothing for
    DS_HOST_TIMEOUT seconds takes the other end for lost: the launching host ends the job and names the host, the host ends
    its ranks. A connection that the kernel closes, since the other end was killed, is noticed at once.

Messages. From a host: ``hello`` (the token), ``failed`` (a rank), ``done`` (the host's exit code, with ``failures``).
To it: ``go`` (its number and the meeting point), ``signal``, ``stop``, ``kill``, ``host_lost``. Both: ``alive``.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Sequence

from deepspeed._environment import read

BEAT_S = 1.0
_SEND_S = 5.0
_CONNECT_S = 5.0
_MAX_MESSAGE_BYTES = 1 << 28  # a held traceback is 1 MB a rank at most
STRANGER_BYTES = 1 << 13  # from a caller that has not said the token yet


class Lost(Exception):
    """The other end is gone; the message says how that was noticed."""


class Line:
    """One end of a connection. ``other``: how messages call the other end."""

    def __init__(self, connection: socket.socket, other: str, max_bytes: int = _MAX_MESSAGE_BYTES) -> None:
        connection.settimeout(_SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self.other = other
        self._max_bytes = max_bytes
        self.lost = False
        self.heard_at = time.monotonic()
        self._beaten_at = 0.0
        self._timeout_s = read("DS_HOST_TIMEOUT")
        self._text = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def trust(self, name: str) -> None:
        """The caller is who it should be."""
        self.other, self._max_bytes = name, _MAX_MESSAGE_BYTES

    @property
    def other_address(self) -> str:
        """Of the other end, as it is seen from here."""
        return self._socket.getpeername()[0].removeprefix("::ffff:")

    def send(self, **message) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._is_lost(f"the connection to {self.other} broke ({error.strerror or error})") from None

    def beat(self, now: float) -> None:
        """A sign of life, if one is due."""
        if now - self._beaten_at >= BEAT_S:
            self._beaten_at = now
            self.send(alive=1)

    def receive(self, now: float) -> list[dict]:
        """What has arrived. ``Lost`` when the other end is gone or has been silent for too long."""
        closed = self._read(now)
        *lines, rest = self._text.split(b"\n")
        self._text = bytearray(rest)
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise self._is_lost(f"{self.other} speaks another language") from None
        if not messages and closed:
            raise self._is_lost(closed)
        if now - self.heard_at > self._timeout_s:
            raise self._is_lost(f"no sign of life from {self.other} for {self._timeout_s:g} s; "
                                "the network between the hosts is cut or the machine is down")
        return [message for message in messages if isinstance(message, dict) and "alive" not in message]

    def _read(self, now: float) -> str:
        """Empties the socket; returns how the connection ended, or nothing."""
        while select.select([self._socket], [], [], 0)[0]:
            try:
                data = self._socket.recv(min(self._max_bytes, 1 << 16))
            except OSError as error:
                return f"the connection to {self.other} broke ({error.strerror or error})"
            if not data:
                return f"{self.other} closed the connection; its launcher was killed or has crashed"
            self.heard_at = now
            self._text += data
            if len(self._text) > self._max_bytes:
                return f"{self.other} sent a message that is too long"
        return ""

    def wait_for(self, key: str, timeout_s: float) -> dict:
        """The first message with this key, for the time before there is a loop. ``Lost`` also when told to stop."""
        end = time.monotonic() + timeout_s
        while (now := time.monotonic()) < end:
            select.select([self._socket], [], [], BEAT_S / 2)
            for message in self.receive(now):
                if key in message:
                    return message
                if not message.keys().isdisjoint(("kill", "stop", "signal")):
                    raise self._is_lost("the job was ended before it began")
            self.beat(now)
        raise self._is_lost(f"{self.other} did not say {key!r} within {timeout_s:g} s")

    def _is_lost(self, why: str) -> Lost:
        self.lost = True
        return Lost(why)

    def close(self) -> None:
        self.lost = True
        self._socket.close()


def connect(addresses: Sequence[str], port: int, other: str) -> Line:
    """To the first of some addresses of a host that answers. ``Lost`` names them when none does."""
    problems = []
    for address in addresses:
        try:
            return Line(socket.create_connection((address, port), timeout=_CONNECT_S), other)
        except OSError as error:
            problems.append(f"{address} port {port}: {error.strerror or error}")
    raise Lost(f"this host ({socket.gethostname()}) cannot connect to {other}: {'; '.join(problems)}. "
               "A firewall between the hosts? The launching host must be reachable from all of them")


def own_addresses(toward: Sequence[str]) -> list[str]:
    """Addresses under which other hosts may reach this one: first those that face them. Loopback only if there is no other."""
    found = [_route(host) for host in toward] + _all_addresses()
    found = list(dict.fromkeys(address for address in found if address))
    return [address for address in found if not is_loopback(address)] or ["127.0.0.1"]


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _route(host: str) -> str | None:
    """The address this host would send from; nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return None


def _all_addresses() -> list[str]:
    """IPv4 addresses of the interfaces that are up."""
    import fcntl
    import struct
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                found.append(socket.inet_ntoa(answer[20:24]))
            except OSError:
                pass  # it has none
    return found
