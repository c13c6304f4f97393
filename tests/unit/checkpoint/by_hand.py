# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of our format without an engine."""
import torch

from deepspeed._native import core
from deepspeed.checkpoint import manifest
from deepspeed.checkpoint.source import TensorInfo
from deepspeed.checkpoint.tree import Encoder


def write_checkpoint(source, folder, ranks, **about):
    """`source` as that many ranks would have written it: each holds an even part of every tensor. about: of the manifest."""
    folder.mkdir(parents=True)
    held = [[] for _ in range(ranks)]
    for (name, kind), info in source.tensors.items():
        whole, step = source.read(name, kind).reshape(-1), -(-info.numel // ranks)
        for rank in range(ranks):
            part = whole[rank * step:(rank + 1) * step]
            if part.numel():
                held[rank].append((info, rank * step, part))
    files, pieces = [], {}
    for rank, entries in enumerate(held):
        # Widest elements first: each entry begins at a multiple of its element's size.
        entries.sort(key=lambda entry: -entry[2].element_size())
        file = f"state_{rank:05d}_of_{ranks:05d}.safetensors"
        stream = core().SafetensorsStream(str(folder / file), [(f"{info.kind}/{info.name}@{begin}", info.dtype, [part.numel()]) for info, begin, part in entries],
                                          {"format": manifest.FORMAT}, manifest.BLOCK_BYTES, False)
        for (info, begin, part), offset in zip(entries, stream.offsets):
            pieces.setdefault((info.name, info.kind), []).append((rank, begin, part.numel(), offset))
        stream.write([part.view(torch.uint8).numpy() for _, _, part in entries])
        size, sums = stream.finish()
        files.append((file, size, sums))
    tensors = [TensorInfo(info.name, info.kind, info.dtype, info.shape, (), tuple(pieces[key])) for key, info in source.tensors.items()]

    def nothing_large(tensor, path):
        raise AssertionError(f"{path}: too large to be written by hand")

    text = manifest.manifest_text(files, tensors, source.aliases, Encoder(nothing_large).encode(source.state), {"world_size": ranks, **about})
    (folder / manifest.NAME).write_text(text) if isinstance(text, str) else (folder / manifest.NAME).write_bytes(text)
