# SPDX-License-Identifier: Apache-2.0
"""Names of modules and parameters for debug output. The name is written on the object itself."""

_NAME = "_debug_name"


def debug_extract_module_and_param_names(model):
    """Writes its full name on every module and parameter of the model."""
    for name, module in model.named_modules():
        object.__setattr__(module, _NAME, name)
    for name, parameter in model.named_parameters():
        setattr(parameter, _NAME, name)


def debug_clear_module_and_param_names(model):
    """Takes the names off again."""
    for thing in [*model.modules(), *model.parameters()]:
        thing.__dict__.pop(_NAME, None)


def debug_module2name(module):
    return module.__dict__.get(_NAME, "unknown")


def debug_module2name_class(module):
    return f"name={debug_module2name(module)} class={type(module).__name__}"


def debug_param2name(param):
    return getattr(param, _NAME, "unknown")


def debug_param2name_id(param):
    return f"name={debug_param2name(param)} id={getattr(param, 'ds_id', 'none')}"


def debug_param2name_id_shape(param):
    return f"{debug_param2name_id(param)} shape={tuple(getattr(param, 'ds_shape', param.shape))}"
