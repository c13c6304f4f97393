# SPDX-License-Identifier: Apache-2.0
"""Whole weights out of a sharded model, holding one unit at a time."""
from deepspeed.zero.gathered import GatheredParameters


def full_state_dict(module, keep, exclude_frozen=False):
    """Parameters and persistent buffers on the CPU where `keep` is true, else None. Tied parameters share one tensor. Collective
    when the model is sharded."""
    state, copies = {}, {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = prefix + "." if prefix else ""
        parameters = {name: p for name, p in owner._parameters.items() if p is not None and not (exclude_frozen and not p.requires_grad)}
        with GatheredParameters(list(parameters.values())):
            for name, parameter in parameters.items():
                if keep:
                    if id(parameter) not in copies:
                        copies[id(parameter)] = parameter.detach().to("cpu", copy=True)
                    state[dot + name] = copies[id(parameter)]
        if keep:
            for name, buffer in owner._buffers.items():
                if buffer is not None and name not in owner._non_persistent_buffers_set:
                    state[dot + name] = buffer.detach().to("cpu", copy=True)
    return state if keep else None

