# SPDX-License-Identifier: Apache-2.0
"""From a module tree to gather units: a translation to and from the integer planner in C++."""
from typing import NamedTuple

import torch

from deepspeed._native import core
from deepspeed.zero.leaf_modules import z3_leaf_module

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)
_LISTS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)
_ROUTED_CHILD = "experts"  # children of a list by this name are chosen by the data


class UnitPlan(NamedTuple):
    name: str
    names: list      # of the parameters
    params: list
    hooked: list     # modules whose forward needs the unit
    scope: object    # the module after which it is certainly free
    numel: int


class ModelPlan(NamedTuple):
    units: list
    uses: list       # (module, parameter): further modules that use a parameter owned elsewhere (tied, registered)


def has_own_forward(module):
    return not isinstance(module, _CONTAINERS) and type(module).forward is not torch.nn.Module.forward


def _is_leaf(module, leaf_paths):
    if z3_leaf_module(module) or f"{type(module).__module__}.{type(module).__qualname__}" in leaf_paths:
        return True
    routed = getattr(module, _ROUTED_CHILD, None)
    return isinstance(routed, _CONTAINERS) and len(routed) > 1


class ModuleTree(NamedTuple):
    """A model as the planner sees it: module k of named_modules() is nodes[k]."""
    modules: list
    paths: list
    nodes: list      # core().PlanModule
    owned: list      # for each module the (name, parameter) pairs it is the first to register
    children: list   # indices
    uses: list


def read_tree(model, leaf_paths=()):
    """The module tree of a model, on the meta device or any other."""
    modules, paths, nodes, owned, children, uses = [], [], [], [], [], []
    index_of_path, seen = {}, set()
    for path, module in model.named_modules():
        parent = index_of_path[path.rpartition(".")[0]] if path else -1
        index_of_path[path] = len(modules)
        own = []
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                uses.append((module, parameter))
                continue
            seen.add(id(parameter))
            own.append((f"{path}.{name}" if path else name, parameter))
        uses.extend((module, parameter) for parameter in module.__dict__.get("_ds_external_parameters", ()))
        if parent >= 0:
            children[parent].append(len(modules))
        modules.append(module)
        paths.append(path)
        owned.append(own)
        children.append([])
        nodes.append(core().PlanModule(parent, sum(p.numel() for _, p in own), container=parent >= 0 and not has_own_forward(module),
                                       repeated=parent >= 0 and isinstance(modules[parent], _LISTS), leaf=_is_leaf(module, leaf_paths)))
    return ModuleTree(modules, paths, nodes, owned, children, uses)


def plan_model(model, bucket_numel, prefetch_numel, leaf_paths=()):
    """The units of a model. Parameters count at the first module that owns them; every one belongs to one unit."""
    tree = read_tree(model, leaf_paths)
    budget = core().default_budget(sum(p.numel() for own in tree.owned for _, p in own), bucket_numel, prefetch_numel)
    # A parameter of 0 elements keeps its module out of the plan; it needs no memory either.
    units = []
    for unit in core().plan_units(tree.nodes, budget):
        members = []
        stack = list(reversed(unit.modules))
        while stack:
            index = stack.pop()
            members.extend(tree.owned[index])
            if not unit.own_only:
                stack.extend(reversed(tree.children[index]))
        first = tree.paths[unit.modules[0]] or type(model).__name__
        name = first if len(unit.modules) == 1 else f"{first}..{tree.paths[unit.modules[-1]]}"
        units.append(UnitPlan(name, [n for n, _ in members], [p for _, p in members], [tree.modules[i] for i in unit.hooked],
                              tree.modules[unit.scope], unit.numel))
    return ModelPlan(units, tree.uses)
