# SPDX-License-Identifier: Apache-2.0
"""Where the states of a model rest."""
from deepspeed.zero.managed import home_of


def get_state_devices(model, state):
    """The devices that hold a kind of state ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer" or the enum)."""
    kind = getattr(state, "value", state)
    devices = set()
    for parameter in model.parameters():
        home = home_of(parameter)
        optimizer = getattr(home.owner, "optimizer", None) if home is not None else None
        if home is None or optimizer is None:
            continue
        if kind == "optim_states" and not optimizer.stepper.steps:
            continue
        devices.add(home.owner.device)
    return devices
