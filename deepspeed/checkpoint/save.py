# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint: every rank its share, rank 0 the manifest, and then one rename."""
import os
import socket
import time
from dataclasses import dataclass, field

import torch

from deepspeed import _version
from deepspeed._native import core
from deepspeed.checkpoint import dtypes, folders, manifest
from deepspeed.checkpoint.lanes import LEAST_BYTES, abreast, bytes_of, lane_name, lanes_of
from deepspeed.checkpoint.pieces import Piece
from deepspeed.checkpoint.source import CheckpointError, TensorInfo
from deepspeed.checkpoint.tree import Encoder
from deepspeed.telemetry import logger
from deepspeed.zero.split_master import plain

_CHUNK_BYTES = 16 << 20          # of a device's memory on its way through the host, for each writer
_MADE_BYTES = 4 << 20            # of values that are made to be written, for each writer
_RESTING_BYTES = 32 << 20        # of files that values rest in, in memory at a time for each writer
_MOST_WRITERS = 4
_OVERHEAD_BYTES = 64 << 10       # of a file: its header, the rest of its last block
_ENTRY_BYTES = 400               # of header and manifest, for each piece
_SCRIPT = '''#!/usr/bin/env python3
"""Writes the weights of a checkpoint in this folder, {what}; `python {name}.py --help` says how. Needs deepspeed."""
import runpy

runpy.run_module("deepspeed.utils.{name}", run_name="__main__")
'''
_SHARED = "save_dir must be a folder that all nodes share"
_SCRIPTS = {f"{name}.py": _SCRIPT.format(name=name, what=what) for name, what in (("zero_to_fp32", "in fp32"), ("zero_to_torch", "in a dtype of choice"))}


@dataclass
class SaveRequest:
    """What is saved where. The same on all ranks but for the values."""
    save_dir: str
    tag: str
    pieces: list                  # of this rank, in the order of files
    state: dict                   # rank 0's counts
    rank_state: object            # every rank's own
    aliases: dict
    save_latest: bool = True
    tag_validation: str = "warn"
    node_local: bool = False      # every node would have a save_dir of its own
    keep_last: int = 0            # 0: all
    say_speed: bool = False
    writers: int = None           # threads and files a rank writes with; None: as many as it has cores to itself
    about: dict = field(default_factory=dict)
    leave: object = None          # where values rest in files: called now and then, so that what was read of them leaves memory


class FrozenFile:
    """The file of frozen weights in the last checkpoint of this process: linked, not written, while its contents stay the same."""

    def __init__(self):
        self._path = self._written = self._identity = None

    def remember(self, path, written):
        """written: (bytes, sums). A file that another has replaced since is not taken for this one."""
        self._path = None
        try:
            self._identity = _identity(path)
        except OSError:
            return
        self._path, self._written = path, written

    def stands(self):
        try:
            return self._path is not None and _identity(self._path) == self._identity
        except OSError:
            return False

    def link(self, path, written):
        """Whether `path` is that file now."""
        if self._path is None or written != self._written:
            return False
        try:
            os.link(self._path, path)
        except OSError:   # no hard links here, or another file system
            return False
        if _identity(path) == self._identity:
            return True
        os.unlink(path)
        return False


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def stored_form(piece):
    """(dtype in the file, its count of elements) of a piece."""
    if piece.dtype in dtypes.IN_FILES:
        return piece.dtype, piece.data.numel()
    return "U8", piece.data.numel() * piece.data.element_size()


def byte_views(piece):
    """The piece's bytes on the host, as buffers: all of them, or where they have to be brought or made, a bounded part at a time."""
    data = piece.data if piece.data.is_contiguous() else piece.data.contiguous()
    if data.numel() == 0:
        return
    if piece.on_host:
        yield data.view(torch.uint8).numpy()
        return
    step = (_MADE_BYTES if data.device.type == "cpu" else _CHUNK_BYTES) // data.element_size()
    for begin in range(0, data.numel(), step):
        yield plain(data[begin:begin + step]).cpu().view(torch.uint8).numpy()


