# SPDX-License-Identifier: Apache-2.0
"""Our checkpoints on disk: a folder with manifest.json and the files it lists; docs/checkpoint_format.md says what lies where."""
import base64
import functools
import json
import os
import struct

from deepspeed._native import core
from deepspeed.checkpoint import dtypes
from deepspeed.checkpoint.source import CheckpointError, CheckpointSource, DamageError, TensorInfo, file_error

NAME = "manifest.json"
FORMAT = "deepspeed-checkpoint"
VERSION = 1
BLOCK_BYTES = 1 << 20
_LARGEST_BYTES = 1 << 32


def is_checkpoint(folder):
    """Whether the folder claims to be a checkpoint of ours."""
    return os.path.isfile(os.path.join(folder, NAME))


def manifest_text(files, tensors, aliases, state, about):
    """A manifest's bytes. files: [(name, bytes, sums)]; tensors: TensorInfo; state: an encoded tree; about: {key: JSON value}, for people."""
    listed = [{"name": name, "bytes": size, "crc32c": base64.b64encode(struct.pack(f"<{len(sums)}I", *sums)).decode()}
              for name, size, sums in files]
    described = []
    for t in tensors:
        row = {"name": t.name, "kind": t.kind, "dtype": t.dtype, "shape": list(t.shape)}
        if t.order:
            row["order"] = list(t.order)
        described.append({**row, "pieces": [list(piece) for piece in t.pieces]})
    body = json.dumps({"format": FORMAT, "version": VERSION, **about, "block_bytes": BLOCK_BYTES, "files": listed, "tensors": described,
                       "aliases": aliases, "state": state}, separators=(",", ":"), allow_nan=False)
    return core().seal_manifest(body[:-1])


def _read_text(path):
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_BYTES:
            raise DamageError(f"{path} is too large for a manifest")
        return file.read()


