# SPDX-License-Identifier: Apache-2.0
"""Where programs look for operations that elsewhere are compiled at first use. Here they are part of the package."""
from deepspeed._lazy import attach, names

_NOT_BUILT = {
    **dict.fromkeys(("TransformerBuilder", "StochasticTransformerBuilder"), "the fused transformer layer"),
    **dict.fromkeys(("InferenceBuilder", "InferenceCoreBuilder", "InferenceCutlassBuilder", "RaggedOpsBuilder", "RaggedUtilsBuilder",
                     "SpatialInferenceBuilder"), "inference"),
    **dict.fromkeys(("EvoformerAttnBuilder",), "the attention of structure models"),
    **dict.fromkeys(("GDSBuilder",), "reading files straight into a GPU's memory"),
    **dict.fromkeys(("DeepCompileBuilder",), "ZeRO as passes of the compiler"),
}

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.ops.aio", "AsyncIOBuilder"),
    **names("deepspeed.ops.op_builder.kernels",
            "CPUAdagradBuilder", "CPUAdamBuilder", "CPULionBuilder", "FusedAdamBuilder", "FusedLambBuilder", "FusedLionBuilder"),
    "all_ops": "deepspeed.ops.op_builder.all_ops",
}, _NOT_BUILT)