class RankFiles:
    """What one rank writes."""

    def __init__(self, request, ranks, frozen):
        self.request, self.ranks, self.frozen = request, ranks, frozen
        self._objects = []
        encoder = Encoder(self._put)
        self.rank_tree = encoder.encode(request.rank_state, f"rank{ranks.rank}")
        self.tree = encoder.encode(request.state) if ranks.rank == 0 else None
        suffix = f"_{ranks.rank:05d}_of_{ranks.size:05d}.safetensors"
        mixed = any(p.kind == "fp32" for p in request.pieces)
        still = [p for p in request.pieces if mixed and p.kind == "weight"]
        moving = [p for p in request.pieces if not (mixed and p.kind == "weight")] + self._objects
        # Widest elements first keeps every piece aligned to its own.
        self.files = {name: sorted(pieces, key=lambda p: -p.data.element_size())
                      for name, pieces in (("state" + suffix, moving), ("frozen" + suffix, still)) if pieces}
        self._frozen_name, self._frozen_written = "frozen" + suffix, None

    def _put(self, tensor, path):
        name = f"rank{self.ranks.rank}/{len(self._objects)}/{path[:120]}"
        self._objects.append(Piece(name, "object", (tensor.numel(),), (), 0, tensor))
        return name

    def bytes_needed(self):
        total = 0
        for name, pieces in self.files.items():
            if name == self._frozen_name and self.frozen.stands():
                continue
            total += _MOST_WRITERS * _OVERHEAD_BYTES + sum(_ENTRY_BYTES + p.data.numel() * p.data.element_size() for p in pieces)
        return total

    def write(self, folder, writers=1):
        """(files, rows): [(name, bytes, sums)] and one row for each piece, for the manifest. writers: threads; see lanes.py."""
        if sum(map(bytes_of, self.files.values())) < LEAST_BYTES:
            writers = 1
        lanes = {}
        for name, pieces in self.files.items():
            parts = [pieces] if name == self._frozen_name else lanes_of(pieces, writers)
            lanes.update((lane_name(name, number), part) for number, part in enumerate(parts))

        def write_one(name, pieces):
            path = os.path.join(folder, name)
            return self._link_or_write(path, pieces) if name == self._frozen_name else stream(path, pieces, self.request.leave)

        files, rows = [], []
        for (name, pieces), (size, sums, offsets) in zip(lanes.items(), abreast(write_one, lanes.items(), writers)):
            files.append((name, size, sums))
            rows += [(p.name, p.kind, p.dtype, p.shape, p.order, name, p.begin, p.data.numel(), at) for p, at in zip(pieces, offsets)]
        return files, rows

    def _link_or_write(self, path, pieces):
        if self.frozen.stands():
            size, sums, offsets = stream("", pieces, self.request.leave)
            self._frozen_written = (size, sums)
            if self.frozen.link(path, self._frozen_written):
                return size, sums, offsets
        size, sums, offsets = stream(path, pieces, self.request.leave)
        self._frozen_written = (size, sums)
        return size, sums, offsets

    def remember(self, folder):
        """The checkpoint is in place."""
        if self._frozen_written is not None:
            self.frozen.remember(os.path.join(folder, self._frozen_name), self._frozen_written)


def entries_of(pieces):
    return [(f"{p.kind}/{p.name}@{p.begin}", form, [count]) for p in pieces for form, count in [stored_form(p)]]


def _host_batches(views, leave):
    """Lists of views to be written together: all of them, or as many as may be in memory before `leave` is called."""
    batch, room = [], _RESTING_BYTES
    for view in views:
        while leave is not None and view.nbytes > room:
            yield batch + [view[:room]]
            view, batch, room = view[room:], [], _RESTING_BYTES
        batch.append(view)
        room -= view.nbytes
    yield batch


