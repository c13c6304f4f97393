# SPDX-License-Identifier: Apache-2.0
"""Every operation that a builder stands for: {name: builder}, and {name: whether it works here}."""
from deepspeed.ops import op_builder

ALL_OPS = {builder.NAME: builder for builder in (getattr(op_builder, name)() for name in op_builder.__all__)}
COMPATIBLE_OPS = {name: builder.is_compatible() for name, builder in ALL_OPS.items()}
