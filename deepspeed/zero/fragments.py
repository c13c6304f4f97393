# SPDX-License-Identifier: Apache-2.0
"""Where a parameter's slice lies in a flat tensor; checkpoints pickle these.

The functions serve callers that keep such flat tensors themselves. An engine's own parameters are reached by deepspeed.utils.safe_get_*.
"""
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
    gradient_dict: object = None           # {param group: [gradient of each fragment]}
    offload_gradient_dict: object = None   # the same in host memory, used when use_offload
    use_offload: bool = False
    param_group_index: int = 0
    optim_fragment: object = None          # {name of a state: this fragment's part of it}

    def get_lp_fragment_address(self):
        return self.lp_fragment_address

    def get_hp_fragment(self):
        return self.hp_fragment

    def update_hp(self):
        self.hp_fragment.data.copy_(self.lp_fragment.data)

    def update_lp(self):
        self.lp_fragment.data.copy_(self.hp_fragment.data)

    def get_lp_grad_fragment(self, index_in_param_group):
        gradients = self.offload_gradient_dict if self.use_offload else self.gradient_dict
        return gradients[self.param_group_index][index_in_param_group]

    def get_optim_state_keys(self):
        return list(self.optim_fragment)

    def get_optim_state_fragment(self, key):
        if not self.optim_fragment or key not in self.optim_fragment:
            raise ValueError(f"the optimizer has no state {key!r} for this fragment; it has {sorted(self.optim_fragment or ())}")
        return self.optim_fragment[key]


def get_hp_fragment_mapping(lp_param, lp_start, flat_hp_partition, gradient_dict, offload_gradient_dict, use_offload, param_group_index,
                            partition_start, partition_size):
    """The tensor_fragment where `lp_param`, which begins at `lp_start` of the whole flat tensor, meets the partition
    [partition_start, partition_start + partition_size) that `flat_hp_partition` holds. Its tensors are views."""
    begin = max(lp_start, partition_start)
    numel = min(lp_start + lp_param.numel(), partition_start + partition_size) - begin
    if numel <= 0:
        raise ValueError(f"the parameter [{lp_start}, {lp_start + lp_param.numel()}) does not meet the partition "
                         f"[{partition_start}, {partition_start + partition_size})")
    lp, hp = fragment_address(numel, begin - lp_start), fragment_address(numel, begin - partition_start)
    return tensor_fragment(lp_param.data.flatten().narrow(0, lp.start, numel), lp, flat_hp_partition.narrow(0, hp.start, numel), hp,
                           gradient_dict, offload_gradient_dict, use_offload, param_group_index)


def link_hp_params(lp_param_list, flat_hp_partition, gradient_dict, offload_gradient_dict, use_offload, param_group_index,
                   partition_start, partition_size, dp_group, param_offsets=None):
    """Sets `_hp_mapping` of each parameter to its fragment in this rank's partition, None where it has none, and `_dp_group`.

    Parameters lie one behind the other in the whole flat tensor, or where `param_offsets` ({parameter: begin}) says.
    """
    begin = 0
    for parameter in lp_param_list:
        begin = param_offsets[parameter] if param_offsets is not None else begin
        meets = begin < partition_start + partition_size and begin + parameter.numel() > partition_start
        parameter._hp_mapping = get_hp_fragment_mapping(
            parameter, begin, flat_hp_partition, gradient_dict, offload_gradient_dict, use_offload, param_group_index, partition_start,
            partition_size) if meets else None
        parameter._dp_group = dp_group
        begin += parameter.numel()


def _linked(parameters):
    return [p._hp_mapping for p in parameters if getattr(p, "_hp_mapping", None) is not None]


def lazy_init_hp_params_optimizer_state(lp_param_list, flat_hp_partition, optimizer_state):
    """Once optimizer_state[flat_hp_partition] exists: every linked parameter's fragment shows its part of each state."""
    states = {key: value for key, value in optimizer_state[flat_hp_partition].items()
              if torch.is_tensor(value) and value.numel() == flat_hp_partition.numel() and value.dim() > 0}
    for fragment in _linked(lp_param_list):
        where = fragment.hp_fragment_address
        if fragment.optim_fragment is None:
            fragment.optim_fragment = {key: value.view(-1).narrow(0, where.start, where.numel) for key, value in states.items()}


def map_to_flat_opt_states(flat_hp_tensor, lp_tensors, optim_state, opt_keys):
    """Joins the states that linked parameters hold by themselves into optim_state[flat_hp_tensor][key], flat tensors of which the
    fragments become views. What no parameter covers is zero."""
    for key in opt_keys:
        flat = torch.zeros_like(flat_hp_tensor)
        for fragment in _linked(lp_tensors):
            where = fragment.hp_fragment_address
            part = flat.view(-1).narrow(0, where.start, where.numel)
            part.copy_(fragment.get_optim_state_fragment(key).reshape(-1))
            fragment.optim_fragment[key] = part
        optim_state[flat_hp_tensor][key] = flat
