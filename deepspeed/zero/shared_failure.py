# SPDX-License-Identifier: Apache-2.0
"""Work that can fail on one rank, where the others would go on and wait for it."""

_MESSAGE_BYTES = 1000


def on_every_rank(transport, work, what):
    """Runs `work`. RuntimeError on all ranks of the transport when it failed on any, naming `what` and the first of these ranks. Collective."""
    failure = None
    try:
        work()
    except Exception as error:
        failure = error
    said = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:_MESSAGE_BYTES]
    heard = transport.all_gather_host(said.ljust(_MESSAGE_BYTES, b"\0"), "failures")
    failed = {rank: text.rstrip(b"\0").decode(errors="replace") for rank, text in enumerate(heard) if text.rstrip(b"\0")}
    if failed:
        first = min(failed)
        raise RuntimeError(f"{what} failed on rank {first}: {failed[first]}") from failure
