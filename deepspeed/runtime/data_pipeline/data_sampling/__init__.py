# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.data."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **{name: f"deepspeed.runtime.data_pipeline.data_sampling.{name}" for name in ("data_analyzer", "data_sampler", "indexed_dataset", "utils")},
})
