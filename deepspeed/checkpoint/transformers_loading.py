# SPDX-License-Identifier: Apache-2.0
"""transformers' from_pretrained under ZeRO-3: a rank reads the bytes that it keeps.

Note [Why a hook]: under ZeRO-3 transformers reads all weights on rank 0, gathers every module, copies there, and broadcasts. Nothing of
what the other ranks are called with says which files those are, so no implementation of GatheredParameters could read slices. What is
replaced is one function, PreTrainedModel._load_pretrained_model, and only what lies between the list of files and the filled model: names,
conversions, dtypes, shapes and the report remain transformers' own, which works on tensors not read yet (Note [Deferred]) as it does on
one rank without us. The replacement is put in place by the first zero.Init that finds transformers loaded. Where the functions take other
arguments than those known here, nothing is replaced; other files than safetensors, quantised models, a state_dict given by the caller and
conversions that cannot wait take transformers' own way.
"""
import functools
import inspect
import os
import sys

import torch

from deepspeed.checkpoint import deferred
from deepspeed.checkpoint.pretrained import fill, ranks_of, read_safetensors, source_of
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.telemetry import logger
from deepspeed.zero.managed import home_of

_LOAD = ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
_CONVERT = ["model", "state_dict", "load_config", "disk_offload_index"]
_EXTRA_STATE = "_extra_state"


def install():
    """Puts the hook in place, once; without transformers, or with one that is not known, it does nothing."""
    modeling = sys.modules.get("transformers.modeling_utils")
    owner = getattr(modeling, "PreTrainedModel", None)
    plain = getattr(owner, "_load_pretrained_model", None)
    convert = getattr(modeling, "convert_and_load_state_dict_in_model", None)
    if plain is None or hasattr(plain, "_ds_plain"):
        return
    if convert is None or _parameters(plain) != _LOAD or _parameters(convert) != _CONVERT or not hasattr(modeling, "is_deepspeed_zero3_enabled"):
        logger.warning_once("this version of transformers loads weights in a way that is not known here: from_pretrained under ZeRO-3 reads "
                            "whole weights on rank 0 and broadcasts them. It is right, and slow.")
        return

    @functools.wraps(plain)
    def load(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        found = None
        if modeling.is_deepspeed_zero3_enabled() and _applies(model, state_dict, checkpoint_files, load_config, expected_keys):
            found = _load(convert, model, checkpoint_files, load_config)
        return found if found is not None else plain(model, state_dict, checkpoint_files, load_config, expected_keys)

    load._ds_plain = plain
    owner._load_pretrained_model = staticmethod(load)


def _parameters(function):
    return list(inspect.signature(function).parameters)


def _applies(model, state_dict, files, load_config, expected_keys):
    return (state_dict is None and expected_keys is None and bool(files) and all(os.fspath(path).endswith(".safetensors") for path in files)
            and not load_config.is_quantized and load_config.device_map is None and load_config.device_mesh is None
            and any(home_of(parameter) is not None for parameter in model.parameters()))


def _load(convert, model, files, load_config):
    """What _load_pretrained_model returns, or None when nothing was done, on all ranks alike."""
    folder, ranks = os.path.dirname(os.fspath(files[0])), ranks_of(model.parameters())
    found, report, cannot = ranks.attempt(lambda: _planned(convert, model, files, load_config), f"loading {folder}")
    reasons = {rank: text for rank, text in enumerate(ranks.gather(cannot)) if text is not None}
    if reasons:   # transformers' own way is collective: all ranks take it or none
        rank, text = next(iter(reasons.items()))
        logger.warning(f"weights are read whole on rank 0 and broadcast, since rank {rank} cannot read its part: {text}")
        return None
    source = source_of(folder, {name: value.reader for name, value, _ in found})
    fill(source, [(name, source.tensors[name, "weight"], target) for name, _, target in found])
    deferred.forget_results()
    for _, _, target in found:
        target._is_hf_initialized = True
    return report, None


def _planned(convert, model, files, load_config):
    """(what is to be filled: (name, deferred tensor, parameter or buffer), transformers' report, None), or (None, None, why not)."""
    readers = {}
    try:
        for path in files:
            readers.update(read_safetensors(os.fspath(path)))
        tensors = {name: deferred.Deferred(reader) for name, reader in readers.items()}
        for name in [name for name in tensors if name.endswith(_EXTRA_STATE)]:
            tensors[name] = deferred.materialise(tensors[name])
    except (CheckpointError, KeyError, OSError) as error:
        return None, None, str(error)
    with _Harvest(model) as harvest:
        report, _ = convert(model=model, state_dict=tensors, load_config=load_config, disk_offload_index=None)
    if report.conversion_errors:
        name, error = next(iter(report.conversion_errors.items()))
        return None, None, f"'{name}' is not converted: {error}"
    return harvest.found, report, None


class _Harvest:
    """Inside, deferred tensors may be set in the place of parameters and buffers; afterwards these are back, and `found` lists
    (name, deferred tensor, parameter or buffer)."""

    def __init__(self, model):
        self._model = model
        self.found = []

    def __enter__(self):
        self._before = [(path, table, dict(table)) for path, module in self._model.named_modules() for table in (module._parameters, module._buffers)]
        return self

    def __exit__(self, *_):
        for path, table, before in self._before:
            for key, target in before.items():
                value = table.get(key)
                if value is target:
                    continue
                table[key] = target
                if not isinstance(value, deferred.Deferred):   # a conversion that had to know values
                    value = deferred.Deferred(deferred.held(value.detach()))
                self.found.append((f"{path}.{key}" if path else key, value, target))
        return False
