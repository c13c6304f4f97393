# SPDX-License-Identifier: Apache-2.0
"""A folder's checkpoint, whoever wrote it. Needs no torch."""
import os

from deepspeed.checkpoint.source import CheckpointError


def is_tag_folder(folder):
    """Whether `folder` itself is a checkpoint: ours, or of DeepSpeed."""
    from deepspeed.checkpoint import manifest
    from deepspeed.checkpoint.foreign.folder import is_foreign
    return manifest.is_checkpoint(folder) or is_foreign(folder)


def tag_folder(folder, tag=None):
    """The checkpoint that `tag`, or the file `latest`, means in `folder`; or `folder`, when it is a checkpoint itself."""
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: there is no such folder")
    if tag is None and is_tag_folder(folder):
        return folder
    if tag is None:
        tag = _latest(folder)
    found = os.path.join(folder, str(tag))
    if not os.path.isdir(found):
        raise CheckpointError(f"{folder}: there is no checkpoint '{tag}'; there are: {', '.join(tags(folder)) or 'none'}")
    return found


def _latest(folder):
    for name in ("latest", "latest_universal"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                tag = file.read().strip()
            if tag:
                return tag
    raise CheckpointError(f"{folder}: no file 'latest' says which checkpoint is meant; there are: {', '.join(tags(folder)) or 'none'}")


def tags(folder):
    """Names of the checkpoints in `folder`, the oldest first."""
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith(".") and is_tag_folder(entry.path):
            found.append((entry.stat().st_mtime, entry.name))
    return [name for _, name in sorted(found)]


def open_checkpoint(folder, tag=None, group_names=None):
    """The CheckpointSource of `folder` (of its `tag`). group_names: see ForeignCheckpoint. Raises CheckpointError naming the file."""
    from deepspeed.checkpoint import manifest
    found = tag_folder(folder, tag)
    if manifest.is_checkpoint(found):
        return manifest.Checkpoint(found)
    from deepspeed.checkpoint.foreign.folder import is_foreign
    if is_foreign(found):
        from deepspeed.checkpoint.foreign.adapter import ForeignCheckpoint
        return ForeignCheckpoint(found, group_names)
    raise CheckpointError(f"{found}: is no checkpoint: there is neither manifest.json nor a file of DeepSpeed's model states")