def stream(path, pieces, leave=None):
    """Writes one file; (bytes, sums, offset of each piece). An empty path: only sums."""
    out = core().SafetensorsStream(path, entries_of(pieces), {"format": "pt"}, manifest.BLOCK_BYTES, True)
    try:
        def write_host(views):
            for batch in _host_batches(views, leave):
                out.write(batch)
                if leave is not None:
                    leave()

        offsets = out.offsets
        on_host = []
        for piece in pieces:
            if piece.on_host:
                on_host += byte_views(piece)
                continue
            write_host(on_host)
            on_host = []
            for part in byte_views(piece):
                write_host([part])
        write_host(on_host)
        size, sums = out.finish()
        return size, sums, offsets
    finally:
        out.abandon()


def merge(reports):
    """(files, tensors, aliases) of the manifest from what all ranks wrote."""
    files, numbers, tensors, aliases = [], {}, {}, {}
    for written, rows, other_names in reports:
        aliases.update(other_names)
        for file in written:
            numbers[file[0]] = len(files)
            files.append(file)
        for name, kind, dtype, shape, order, file, begin, numel, offset in rows:
            what, pieces = tensors.setdefault((name, kind), ((dtype, shape, order), []))
            if what != (dtype, shape, order):
                raise CheckpointError(f"ranks hold {kind} of '{name}' as {what} and as {(dtype, shape, order)}")
            if numel:
                pieces.append((numbers[file], begin, numel, offset))
    listed = [TensorInfo(name, kind, *what, tuple(sorted(pieces, key=lambda p: p[1]))) for (name, kind), (what, pieces) in tensors.items()]
    return files, listed, aliases


