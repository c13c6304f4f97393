# SPDX-License-Identifier: Apache-2.0
"""Folders that appear whole or not at all.

Note [A save on disk]: a checkpoint is written into save_dir/.<tag>.part-<nonce>, made durable, and renamed. While its writer lives it
holds a lock on save_dir/.<tag>.part-<nonce>.lock, which is made before the folder and removed after the rename; so a folder without
a locked lock is the rest of a dead run, and the next save removes it; unless it has its manifest, which is written last, and nothing
bears its tag: then its writer was killed around the rename, and it gets its name. When a checkpoint is removed its manifest goes first.

Note [Locks of one process]: a process's own lock does not hinder it, and is lost when it closes any handle of the file. So a process
knows its locks, by device and inode, since one folder has many paths.
"""
import errno
import fcntl
import os
import re
import secrets
import shutil
import threading
import time

from deepspeed._native import core
from deepspeed.checkpoint import manifest
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.telemetry import logger

LATEST = "latest"
_PART = re.compile(r"\.(?P<tag>.+)\.part-[0-9a-f]{16}")
_LOCK_SUFFIX = ".lock"
_UNLOCKABLE_AGE_S = 24 * 3600   # where the file system has no locks
_LOCK_TRIES, _LOCK_TURN_S = 50, 0.02
_ours = set()                   # see the Note
_guard = threading.Lock()       # of _ours and its files' handles


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
    except OSError as error:   # some network file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
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
    """The tag in the file `latest`; None when there is no such file. OSError when it cannot be read: the tag must not be taken for none."""
    try:
        with open(os.path.join(save_dir, name), encoding="utf-8", errors="replace") as file:
            return file.read(4096).strip() or None
    except (FileNotFoundError, NotADirectoryError):
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
        self.path, self._file = path, None
        for _ in range(_LOCK_TRIES):
            with _guard:
                if self._take():
                    return
            time.sleep(_LOCK_TURN_S)
        raise CheckpointError(f"{path}: another process holds this lock")

    def _take(self):
        """False when somebody looks at the new file at this moment, or has removed it as a dead one's."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._identity = _identity(os.fstat(file))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = _exists_as(self.path, self._identity)
        except (BlockingIOError, PermissionError):
            held = False
        except OSError:
            held = True   # no locks here: age decides
        if held:
            self._file = file
            _ours.add(self._identity)
        else:
            os.close(file)
        return held

    def release(self):
        if self._file is not None:
            with _guard:
                try:
                    os.unlink(self.path)
                except OSError:
                    pass
                _ours.discard(self._identity)
                os.close(self._file)
                self._file = None


def _identity(status):
    return status.st_dev, status.st_ino


def _exists_as(path, identity):
    try:
        return _identity(os.stat(path)) == identity
    except FileNotFoundError:
        return False


def _is_dead(part):
    with _guard:
        return _is_unlocked(part + _LOCK_SUFFIX)


def _is_unlocked(lock):
    try:
        if _identity(os.stat(lock)) in _ours:
            return False
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
    """What killed saves have left in a folder; see the Note [A save on disk]."""
    dead = []
    for entry in list(os.scandir(folder)) if os.path.isdir(folder) else ():
        name = entry.name.removesuffix(_LOCK_SUFFIX)
        if _PART.fullmatch(name) and _is_dead(os.path.join(folder, name)):
            dead.append(os.path.join(folder, name))
    _finish_renames(dead)
    for path in dead:
        if os.path.isdir(path):
            logger.info(f"checkpoint: {path}, left by a save that was killed, is removed")
            remove_checkpoint(path)
        elif os.path.isfile(path) and time.time() - os.stat(path).st_mtime > 60:   # of `latest`, beside a living writer perhaps
            os.unlink(path)
        if os.path.exists(path + _LOCK_SUFFIX) and not os.path.exists(path):
            os.unlink(path + _LOCK_SUFFIX)


def _finish_renames(dead):
    """Of the whole ones whose tag nothing bears the newest gets its name."""
    newest = {}
    for path in sorted(set(dead)):
        folder, name = os.path.split(path)
        target = os.path.join(folder, _PART.fullmatch(name)["tag"])
        if os.path.lexists(target) or not manifest.is_checkpoint(path):
            continue
        try:
            found = manifest.Checkpoint(path)
            found.check()
        except CheckpointError:
            continue
        if target not in newest or found.about("saved_at", 0.0) > newest[target].about("saved_at", 0.0):
            newest[target] = found
    for target, found in newest.items():
        try:
            os.rename(found.path, target)
            sync_folder(os.path.dirname(target))
            logger.warning(f"checkpoint: {target} was whole when its save was killed, and has its name now")
        except OSError as error:   # another process does the same
            logger.warning(f"checkpoint: {found.path}: {error}")


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
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir() and manifest.is_checkpoint(entry.path):
            if not _PART.fullmatch(entry.name) or _is_dead(entry.path):
                yield entry.path, entry.name
