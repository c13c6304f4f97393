# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other while they save and load: few, small messages, and one outcome for all.

Note [Waiting without silence]: one rank may write for minutes longer than another, and hang detection takes a rank that waits in one
collective for long as stuck. So long work runs in a thread, and the ranks meet every few seconds to say whether they are done.
"""
import pickle
import struct
import threading

import torch.distributed as dist

from deepspeed.checkpoint.source import CheckpointError, DamageError

_FIRST_TURN_S, _LONGEST_TURN_S = 0.02, 5.0


class Ranks:
    """All ranks of the job."""

    def __init__(self):
        joined = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)

    def gather(self, value):
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather_first(self, value):
        """Every rank's value on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        found = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0)
        return found

    def from_first(self, value):
        """Rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, error, what):
        """Raises on every rank, naming the first rank that failed, when any has an error: DamageError when damage is all that is wrong."""
        named = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        said = self.gather(None if error is None else (f"{named}{error}", isinstance(error, DamageError)))
        damaged = all(damage for _, damage in filter(None, said))
        # Of other reasons, which would stop the next checkpoint too, the first is told.
        texts = [text[0] if text is not None and text[1] == damaged else None for text in said]
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return
        place = "" if len(failed) == self.size and len(set(texts)) == 1 else f" on rank {failed[0]}"
        raise (DamageError if damaged else CheckpointError)(f"{what} failed{place}: {texts[failed[0]]}") from error

    def attempt(self, work, what):
        """work() on every rank, quickly done; its result, or the same error everywhere."""
        result, error = None, None
        try:
            result = work()
        except Exception as problem:
            error = problem
        self.agree(error, what)
        return result

    def together(self, work, what):
        """The same for work that may take long (see the Note); it runs outside the main thread."""
        if self.size == 1:
            return self.attempt(work, what)
        job = _Job(work)
        turn_s = _FIRST_TURN_S
        while not all(self.gather(job.finished(turn_s))):
            turn_s = min(turn_s * 2, _LONGEST_TURN_S)
        self.agree(job.error, what)
        return job.result


class _Job:

    def __init__(self, work):
        self.result = self.error = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="deepspeed-checkpoint", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    def finished(self, wait_s):
        self._thread.join(wait_s)
        return not self._thread.is_alive()


class GroupRanks(Ranks):
    """The ranks that a transport joins, when a model is not cut over all of the job; they are told by their place in that group."""

    def __init__(self, transport):
        self._transport = transport
        self.rank, self.size = transport.rank, transport.size

    def gather(self, value):
        if self.size == 1:
            return [value]
        mine = pickle.dumps(value)
        sizes = [struct.unpack("q", part)[0] for part in self._transport.all_gather_host(struct.pack("q", len(mine)), "ranks")]
        parts = self._transport.all_gather_host(mine.ljust(max(sizes), b"\0"), "ranks")
        return [pickle.loads(part[:size]) for part, size in zip(parts, sizes)]

    def gather_first(self, value):
        found = self.gather(value)
        return found if self.rank == 0 else None

    def from_first(self, value):
        return self.gather(value)[0]
