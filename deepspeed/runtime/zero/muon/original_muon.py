# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.ops."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.ops.muon",
            "Muon", "SingleDeviceMuon", "SingleDeviceMuonWithAuxAdam", "MuonWithAuxAdam", "muon_update",
            "zeropower_via_gram_newtonschulz", "zeropower_via_newtonschulz5"),
})
