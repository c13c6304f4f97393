# SPDX-License-Identifier: Apache-2.0
"""How much memory the model states need, before anything is allocated: training in a 2-byte type with an Adam-like optimizer.

Note [What is counted]: for each parameter 2 bytes of low-precision weight, 4 of its gradient, which is accumulated in fp32, and 12 of
optimizer state (fp32 master weight and two moments). Stage 2 keeps all weights on each device and divides the rest among the N
devices: 2 + 16/N bytes a parameter. Stage 3 divides everything and adds two gathered units, each at most the largest layer. State that
is offloaded leaves the device, its gradient with it. Host figures are per node and times `additional_buffer_factor`, which pays for
staging buffers. Activations are not counted. `deepspeed plan` says more, from the same numbers: padding, buckets, units, traffic.
"""
import sys
from typing import NamedTuple

LOW_BYTES = 2
GRADIENT_BYTES = 4   # accumulated in fp32
STATE_BYTES = 12
LOADED_BYTES = 4  # a model is built in fp32 before it is converted
UNITS_GATHERED = 2


class ModelSize(NamedTuple):
    total_params: int
    largest_layer_params: int


def model_size(model):
    """Parameters of the model and of its largest single module (not counting submodules); a shared parameter counts once."""
    total = sum(_numel(parameter) for parameter in dict.fromkeys(model.parameters()))
    largest = max((sum(_numel(p) for p in module.parameters(recurse=False)) for module in model.modules()), default=0)
    return ModelSize(total, largest)


def _numel(parameter):
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def _loading_bytes(total_params, processes_per_node):
    return LOADED_BYTES * total_params * processes_per_node


def estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node=1, num_nodes=1, cpu_offload=True,
                                          additional_buffer_factor=1.5):
    """(host bytes per node, device bytes per device) of stage 2; `cpu_offload` is that of the optimizer states."""
    devices = num_gpus_per_node * num_nodes
    loading = _loading_bytes(total_params, num_gpus_per_node)
    if cpu_offload:
        device_bytes = LOW_BYTES * total_params
        host_bytes = max(loading, (STATE_BYTES + GRADIENT_BYTES) * total_params / num_nodes)
    else:
        device_bytes = LOW_BYTES * total_params + (GRADIENT_BYTES + STATE_BYTES) * total_params / devices
        host_bytes = loading
    return int(host_bytes * additional_buffer_factor), int(device_bytes)


def estimate_zero3_model_states_mem_needs(total_params, largest_layer_params, num_gpus_per_node=1, num_nodes=1, cpu_offload=True,
                                          cpu_offload_params=True, zero_init=True, additional_buffer_factor=1.5):
    """(host bytes per node, device bytes per device, bytes of two gathered layers) of stage 3.

    zero_init: the model is built under zero.Init, so that no process ever holds all of it.
    """
    devices = num_gpus_per_node * num_nodes
    gathered = UNITS_GATHERED * LOW_BYTES * largest_layer_params
    if zero_init:
        loading = LOADED_BYTES * largest_layer_params * num_gpus_per_node
    else:
        loading = _loading_bytes(total_params, num_gpus_per_node)
    per_device = per_node = 0
    if cpu_offload:
        per_node += STATE_BYTES + GRADIENT_BYTES
    else:
        per_device += GRADIENT_BYTES + STATE_BYTES
    if cpu_offload and cpu_offload_params:
        per_node += LOW_BYTES
    else:
        per_device += LOW_BYTES
    host_bytes = max(loading, per_node * total_params / num_nodes)
    return int(host_bytes * additional_buffer_factor), int(gathered + per_device * total_params / devices), gathered


# ------------------------------------------------------------------------------------------------------------- tables
def _header(size, num_gpus_per_node, num_nodes, with_layer):
    layer = f", {size.largest_layer_params / 1e6:.0f}M largest layer params" if with_layer else ""
    return (f"Estimated memory needed for params, optim states and gradients for a:\n"
            f"HW: Setup with {num_nodes} node{'s' if num_nodes > 1 else ''}, "
            f"{num_gpus_per_node} GPU{'s' if num_gpus_per_node > 1 else ''} per node.\n"
            f"SW: Model with {size.total_params / 1e6:.0f}M total params{layer}.\n"
            f"  per CPU  |  per GPU |   Options")


def _place(offloaded):
    return "cpu" if offloaded else "none"


def _row(host_bytes, device_bytes, options):
    settings = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{host_bytes / 2**30:8.2f}GB | {device_bytes / 2**30:6.2f}GB | {settings}"


def _print(lines):
    sys.stdout.write("\n".join(lines) + "\n")


def estimate_zero2_model_states_mem_needs_all_cold(total_params, num_gpus_per_node=1, num_nodes=1, additional_buffer_factor=1.5):
    """Prints what stage 2 needs with and without optimizer offload, from the number of parameters alone."""
    lines = [_header(ModelSize(int(total_params), 0), num_gpus_per_node, num_nodes, with_layer=False)]
    for cpu_offload in (True, False):
        host, device = estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node, num_nodes, cpu_offload,
                                                             additional_buffer_factor)
        lines.append(_row(host, device, {"offload_optimizer": _place(cpu_offload)}))
    _print(lines)


def estimate_zero2_model_states_mem_needs_all_live(model, num_gpus_per_node=1, num_nodes=1, additional_buffer_factor=1.5):
    """The same for a model that exists."""
    total_params = model_size(model).total_params
    estimate_zero2_model_states_mem_needs_all_cold(total_params, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_cold(total_params, largest_layer_params, num_gpus_per_node=1, num_nodes=1,
                                                   additional_buffer_factor=1.5):
    """Prints what stage 3 needs under every combination of offload and zero.Init, from two numbers."""
    size = ModelSize(int(total_params), int(largest_layer_params))
    lines = [_header(size, num_gpus_per_node, num_nodes, with_layer=True)]
    for offload_param, offload_optimizer in ((True, True), (False, True), (False, False)):
        for zero_init in (True, False):
            host, device, _ = estimate_zero3_model_states_mem_needs(
                total_params, largest_layer_params, num_gpus_per_node, num_nodes, offload_optimizer, offload_param, zero_init,
                additional_buffer_factor)
            options = {"offload_param": _place(offload_param), "offload_optimizer": _place(offload_optimizer),
                       "zero_init": int(zero_init)}
            lines.append(_row(host, device, options))
    _print(lines)


def estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=1, num_nodes=1, additional_buffer_factor=1.5):
    """The same for a model that exists."""
    size = model_size(model)
    estimate_zero3_model_states_mem_needs_all_cold(size.total_params, size.largest_layer_params, num_gpus_per_node, num_nodes,
                                                   additional_buffer_factor)
