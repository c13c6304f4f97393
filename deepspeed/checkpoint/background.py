# SPDX-License-Identifier: Apache-2.0
"""A save that goes on while training does.

Note [Ranks without collectives]: the training thread owns the process groups, so the threads that write tell each other through the
rendezvous store: each rank puts there what it wrote, rank 0 (the others that lead a node) commits and puts there how it went, and
leaves only when everyone has read that.
"""
import atexit
import pickle
import threading
import time
import weakref

import torch.distributed as dist

from deepspeed.checkpoint.save import Saving
from deepspeed.checkpoint.snapshot import Snapshot
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.telemetry import logger

_TURNS_S = (0.01, 0.5)
_GOODBYE_S = 30.0


class _Board:
    """Where the writing threads of one save leave word."""

    def __init__(self, ranks, nonce):
        self.ranks = ranks
        self.store = dist.PrefixStore(f"deepspeed/checkpoint/{nonce}", dist.distributed_c10d._get_default_store()) if ranks.size > 1 else None
        self._own = {}

    def put(self, key, value):
        if self.store is None:
            self._own[key] = value
        else:
            self.store.set(key, pickle.dumps(value))

    def get(self, key):
        """Waits for it, asking now and then: a blocking question would keep others from the store."""
        if self.store is None:
            return self._own[key]
        turn_s = _TURNS_S[0]
        while not self.store.check([key]):
            time.sleep(turn_s)
            turn_s = min(turn_s * 2, _TURNS_S[1])
        return pickle.loads(self.store.get(key))


class BackgroundSave:
    """One save under way. Made and finished on all ranks alike."""

    def __init__(self, request, ranks, frozen, snapshot):
        self.ranks, self.error = ranks, None
        self.saving = Saving(request, ranks, frozen)
        self.saving.prepare()
        files = self.saving.mine.files
        try:
            ranks.attempt(lambda: self._take(files, snapshot), f"copying what is to be saved to {self.saving.target}")
        except CheckpointError:
            self.saving.discard()
            raise
        self._board = _Board(ranks, self.saving.nonce)
        self._thread = threading.Thread(target=self._run, name="deepspeed-checkpoint-writer", daemon=True)
        self._thread.start()

    @staticmethod
    def _take(files, snapshot):
        copies = iter(snapshot.take([piece for pieces in files.values() for piece in pieces]))
        for name, pieces in files.items():
            files[name] = [next(copies) for _ in pieces]

    @property
    def target(self):
        return self.saving.target

    def _run(self):
        try:
            self._write()
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"

    def _write(self):
        rank, board, saving = self.ranks.rank, self._board, self.saving
        try:
            word = (None, (saving.write(), saving.mine.rank_tree))
        except Exception as error:
            word = (f"{type(error).__name__}: {error}", None)
        board.put(f"wrote/{rank}", word)
        if rank == 0:
            self._conclude()
        self.error, text = board.get("outcome")
        if text is not None and saving.leads and rank != 0:
            saving.commit(text)
        if self.error is None:
            saving.mine.remember(saving.target)
        elif rank != 0:
            saving.discard()
        board.put(f"read/{rank}", True)
        if rank == 0 and self.ranks.size > 1:
            self._wait_for_readers()

    def _conclude(self):
        """By rank 0: the manifest and the rename, or the reason why not."""
        saving, error, text = self.saving, None, None
        words = [self._board.get(f"wrote/{rank}") for rank in range(self.ranks.size)]
        failed = [rank for rank, (problem, _) in enumerate(words) if problem is not None]
        if failed:
            error = f"saving to {saving.target} failed on rank {failed[0]}: {words[failed[0]][0]}"
        else:
            try:
                text = saving.text_of([word[0] for _, word in words], [word[1] for _, word in words])
                saving.commit(text)
            except Exception as problem:
                error = f"saving to {saving.target} failed: {type(problem).__name__}: {problem}"
        if error is not None:
            saving.discard()
        self._board.put("outcome", (error, text if saving.request.node_local else None))

    def _wait_for_readers(self):
        """The store may live in this process."""
        deadline = time.monotonic() + _GOODBYE_S
        keys = [f"read/{rank}" for rank in range(1, self.ranks.size)]
        while time.monotonic() < deadline and not self._board.store.check(keys):
            time.sleep(_TURNS_S[0])

    @property
    def done(self):
        """Whether this rank has finished."""
        return not self._thread.is_alive()

    def join(self):
        self._thread.join()


class BackgroundSaver:
    """At most one save under way; it ends before another save or a load begins, and before the process does."""

    def __init__(self):
        self.snapshot = Snapshot()
        self.current = None
        atexit.register(_finish_at_exit, weakref.ref(self))

    def start(self, request, ranks, frozen):
        """Collective. Returns when the values of now are copied."""
        self.finish(ranks)
        self.current = BackgroundSave(request, ranks, frozen, self.snapshot)
        return self.current.target

    def collect(self, ranks):
        """Collective and quick: when the save under way is over on every rank, its error, if it has one, is raised on all of them."""
        if self.current is not None and all(ranks.gather(self.current.done)):
            self.finish(ranks)

    def finish(self, ranks):
        """Collective. Waits for the save under way and raises its error on all ranks."""
        save, self.current = self.current, None
        if save is not None:
            ranks.together(save.join, "waiting for the save under way")
            ranks.attempt(lambda: _raise(save.error), "the save before this call")

    def finish_alone(self):
        """Without the other ranks; returns the error."""
        save, self.current = self.current, None
        if save is None:
            return None
        save.join()
        return save.error


def _raise(error):
    if error is not None:
        raise CheckpointError(error)


def _finish_at_exit(reference):
    saver = reference()
    error = saver.finish_alone() if saver is not None else None
    if error is not None:
        logger.error(f"the last checkpoint was not written: {error}")
        raise CheckpointError(error)
