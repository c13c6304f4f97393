#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Whole weights of a chosen dtype out of a training checkpoint. Checkpoints have a script that runs this:

    python zero_to_torch.py . output_dir --dtype bf16 [--safe_serialization] [--max_shard_size 5GB] [-t TAG] [--exclude_frozen_parameters]
"""
from deepspeed.checkpoint.recover import convert_zero_checkpoint_to_state_dict, main  # noqa: F401

if __name__ == "__main__":
    main(with_dtype=True)
