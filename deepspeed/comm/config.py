# SPDX-License-Identifier: Apache-2.0
"""The comms_logger section as an object, for callers that build one by hand."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CommsLoggerConfig:
    enabled: bool = False
    prof_all: bool = True
    prof_ops: list = field(default_factory=list)
    verbose: bool = False
    debug: bool = False


class DeepSpeedCommsConfig:
    """`comms_logger` of a configuration dict, and whether it was there."""

    def __init__(self, ds_config):
        section = ds_config.get("comms_logger")
        self.comms_logger_enabled = section is not None
        self.comms_logger = CommsLoggerConfig(**section) if section is not None else None
