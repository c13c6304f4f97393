# SPDX-License-Identifier: Apache-2.0
"""Objects that save and load one file of torch's, as callers of the known package make for themselves. This library's engines do not use them."""
import abc
import os
from dataclasses import dataclass

import torch


@dataclass
class CheckpointCommitInfo:
    """Which checkpoint files belong to."""
    tag: str
    save_dir: str
    save_latest: bool


class CheckpointEngine(abc.ABC):
    """create(info), save(state, path) of each file, then commit(info); load(path) by itself."""

    def __init__(self, config_params=None):
        self.name = type(self).__name__

    @abc.abstractmethod
    def create(self, info):
        """A checkpoint begins."""

    @abc.abstractmethod
    def save(self, state_dict, path):
        """Writes one file."""

    @abc.abstractmethod
    def load(self, path, map_location=None):
        """What save() was given."""

    @abc.abstractmethod
    def commit(self, info):
        """All files are written; True."""

    def makedirs(self, path, exist_ok=False):
        os.makedirs(path, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank):
        """Whether the rank writes what all hold."""
        return dp_rank == 0

    def is_decoupled(self):
        """Whether save() returns before the file is written."""
        return False

    def set_commit_info(self, info):
        pass

    def get_commit_info(self):
        return None

    def cleanup(self):
        pass

    def preserves_storage_sharing(self):
        return True


class TorchCheckpointEngine(CheckpointEngine):
    """torch.save and torch.load. A file appears whole or not at all. load() admits what torch considers safe (weights_only)."""

    def create(self, info):
        pass

    def save(self, state_dict, path):
        part = f"{path}.part-{os.getpid()}"
        try:
            torch.save(state_dict, part)
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.unlink(part)

    def load(self, path, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info):
        return True
