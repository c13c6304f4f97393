# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in rooms that do not exist yet."""
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {
}, {
    **dict.fromkeys(("LinearAllreduce", "LinearLayer", "set_autotp_mode", "AutoTPConfig", "AutoTPPresets", "TPLayerSpec",
                     "PartitionType", "ReplaceWithTensorSlicing", "layers", "auto_ep_layer"), "tensor parallel training"),
    **dict.fromkeys(("replace_transformer_layer", "revert_transformer_layer", "HFBertLayerPolicy", "DSPolicy"), "inference"),
})
