# SPDX-License-Identifier: Apache-2.0
"""Where a parameter's slice lies in a flat tensor; checkpoints pickle these."""
from dataclasses import dataclass

import torch


@dataclass
class fragment_address:
    numel: int
    start: int


@dataclass
class tensor_fragment:
    """A slice of a low-precision parameter and of the fp32 tensor it is updated from."""

    lp_fragment: torch.Tensor
    lp_fragment_address: fragment_address
    hp_fragment: torch.Tensor
    hp_fragment_address: fragment_address

    def get_lp_fragment_address(self):
        return self.lp_fragment_address

    def get_hp_fragment(self):
        return self.hp_fragment

    def update_hp(self):
        self.hp_fragment.data.copy_(self.lp_fragment.data)

    def update_lp(self):
        self.lp_fragment.data.copy_(self.hp_fragment.data)
