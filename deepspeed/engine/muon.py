# SPDX-License-Identifier: Apache-2.0
"""The Muon optimizer of the JSON: matrices take Muon, everything else Adam."""
from deepspeed._config_keys import MUON_OPTIMIZER

_ADAM_HALF = ("embed", "lm_head")   # by name: not treated as matrices
_SHARED = ("lr", "muon_lr", "adam_lr", "momentum", "weight_decay", "betas", "eps", "ns_method")


def tag_parameters(model, params):
    """Sets `use_muon` on every parameter: at least two dimensions, and not an embedding or output head by name."""
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "use_muon"):
            parameter.use_muon = parameter.ndim >= 2 and not any(part in name for part in _ADAM_HALF)


def set_optimizer_flags(config_class, model):
    """What initialize() does for "optimizer": {"type": "Muon"}: marks the parameters Muon takes. Other optimizers need no marks."""
    if (config_class.optimizer_name or "").lower() == MUON_OPTIMIZER:
        tag_parameters(model, config_class.optimizer_params)


def muon_from_config(params, groups):
    """MuonWithAuxAdam on the groups, each split into its two halves."""
    from deepspeed.ops.muon import MuonWithAuxAdam
    options = {key: params[key] for key in _SHARED if key in params}
    halves = []
    for group in groups:
        for kind in (True, False):
            members = [p for p in group["params"] if bool(getattr(p, "use_muon", p.ndim >= 2)) is kind]
            if members:
                halves.append({**group, "params": members, "use_muon": kind})
    return MuonWithAuxAdam(halves, **options)
