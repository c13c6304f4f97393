# SPDX-License-Identifier: Apache-2.0
"""Constants of the process group and the launcher, under the names callers import."""
from datetime import timedelta

from deepspeed._environment import read

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
default_pg_timeout = timedelta(minutes=read("DEEPSPEED_TIMEOUT"))

CROSS_RANK = "CROSS_RANK"
CROSS_SIZE = "CROSS_SIZE"
LOCAL_RANK = "LOCAL_RANK"

INFERENCE_GENERIC_MODE = "generic"
INFERENCE_SPECIALIZED_MODE = "specialized"
