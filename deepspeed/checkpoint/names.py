# SPDX-License-Identifier: Apache-2.0
"""By which names, and in which order of elements, a model's tensors are known in a checkpoint."""
import torch

from deepspeed.data.token_drop import without_wrappers
from deepspeed.zero.managed import home_of


def order_of(parameter):
    """The dimensions of a parameter, slowest first, as its elements lie in memory; () when that is row-major."""
    if parameter.dim() < 2 or parameter.numel() == 0:
        return ()
    wide = [d for d in range(parameter.dim()) if parameter.shape[d] > 1]
    by_stride = sorted(wide, key=lambda d: -parameter.stride(d))
    if by_stride == wide:
        return ()
    dense, expected = True, 1
    for d in reversed(by_stride):
        dense = dense and parameter.stride(d) == expected
        expected *= parameter.shape[d]
    if not dense:
        return ()   # the store has laid it out row-major
    return tuple(d for d in range(parameter.dim()) if d not in wide) + tuple(by_stride)


class ModelNames:
    """The parameters and buffers of a module by name; names do not show wrappers that this library has put around layers.

    scope: what is put before every name where ranks hold different tensors of one name (model parallelism of the caller's).
    """

    def __init__(self, module, scope=""):
        self.scope = scope
        self.parameters = {}    # name -> parameter, each parameter once
        self.aliases = {}       # further name -> name
        known = {}
        for path, parameter in module.named_parameters(remove_duplicate=False):
            home = home_of(parameter)
            name = self.spell(path)
            if id(parameter) in known:
                self.aliases[name] = known[id(parameter)]
                continue
            first = self.spell(home.name) if home is not None else name
            known[id(parameter)] = first
            self.parameters[first] = parameter
            if first != name:
                self.aliases[name] = first
        self._known = known
        self.buffers, self._buffer_homes = {}, {}
        seen = {}
        for path, owner in module.named_modules(remove_duplicate=False):
            for key, buffer in owner._buffers.items():
                if buffer is None or key in owner._non_persistent_buffers_set or buffer.is_meta:
                    continue
                name = self.spell(f"{path}.{key}" if path else key)
                if id(buffer) in seen:
                    self.aliases.setdefault(name, seen[id(buffer)])
                    continue
                seen[id(buffer)] = name
                self.buffers[name] = buffer
        self.extra = {self.spell(path): owner for path, owner in module.named_modules()
                      if type(owner).get_extra_state is not torch.nn.Module.get_extra_state}

    def spell(self, path):
        return self.scope + without_wrappers(path)

    def name_of(self, parameter):
        return self._known[id(parameter)]

    def all_names(self, name):
        """The name and the other names of the same tensor."""
        return [name] + [alias for alias, target in self.aliases.items() if target == name]