class Saving:
    """One save, step by step; the steps are collective."""

    def __init__(self, request, ranks, frozen):
        self.request, self.ranks = request, ranks
        self.target = folders.target_of(request.save_dir, request.tag)
        self.leads = ranks.rank == 0
        self.mine = ranks.attempt(lambda: RankFiles(request, ranks, frozen), "collecting what is to be saved")
        self.part = self.nonce = self.writers = None
        self.started = time.time()

    def prepare(self):
        """Tags agree, there is room, and the folder to write into exists."""
        request, ranks = self.request, self.ranks
        host, cores = socket.gethostname(), frozenset(os.sched_getaffinity(0))
        everyone = ranks.gather((str(request.tag), folders.nonce(), host, cores, self.mine.bytes_needed()))
        self._validate_tags([tag for tag, *_ in everyone])
        self.nonce = everyone[0][1]
        sharing = sum((other, theirs) == (host, cores) for _, _, other, theirs, _ in everyone)
        self.writers = request.writers or max(1, min(_MOST_WRITERS, len(cores) // sharing))
        self.part = folders.PartFolder(self.target, self.nonce)
        if request.node_local and len({host for _, _, host, _, _ in everyone}) > 1:
            raise CheckpointError("checkpoint.use_node_local_storage: what each of several nodes keeps for itself cannot be loaded; set it "
                                  f"to false: {_SHARED}")
        needed = sum(need for *_, need in everyone)
        try:
            ranks.attempt(lambda: self._open(needed) if self.leads else None, f"saving to {self.target}")
        except CheckpointError:
            self.discard()
            raise

    def _validate_tags(self, tags):
        mode = self.request.tag_validation.lower()
        if mode == "ignore" or len(set(tags)) == 1:
            return
        text = f"save_checkpoint: ranks save under different tags: {sorted(set(tags))[:4]}"
        if mode == "fail":
            raise AssertionError(text + " (checkpoint.tag_validation)")
        logger.warning(text + f"; rank 0's, {tags[0]!r}, counts")
        self.target = folders.target_of(self.request.save_dir, tags[0])

    def _open(self, needed):
        os.makedirs(self.request.save_dir, exist_ok=True)
        self.part.open()
        free = folders.free_bytes(self.part.path)
        if needed > free:
            raise CheckpointError(f"{self.request.save_dir}: the checkpoint needs {needed / 2**20:.1f} MiB, free are {free / 2**20:.1f} MiB")

    def write(self):
        if not os.path.isdir(self.part.path):
            raise CheckpointError(f"{self.part.path} was made by rank 0 and is not there for rank {self.ranks.rank}: {_SHARED}")
        began = time.perf_counter()
        files, rows = self.mine.write(self.part.path, self.writers)
        if self.request.say_speed:
            size, took_s = sum(size for _, size, _ in files), time.perf_counter() - began
            logger.info(f"checkpoint {self.target}: {size / 2**20:.1f} MiB in {took_s:.2f} s, {size / took_s / 1e9:.2f} GB/s")
        return files, rows, self.request.aliases

    def text_of(self, reports, trees):
        """The manifest."""
        files, tensors, aliases = merge(reports)
        tree = {**self.mine.tree, "ranks": trees}
        about = {"library": f"deepspeed {_version.__version__}", "tag": str(self.request.tag), "saved_at": self.started,
                 "world_size": self.ranks.size, "save_latest": bool(self.request.save_latest), **self.request.about}
        text = manifest.manifest_text(files, tensors, aliases, tree, about)
        core().CheckpointManifest(text)   # every element is there exactly once, or the save fails
        return text

    def commit(self, text):
        """By the one that leads: the manifest, the rename, `latest`. With the rename the checkpoint stands."""
        where = os.path.join(self.part.path, manifest.NAME)
        folders.write_file(where, text)
        try:
            manifest.Checkpoint(self.part.path).check()
        except CheckpointError as error:
            os.unlink(where)
            raise CheckpointError(f"{error}; {_SHARED}") from error
        self.part.commit()
        if self.request.save_latest:
            try:
                folders.replace_file(os.path.join(self.request.save_dir, folders.LATEST),
                                     os.path.relpath(self.target, self.request.save_dir).encode())
            except OSError as error:
                raise CheckpointError(f"the checkpoint is whole, but `{folders.LATEST}` does not name it: {error}") from error
        try:
            self._leave_scripts()
            if self.request.keep_last:
                keep_newest(self.request.save_dir, self.request.keep_last, self.target)
        except OSError as error:
            logger.warning(f"checkpoint {self.target} is whole; what follows a save went wrong: {error}")

    def _leave_scripts(self):
        for name, text in _SCRIPTS.items():
            path = os.path.join(self.request.save_dir, name)
            try:
                with open(path, encoding="utf-8") as file:
                    if file.read() == text:
                        continue
            except (OSError, UnicodeDecodeError):
                pass
            folders.replace_file(path, text.encode(), 0o777)

    def discard(self):
        if self.part is not None and self.leads:
            self.part.discard()


def save(request, ranks, frozen):
    """Collective. Returns the checkpoint's folder once it is durable; CheckpointError on all ranks, and nothing changed, when any rank
    could not do its part."""
    saving = Saving(request, ranks, frozen)
    saving.prepare()
    what = f"saving to {saving.target}"
    try:
        report = ranks.together(saving.write, what)
        reports = ranks.gather_first((report, saving.mine.rank_tree))
        text = ranks.attempt(lambda: saving.text_of([r for r, _ in reports], [t for _, t in reports]) if ranks.rank == 0 else None, what)
        ranks.attempt(lambda: saving.commit(text) if saving.leads else None, what)
    except CheckpointError:
        saving.discard()
        raise
    saving.mine.remember(saving.target)
    return saving.target


def keep_newest(save_dir, count, spared):
    """Removes older checkpoints of save_dir until `count` are left. Those saved with save_latest=False are the caller's to keep; one
    whose files are missing or truncated does not count."""
    latest, good = folders.read_latest(save_dir), 0
    for old in folders.complete_checkpoints(save_dir):
        if not old.about("save_latest"):
            continue
        if good < count:
            good += _is_whole(old)
            continue
        if os.path.realpath(old.path) == os.path.realpath(spared) or os.path.basename(old.path) == latest:
            continue
        part = folders.PartFolder(old.path, folders.nonce())
        os.rename(old.path, part.path)   # from here on it is no checkpoint, however far the removal comes
        folders.remove_checkpoint(part.path)


def _is_whole(checkpoint):
    try:
        checkpoint.check()
    except CheckpointError as error:
        logger.warning(f"checkpoint: {error}; keep_last does not count this one")
        return False
    return True
