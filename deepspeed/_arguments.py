# SPDX-License-Identifier: Apache-2.0
"""Command line arguments for training scripts."""
import argparse


def add_config_arguments(parser):
    """Adds --deepspeed and --deepspeed_config to an argparse parser and returns it."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", default=False, action="store_true",
                       help="train with DeepSpeed; a flag for the script, the library does not read it")
    group.add_argument("--deepspeed_config", default=None, type=str, help="the JSON configuration file")
    group.add_argument("--deepscale", default=False, action="store_true", help=argparse.SUPPRESS)  # the old names
    group.add_argument("--deepscale_config", default=None, type=str, help=argparse.SUPPRESS)
    return parser
