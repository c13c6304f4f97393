# SPDX-License-Identifier: Apache-2.0
"""A save that goes on while training does.

Note [Ranks without collectives]: the training thread owns the process groups, so the threads that write tell each other through the
rendezvous store: each rank puts there what it wrote, rank 0 commits and puts there how it went, and leaves only when everyone has
read that.

Note [The end of the process]: a save may outlive the engine that began it, so those under way are held here, and so are those whose
error nobody has seen. At exit they are waited for; once the main thread is through, no rank waits longer than _PATIENCE_S for another,
which may have been killed. An exception at exit would change nothing, so an error is logged and the exit status becomes 1.
"""
import atexit
import logging
import os
import pickle
import sys
import threading
import time

import torch.distributed as dist

from deepspeed.checkpoint.save import Saving
from deepspeed.checkpoint.snapshot import Snapshot
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.telemetry import logger

_TURNS_S = (0.01, 0.5)
_GOODBYE_S = 30.0
_PATIENCE_S = 600.0
_unfinished = set()      # see the Note
_ended_at = []           # when the main thread was through


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
            if _ended_at and time.monotonic() - _ended_at[0] > _PATIENCE_S:
                raise TimeoutError(f"no word ({key}) from another rank for {_PATIENCE_S:.0f} s after the end of training")
            time.sleep(turn_s)
            turn_s = min(turn_s * 2, _TURNS_S[1])
        return pickle.loads(self.store.get(key))

    def goodbye(self, rank):
        """The checkpoint stands or not, whatever goes wrong here. Rank 0 stays until everyone has read how it went, since the store may
        live in its process, and leaves no keys."""
        if self.store is None:
            return
        try:
            if rank != 0:
                self.store.set(f"read/{rank}", b"")
                return
            keys = [f"read/{other}" for other in range(1, self.ranks.size)]
            deadline = time.monotonic() + _GOODBYE_S
            while not self.store.check(keys):
                if time.monotonic() > deadline:
                    return
                time.sleep(_TURNS_S[0])
            for key in [*keys, *(f"wrote/{other}" for other in range(self.ranks.size)), "outcome"]:
                self.store.delete_key(key)
        except RuntimeError as error:
            logger.debug(f"checkpoint: the store has gone: {error}")


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
        _unfinished.add(self)
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
        self.saving.mine.files.clear()   # the copies
        if self.error is None:
            _unfinished.discard(self)

    def _write(self):
        rank, board, saving = self.ranks.rank, self._board, self.saving
        try:
            word = (None, (saving.write(), saving.mine.rank_tree))
        except Exception as error:
            word = (f"{type(error).__name__}: {error}", None)
        board.put(f"wrote/{rank}", word)
        if rank == 0:
            self._conclude()
        self.error = board.get("outcome")
        if self.error is None:
            saving.mine.remember(saving.target)
        board.goodbye(rank)

    def _conclude(self):
        """By rank 0: the manifest and the rename, or the reason why not."""
        saving, error = self.saving, None
        try:
            words = [self._board.get(f"wrote/{rank}") for rank in range(self.ranks.size)]
            failed = [rank for rank, (problem, _) in enumerate(words) if problem is not None]
            if failed:
                error = f"saving to {saving.target} failed on rank {failed[0]}: {words[failed[0]][0]}"
            else:
                saving.commit(saving.text_of([word[0] for _, word in words], [word[1] for _, word in words]))
        except Exception as problem:
            error = f"saving to {saving.target} failed: {type(problem).__name__}: {problem}"
        if error is not None:
            saving.discard()
        self._board.put("outcome", error)

    @property
    def done(self):
        """Whether this rank has finished."""
        return not self._thread.is_alive()

    def join(self):
        self._thread.join()

    def outcome(self):
        """Raises what went wrong; whoever calls this has been told."""
        _unfinished.discard(self)
        if self.error is not None:
            raise CheckpointError(self.error)


class BackgroundSaver:
    """At most one save under way; it ends before another save or a load begins, and before the process does."""

    def __init__(self):
        self.snapshot = Snapshot()
        self.current = None

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
            ranks.attempt(save.outcome, "the save before this call")


def _finish_at_exit():
    """Without the other ranks."""
    _ended_at.append(time.monotonic())
    errors = []
    for save in list(_unfinished):
        save.join()
        if save.error is not None:
            errors.append(save.error)
            logger.error(f"the last checkpoint was not written: {save.error}")
    if errors:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                pass
        os._exit(1)


atexit.register(_finish_at_exit)
os.register_at_fork(after_in_child=_unfinished.clear)   # the threads stay with the parent
