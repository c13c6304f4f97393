# SPDX-License-Identifier: Apache-2.0
"""Folders that appear whole or not at all.

Note [A save on disk]: a checkpoint is written into save_dir/.<tag>.part-<nonce>, made durable, and renamed. While its writer lives it
holds a lock on save_dir/.<tag>.part-<nonce>.lock, which is made before the folder and removed after the rename; so a folder without
a locked lock is the rest of a dead run, and the next save removes it. When a checkpoint is removed its manifest goes first.
"""
import fcntl
import os
import re
import secrets
import shutil
import time

from deepspeed._native import core
from deepspeed.checkpoint import manifest
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.telemetry import logger

LATEST = "latest"
_PART = re.compile(r"\.(?P<tag>.+)\.part-[0-9a-f]{16}")
_LOCK_SUFFIX = ".lock"
_UNLOCKABLE_AGE_S = 24 * 3600   # where the file system has no locks
_ours = set()                   # locks of this process, which would not hinder itself


def nonce():
    return secrets.token_hex(8)


def target_of(save_dir, tag):
    """The folder of a tag, which may have several parts but must stay inside save_dir."""
    parts = [part for part in str(tag).split("/") if part not in ("", ".")]
    if not parts or ".." in parts or str(tag).startswith("/") or _PART.fullmatch(parts[-1]):
        raise ValueError(f"tag {tag!r} does not name a folder inside {save_dir}")
    return os.path.join(save_dir, *parts)


def sync_folder(path):
    """New and renamed entries of the folder are durable afterwards."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError:   # some network file systems have no such thing
        pass
    finally:
        os.close(handle)


def write_file(path, data, mode=0o666):
    """A new, durable file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path, data, mode=0o666):
    """The file has these contents, or the old ones, at any moment; durable afterwards."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.part-{nonce()}")
    try:
        write_file(temporary, data, mode)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def read_latest(save_dir, name=LATEST):
    """The tag in the file `latest`; None when there is no such file."""
    try:
        with open(os.path.join(save_dir, name), encoding="utf-8", errors="replace") as file:
            return file.read(4096).strip() or None
    except OSError:
        return None


def remove_checkpoint(path):
    """The folder goes, its manifest first: what is left after a kill is no checkpoint."""
    try:
        os.unlink(os.path.join(path, manifest.NAME))
        sync_folder(path)
    except OSError:
        pass
    shutil.rmtree(path, ignore_errors=True)


class Lock:
    """Says that the writer of a part lives."""

    def __init__(self, path):
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _ours.add(path)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass   # no locks here: age decides

    def release(self):
        if self._file is not None:
            try:
                os.unlink(self.path)
            except OSError:
                pass
            os.close(self._file)
            self._file = None
            _ours.discard(self.path)


def _is_dead(part):
    lock = part + _LOCK_SUFFIX
    if lock in _ours:
        return False
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return time.time() - os.fstat(handle).st_mtime > _UNLOCKABLE_AGE_S
    finally:
        os.close(handle)


def remove_dead_parts(folder):
    """What killed saves have left in a folder."""
    for entry in list(os.scandir(folder)) if os.path.isdir(folder) else ():
        name = entry.name.removesuffix(_LOCK_SUFFIX)
        if not _PART.fullmatch(name) or not _is_dead(os.path.join(folder, name)):
            continue
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            logger.info(f"checkpoint: {path}, left by a save that was killed, is removed")
            remove_checkpoint(path)
        elif os.path.isfile(path) and time.time() - os.stat(path).st_mtime > 60:   # of `latest`, beside a living writer perhaps
            os.unlink(path)
        if os.path.exists(path + _LOCK_SUFFIX) and not os.path.exists(path):
            os.unlink(path + _LOCK_SUFFIX)


class PartFolder:
    """A checkpoint in the making."""

    def __init__(self, target, nonce):
        self.target = target
        parent, name = os.path.split(target)
        self.path = os.path.join(parent, f".{name}.part-{nonce}")
        self._lock = None

    def open(self):
        """Made by one process for all."""
        parent = os.path.dirname(self.path)
        os.makedirs(parent, exist_ok=True)
        remove_dead_parts(parent)
        if os.path.exists(self.target) and not os.path.isdir(self.target):
            raise CheckpointError(f"{self.target} exists and is no folder")
        self._lock = Lock(self.path + _LOCK_SUFFIX)
        os.mkdir(self.path)

    def commit(self):
        """The part becomes the target; what was there is gone."""
        sync_folder(self.path)
        parent = os.path.dirname(self.path)
        if not os.path.isdir(self.target):
            os.rename(self.path, self.target)
        elif not core().exchange_paths(self.path, self.target):
            aside = self.path[:-16] + nonce()
            os.rename(self.target, aside)
            os.rename(self.path, self.target)
            sync_folder(parent)
            remove_checkpoint(aside)
        sync_folder(parent)
        if os.path.isdir(self.path):   # the checkpoint that had this tag before
            remove_checkpoint(self.path)
        self._lock.release()

    def discard(self):
        """After a failure."""
        remove_checkpoint(self.path)
        if self._lock is not None:
            self._lock.release()


def free_bytes(folder):
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def complete_checkpoints(save_dir):
    """[(path, Checkpoint)] of all folders with a good manifest, newest first. A whole one under its temporary name counts: its writer
    was killed between the last byte and the rename."""
    found = []
    for folder, _ in _folders(save_dir):
        try:
            found.append(manifest.Checkpoint(folder))
        except CheckpointError as error:
            logger.warning(f"checkpoint: {error}")
    found.sort(key=lambda c: (c.about("saved_at", 0.0), c.path), reverse=True)
    return found


def _folders(save_dir):
    try:
        entries = sorted(os.scandir(save_dir), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir() and manifest.is_checkpoint(entry.path):
            if not _PART.fullmatch(entry.name) or _is_dead(entry.path):
                yield entry.path, entry.name
