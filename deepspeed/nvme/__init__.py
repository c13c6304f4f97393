# SPDX-License-Identifier: Apache-2.0
"""How fast files are in a folder, and with which settings: the commands ds_io and ds_nvme_tune. Imports no torch unless a flag asks for it."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    "ds_io_main": "deepspeed.nvme.ds_io:main",
    "sweep_main": "deepspeed.nvme.tune:main",
    **names("deepspeed.nvme.tune", "generate_main", "parse_sweep_arguments"),
})
