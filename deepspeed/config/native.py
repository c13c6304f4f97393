# SPDX-License-Identifier: Apache-2.0
"""The compiled reader, and what it exports under this package's name."""
from deepspeed._native import core

reader = core().config
DeepSpeedConfigError = reader.DeepSpeedConfigError
documentation = reader.documentation
