#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""ds_to_universal: accepted for the scripts that call it.

This library loads any checkpoint at any stage and world size without a conversion. What this writes is for DeepSpeed's own engines
("checkpoint": {"load_universal": true}), and can be loaded here as well:

    python -m deepspeed.checkpoint.ds_to_universal --input_folder run/global_step100 --output_folder run/global_step100_universal
"""
import argparse
import sys

from deepspeed.checkpoint.export.universal import universal_bytes, write_universal
from deepspeed.checkpoint.location import open_checkpoint
from deepspeed.checkpoint.recover import progress_bar


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(prog="ds_to_universal", description="Writes a checkpoint (ours, or DeepSpeed's) in DeepSpeed's universal format. "
                                     "This library itself needs no conversion to load at another stage or number of ranks.")
    parser.add_argument("--input_folder", required=True, help="one checkpoint: the folder of a tag")
    parser.add_argument("--output_folder", required=True, help="folder to write; latest_universal beside it will name it")
    parser.add_argument("--num_extract_workers", type=int, default=4, help="accepted; the work is bound by the disk")
    parser.add_argument("--num_merge_workers", type=int, default=2, help="accepted; the work is bound by the disk")
    parser.add_argument("--keep_temp_folder", action="store_true", help="accepted; there are no temporary files")
    parser.add_argument("--no_strict", dest="strict", action="store_false", help="write also when optimizer states cannot be given to parameters")
    parser.add_argument("--inject_missing_state", action="store_true", help="accepted; nothing is missing")
    return parser.parse_args(arguments)


def main(args=None):
    """args: a parsed namespace, a list of arguments, or None for the command line's."""
    args = args if isinstance(args, argparse.Namespace) else parse_arguments(args)
    source = open_checkpoint(args.input_folder)
    if getattr(args, "strict", True) and getattr(source, "unnamed", None):
        raise ValueError(f"{source.unnamed} (--no_strict writes the weights alone)")
    with progress_bar(universal_bytes(source), "universal") as advance:
        write_universal(source, args.output_folder, advance)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"ds_to_universal: {error}")
