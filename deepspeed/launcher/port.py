# SPDX-License-Identifier: Apache-2.0
"""A port for the processes to meet on.

Note [Port reservation]
    Rank 0 binds the port only after seconds of imports, so two jobs started together would both find the default port
    free. The launcher therefore holds an abstract unix socket named after the port for as long as the job runs: like
    ports, these names belong to the network namespace, and the kernel frees them however the launcher dies.
"""

from __future__ import annotations

import socket


class ReservedPort:
    """A port that is free now and that no other launcher of this host will choose while this object lives."""

    def __init__(self, port: int, lock: socket.socket) -> None:
        self.port = port
        self._lock = lock

    def close(self) -> None:
        self._lock.close()


def reserve_port(wanted: int) -> ReservedPort:
    """The wanted port, or some free one when it is taken (or 0)."""
    reserved = _try(wanted) if wanted else None
    while reserved is None:
        reserved = _try(_any_free_port())
    return reserved


def _try(port: int) -> ReservedPort | None:
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0deepspeed-port-{port}")
    except OSError:
        lock.close()
        return None
    if not _is_free(port):
        lock.close()
        return None
    return ReservedPort(port, lock)


def _is_free(port: int) -> bool:
    """Whether a server could listen on it, on IPv4 and (where the kernel has it) IPv6."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
                probe.listen(1)
            except OSError as error:
                # No IPv6 address to bind to is not the same as a port in use.
                if family == socket.AF_INET6 and error.errno not in (13, 98):
                    continue
                return False
    return True


def _any_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
