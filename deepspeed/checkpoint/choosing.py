# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a load means: the tag asked for, else what `latest` names, else the newest that is good."""
import os
import re

from deepspeed.checkpoint import folders, manifest
from deepspeed.checkpoint.foreign.folder import is_foreign
from deepspeed.checkpoint.source import CheckpointError, DamageError
from deepspeed.telemetry import logger


def open_source(folder, group_names=None):
    """The CheckpointSource in a folder, ours or DeepSpeed's. CheckpointError when there is none that can be read. group_names: the
    parameters of each of the optimizer's groups, for files that number instead of naming them (foreign/stage0.py)."""
    if not manifest.is_checkpoint(folder) and is_foreign(folder):
        from deepspeed.checkpoint.foreign.adapter import ForeignCheckpoint
        return ForeignCheckpoint(folder, group_names)
    return manifest.Checkpoint(folder)


def candidates(load_dir, tag=None, names=(folders.LATEST,)):
    """Folders to try, best first; [] when nothing in load_dir was meant to be continued from.

    names: files that may hold the latest tag.
    """
    if tag is not None:
        return [_place_of(folders.target_of(load_dir, tag))]
    found = []
    for name in names:
        latest = folders.read_latest(load_dir, name)
        if latest is not None:
            try:
                found.append(_place_of(folders.target_of(load_dir, latest)))
            except ValueError as error:
                logger.warning(f"checkpoint: {os.path.join(load_dir, name)}: {error}")
            break
    for checkpoint in folders.complete_checkpoints(load_dir):
        if checkpoint.path not in found and checkpoint.about("save_latest"):
            found.append(checkpoint.path)
    return found


def _place_of(target):
    """The folder itself; or, where its writer was killed while the folders of one tag changed places, the newest whole one under a
    temporary name."""
    if os.path.isdir(target):
        return target
    parent, name = os.path.split(target)
    for checkpoint in folders.complete_checkpoints(parent):
        if re.fullmatch(rf"\.{re.escape(name)}\.part-[0-9a-f]{{16}}", os.path.basename(checkpoint.path)):
            logger.warning(f"checkpoint: there is no {target}, but {checkpoint.path} is whole and takes its place")
            return checkpoint.path
    return target


def load_best(found, explicit, attempt):
    """attempt(folder) for one candidate after the other until one is whole; its result.

    Only damage leads to the next one: what does not fit the model, or fails for want of memory, must not become an older checkpoint.
    With a tag asked for there is only that one, and its error is raised. CheckpointError when none is good.
    """
    reasons = []
    for number, folder in enumerate(found):
        try:
            result = attempt(folder)
        except CheckpointError as error:
            if explicit or number + 1 == len(found) or not isinstance(error, DamageError):
                if not reasons:
                    raise
                raise CheckpointError("no checkpoint could be loaded:\n  " + "\n  ".join([*reasons, str(error)])) from error
            reasons.append(str(error))
            logger.warning(f"checkpoint {folder} is skipped: {error}")
            continue
        if reasons:
            logger.warning(f"loaded {folder} instead")
        return result
    return None
