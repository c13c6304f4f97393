# SPDX-License-Identifier: Apache-2.0
"""What the launcher says about this process, before there is a process group. Import path users have."""
from deepspeed.comm import rendezvous


def _from_launcher(field, default):
    found = rendezvous.find()
    return default if found is None else getattr(found, field)


def get_local_rank_from_launcher():
    return _from_launcher("local_rank", 0)


def get_world_rank_from_launcher():
    return _from_launcher("rank", 0)


def get_world_size_from_launcher():
    return _from_launcher("world_size", 1)
