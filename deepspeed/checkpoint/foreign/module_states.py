# SPDX-License-Identifier: Apache-2.0
"""What a *_model_states.pt of DeepSpeed says about the model and the run."""
from deepspeed.checkpoint.foreign.contents import ForeignCheckpointError, whole
from deepspeed.checkpoint.foreign.tensor_ref import TensorRef

# Top-level keys that are DeepSpeed's; the others are the caller's client_state.
_OWN = {"module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "lr_scheduler",
        "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
        "checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info", "ds_autoep_layers", "autoep_layers", "folding",
        "sparse_tensor_module_names", "num_experts", "expert_key_prefix"}


def check(state, path):
    if not isinstance(state, dict) or "module" not in state:
        raise ForeignCheckpointError(f"{path}: is not a file of model states: it has no 'module'")
    for key in ("ds_autoep_layers", "autoep_layers"):
        if state.get(key):
            raise ForeignCheckpointError(f"{path}: a model of experts ('{key}') cannot be read yet")
    if (state.get("mp_world_size") or 1) != 1:
        raise ForeignCheckpointError(f"{path}: was written with {state['mp_world_size']} model-parallel ranks, which cannot be read yet")
    return state


def read_run(contents, state):
    """Counters, scheduler, configuration and the caller's own entries."""
    contents.version = state.get("ds_version")
    contents.world_size = state.get("dp_world_size") or 1
    contents.engine = {key: state[key] for key in ("global_steps", "global_samples", "skipped_steps") if state.get(key) is not None}
    contents.lr_scheduler = state.get("lr_scheduler")
    contents.data_sampler = state.get("data_sampler")
    contents.random_ltd = state.get("random_ltd")
    contents.config = state.get("ds_config")
    contents.client_state = {key: value for key, value in state.items() if key not in _OWN}


def read_module(contents, state, with_weights=True):
    """Buffers, and with `with_weights` all weights as stored; names that share one storage become aliases of the first."""
    module = state["module"]
    buffers = set(state.get("buffer_names") or ())
    contents.aliases.update(state.get("shared_params") or {})
    first = {}
    for name, value in module.items():
        if not isinstance(value, TensorRef):
            continue  # get_extra_state() of a module
        if name in buffers:
            contents.add(whole("buffer", name, value))
        elif with_weights and name not in contents.aliases:
            known = first.setdefault((id(value.storage), value.offset, value.shape, value.stride), name) if value.numel else name
            if known == name:
                contents.add(whole("weight", name, value))
            else:
                contents.aliases[name] = known


def shapes_of(state, path):
    """[(name, shape) of each group of trained parameters]"""
    groups = state.get("param_shapes")
    if groups is None:
        raise ForeignCheckpointError(f"{path}: has no 'param_shapes'")
    return [[(name, tuple(shape)) for name, shape in group.items()] for group in groups]
