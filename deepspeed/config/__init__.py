# SPDX-License-Identifier: Apache-2.0
"""The JSON configuration: read, checked and resolved once, in C++ (csrc/config). Importing this imports no torch."""
from .facade import Config, Section, load_config
from .legacy import DeepSpeedConfig, DeepSpeedConfigWriter
from .native import DeepSpeedConfigError, documentation
from .world import World, find_world

__all__ = [
    "Config", "DeepSpeedConfig", "DeepSpeedConfigError", "DeepSpeedConfigWriter", "Section", "World", "documentation", "find_world",
    "load_config"
]
