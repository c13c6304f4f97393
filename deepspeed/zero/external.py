# SPDX-License-Identifier: Apache-2.0
"""Parameters that a module uses in its forward without owning them."""
import torch

_LIST = "_ds_external_parameters"


def register_external_parameter(module, parameter):
    """Gathers `parameter` whenever `module` runs. Works before and after initialize(); repeating it changes nothing."""
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError(f"register_external_parameter: expected a torch.nn.Parameter, got {type(parameter).__name__}")
    registered = module.__dict__.setdefault(_LIST, [])
    if any(p is parameter for p in registered):
        return
    registered.append(parameter)
    from deepspeed.zero.managed import home_of
    home = home_of(parameter)
    if home is not None and home.owner.shards_params and not home.owner.store.is_persistent(home.unit):
        home.owner.scheduler.share(home.unit)
        home.owner.module_hooks.hook_module(module, [home.unit], [], [home.unit])  # freed when the outermost module is done


def unregister_external_parameter(module, parameter):
    """Undoes register_external_parameter for models that have no engine yet; a later engine does not see the parameter there."""
    registered = module.__dict__.get(_LIST, [])
    if not any(p is parameter for p in registered):
        raise RuntimeError("unregister_external_parameter: the parameter is not registered on this module")
    registered[:] = [p for p in registered if p is not parameter]