class Checkpoint(CheckpointSource):
    """A checkpoint of ours, opened: its manifest is read and checked, data is read (and its checksums checked) when asked for.

    Raises DamageError, naming the file, when the manifest is missing, torn, damaged or contradicts itself.
    """

    def __init__(self, folder):
        self.path = os.fspath(folder)
        where = os.path.join(self.path, NAME)
        try:
            text = _read_text(where)
            self._native = core().CheckpointManifest(text)
            self.document = json.loads(text)
        except OSError as error:
            raise file_error(error, f"{self.path} is no checkpoint: {where}: {error.strerror}") from error
        except DamageError:
            raise
        except (RuntimeError, ValueError, RecursionError) as error:
            raise DamageError(f"{where}: {error}") from error
        self.files = {name: (size, sums) for name, size, sums in self._native.files}
        self._names = list(self.files)
        rows = self._native.tensors
        self._index = {(row[0], row[1]): number for number, row in enumerate(rows)}
        self.tensors = {(name, kind): TensorInfo(name, kind, dtype, tuple(shape), tuple(order),
                                                 tuple((self._names[f], begin, numel, offset) for f, begin, numel, offset in pieces))
                        for name, kind, dtype, shape, order, pieces in rows}
        self.aliases = self._checked_aliases(where)
        self.world_size = self.document.get("world_size", 0)
        self._readers = {}

    def _checked_aliases(self, where):
        aliases, names = self.document.get("aliases", {}), {name for name, _ in self.tensors}
        if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
            raise DamageError(f"{where}: aliases is no table of names")
        for alias, name in aliases.items():
            if alias in names or name not in names:
                raise DamageError(f"{where}: alias '{alias}' of '{name}' does not fit the tensors")
        return aliases

    @functools.cached_property
    def state(self):
        """The tree that is no tensors of the model, decoded; what every rank knows of its own parameters alone is put together."""
        tree = self.document.get("state", {})
        if not isinstance(tree, dict):
            return self._decoded(tree)
        state = self._decoded({key: value for key, value in tree.items() if key != "ranks"})
        optimizer = state.get("optimizer")
        if isinstance(optimizer, dict):
            optimizer["missed_steps"] = dict(optimizer.get("missed_steps") or {})
            for missed in self._of_ranks("missed"):
                optimizer["missed_steps"].update(missed)
        for scope in self._of_ranks("scope"):
            state["extra_state"] = {**(state.get("extra_state") or {}), **scope["extra_state"]}
            for group, names in zip((optimizer or {}).get("groups", ()), scope["groups"]):
                group["params"] = list(dict.fromkeys([*group["params"], *names]))
        return state

    def _decoded(self, tree):
        from deepspeed.checkpoint.tree import decode
        try:
            return decode(tree, lambda name: self.read(name, "object"))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{os.path.join(self.path, NAME)}: its state cannot be read: {type(error).__name__}: {error}") from error

    def _of_rank(self, rank, key):
        found = self.document.get("state", {}).get("ranks", [])
        tree = found[rank] if isinstance(found, list) and 0 <= rank < len(found) else None
        return self._decoded(tree[key]) if isinstance(tree, dict) and key in tree else None

    def _of_ranks(self, key):
        """What each rank that has it says of `key`."""
        found = self.document.get("state", {}).get("ranks", [])
        said = (self._of_rank(rank, key) for rank in range(len(found) if isinstance(found, list) else 0))
        return [value for value in said if value]

    def random_of(self, rank):
        return self._of_rank(rank, "random")

    def slice_parts(self):
        merged = {}
        for parts in self._of_ranks("parts"):
            for name, begin, numel, values in parts:
                merged.setdefault(name, []).append((begin, numel, values))
        return merged

    def about(self, key, fallback=None):
        """A value that the manifest states about the whole: "saved_at", "tag", "world_size", "save_latest", "library"."""
        return self.document.get(key, fallback)

    # ---- data

    def _reader(self, name):
        if name not in self._readers:
            size, sums = self.files[name]
            path = os.path.join(self.path, name)
            with _naming(path):
                self._readers[name] = core().BlockReader(path, size, self._native.block_bytes, sums)
        return self._readers[name]

    def read_into(self, requests):
        by_file = {}
        for name, kind, begin, numel, dtype, buffer in requests:
            info = self.tensors[name, kind]
            stored, item = info.dtype, dtypes.item_bytes(dtype)
            if stored != dtype and not (stored in dtypes.CONVERTIBLE and dtype in dtypes.CONVERTIBLE):
                raise CheckpointError(f"{self.path}: {kind} of '{name}' is {stored} and cannot be read as {dtype}")
            target = memoryview(buffer).cast("B") if not isinstance(buffer, memoryview) else buffer
            scale = 1
            if stored not in dtypes.IN_FILES:   # copied as it lies
                scale, stored, dtype = item, "U8", "U8"
            for file, offset, at, count in self._native.parts(self._index[name, kind], begin, numel):
                part = target[at * item:(at + count) * item]
                by_file.setdefault(file, []).append((offset, count * scale, stored, dtype, part))
        for file in sorted(by_file):
            name = self._names[file]
            reader = self._reader(name)
            with _naming(os.path.join(self.path, name)):
                reader.read(by_file[file])

    def check(self, keys=None):
        wanted = self.files if keys is None else {piece[0] for key in keys for piece in self.tensors[key].pieces}
        for name in sorted(wanted):
            path, size = os.path.join(self.path, name), self.files[name][0]
            try:
                found = os.stat(path).st_size
            except OSError as error:
                raise file_error(error, f"{path}: {error.strerror}") from error
            if found != size:
                raise DamageError(f"{path} has {found} bytes, {size} were written: it was truncated or replaced")

    def verify(self):
        problems = []
        for name in self.files:
            try:
                self._reader(name).verify()
                self._compare_header(name)
            except (CheckpointError, RuntimeError, ValueError, OSError) as error:
                problems.append(str(error))
        return problems

    def _compare_header(self, name):
        """The file's own header says the same as the manifest."""
        path = os.path.join(self.path, name)
        listed = core().SafetensorsReader(path).tensors
        for info in self.tensors.values():
            for file, begin, numel, _ in info.pieces:
                if file != name:
                    continue
                entry = f"{info.kind}/{info.name}@{begin}"
                stored = info.dtype if info.dtype in dtypes.IN_FILES else "U8"
                count = numel if stored == info.dtype else numel * dtypes.item_bytes(info.dtype)
                if listed.get(entry) != (stored, [count]):
                    raise DamageError(f"{path}: the manifest names {entry} of {count} {stored}, the file's header has {listed.get(entry)}")


class _naming:
    """What goes wrong with this file becomes a CheckpointError that names it; a DamageError when its bytes are not those written."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None or isinstance(error, CheckpointError):
            return False
        if isinstance(error, (OSError, RuntimeError, MemoryError)):
            said = str(error) or type(error).__name__
            text = said if self.path in said else f"{self.path}: {said}"
            if isinstance(error, OSError):
                raise file_error(error, text) from error
            raise (DamageError if isinstance(error, core().ChecksumError) else CheckpointError)(text) from error
        return False
