#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Whole fp32 weights out of a training checkpoint. Checkpoints have a script that runs this:

    python zero_to_fp32.py . output_dir [--safe_serialization] [--max_shard_size 5GB] [-t TAG] [--exclude_frozen_parameters]
"""
from deepspeed.checkpoint.recover import (convert_zero_checkpoint_to_fp32_state_dict, convert_zero_checkpoint_to_state_dict,  # noqa: F401
                                          get_checkpoint_files, get_fp32_state_dict_from_zero_checkpoint, get_model_state_file,
                                          get_model_state_files, get_optim_files, load_state_dict_from_zero_checkpoint, main, parse_model_states,
                                          parse_optim_states, to_torch_tensor, zero_model_state)

if __name__ == "__main__":
    main()
