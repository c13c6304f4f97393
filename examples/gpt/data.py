# SPDX-License-Identifier: Apache-2.0
"""The source text of Python's standard library: real text that is on every machine."""

import hashlib
import math
import os
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

# Not everybody's Python has its tests, and installed packages differ from machine to machine.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
VALIDATION_SHARE = 20  # one file in 20


def source_files() -> list[Path]:
    """The library's .py files, in an order that depends on their names only."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def is_validation(path: Path) -> bool:
    """Whole files are held out, so that no half of a repeated passage is in both parts."""
    name = path.relative_to(sysconfig.get_path("stdlib")).as_posix()
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0


def text(part: str, folder: str | None = None) -> np.ndarray:
    """The ``train`` or ``validation`` bytes, memory-mapped from a file that the first caller writes."""
    folder = Path(folder or Path(tempfile.gettempdir()) / f"python-source-text-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}-{sysconfig.get_python_version()}.bin"
    if not path.exists():
        files = [file for file in source_files() if is_validation(file) == (part == "validation")]
        # Several ranks may come here at once: each writes its own file, and the rename is atomic.
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
            for file in files:
                out.write(file.read_bytes() + b"\n")
        os.replace(out.name, path)
    return np.memmap(path, dtype=np.uint8, mode="r")


def unigram_entropy(data: np.ndarray) -> float:
    """Bits per byte that a model reaches which knows only how frequent each byte is."""
    counts = np.bincount(data, minlength=256)
    return -sum(c / len(data) * math.log2(c / len(data)) for c in counts.tolist() if c)


class Windows(Dataset):
    """Consecutive windows of ``context`` bytes and the byte after each: (tokens, targets), int64 [context]."""

    def __init__(self, data: np.ndarray, context: int):
        self.data = data
        self.context = context

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int):
        start = index * self.context
        window = torch.from_numpy(self.data[start:start + self.context + 1].astype(np.int64))
        return window[:-1], window[1:]
