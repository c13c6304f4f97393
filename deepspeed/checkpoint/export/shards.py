# SPDX-License-Identifier: Apache-2.0
"""A model's weights in files of limited size with an index, as transformers' from_pretrained and torch users expect them."""
import json
import os
import re

from deepspeed.checkpoint.export.stream import Written, nbytes, whole_file, write_safetensors, write_torch

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(size):
    """Bytes of 500, "500MB" or "5GiB"; None: no limit."""
    if size is None or isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = (match[2].upper() or "B") if match else ""
    if unit not in _UNITS:
        raise ValueError(f"size {size!r}: expected a number with one of {', '.join(_UNITS)}, like '5GB'")
    return int(float(match[1]) * _UNITS[unit])


def plan_shards(sizes, limit):
    """Lists of names, in order, each of at most `limit` bytes together; a tensor that is larger alone has a file alone."""
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or (limit is not None and size > room):
            shards.append([])
            room = limit if limit is not None else 0
        shards[-1].append(name)
        room -= size
    return shards


def write_weights(weights, folder, dtype=None, max_shard_size="5GB", safe=True, progress=None):
    """`weights` (Weights) as model*.safetensors or pytorch_model*.bin, with an index when there are several files; returns the paths.

    Tied weights are stored once: safetensors names the other names in its metadata, the pickled form lists both for one storage.
    """
    os.makedirs(folder, exist_ok=True)
    sizes = {name: nbytes(tensor, dtype) for name, tensor in weights.tensors.items()}
    shards = plan_shards(sizes, parse_size(max_shard_size)) or [[]]
    stem, extension = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    twins = {}
    for alias, name in weights.aliases.items():
        twins.setdefault(name, []).append(alias)
    paths, weight_map = [], {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.{extension}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{extension}"
        paths.append(os.path.join(folder, file))
        _write_one(paths[-1], {name: weights.tensors[name] for name in names}, twins, dtype, safe, progress)
        for name in names:
            weight_map[name] = file
            if not safe:
                weight_map.update(dict.fromkeys(twins.get(name, ()), file))
    _write_index(folder, f"{stem}.{extension}.index.json", weight_map if len(shards) > 1 else None, sum(sizes.values()))
    return paths


def _write_one(path, tensors, twins, dtype, safe, progress):
    if safe:
        metadata = {"format": "pt"}
        metadata.update((alias, name) for name in tensors for alias in twins.get(name, ()))
        write_safetensors(path, tensors, dtype, metadata, progress)
        return
    state = {}
    for name, tensor in tensors.items():
        written = Written(tensor, dtype)
        state[name] = written
        state.update(dict.fromkeys(twins.get(name, ()), written))
    write_torch(path, state, progress)


def _write_index(folder, name, weight_map, total):
    path = os.path.join(folder, name)
    if weight_map is None:
        if os.path.exists(path):
            os.unlink(path)   # of an earlier conversion into several files, which this one replaces
        return
    with whole_file(path) as file:
        file.write((json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode())
