# SPDX-License-Identifier: Apache-2.0
"""Leaf modules: subtrees whose parameters are gathered together, because which of their children run depends on the data.

The mark is the attribute `_z3_leaf` on the module; its parameters carry the same mark. Gathering is decided when the
engine is built, so marks must be set before `deepspeed.initialize`.
"""

_MARK = "_z3_leaf"


def z3_leaf_module(model):
    """Whether this very module is marked."""
    return getattr(model, _MARK, False)


def z3_leaf_parameter(parameter):
    """Whether the parameter lies in a marked module."""
    return getattr(parameter, _MARK, False)


def get_z3_leaf_modules(model):
    """All marked modules of the tree."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model, flag):
    """Marks (or unmarks) one module."""
    setattr(model, _MARK, flag)
    for parameter in model.parameters():
        setattr(parameter, _MARK, flag)


def _remark(model):
    """Parameters of a marked module that lies inside a module just unmarked must keep their mark."""
    for module in get_z3_leaf_modules(model):
        set_z3_leaf_module(module, True)


def _apply(model, matches, flag):
    found = [module for module in model.modules() if matches(module)]
    for module in found:
        set_z3_leaf_module(module, flag)
    if not flag:
        _remark(model)
    return found


def _full_name(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_one_of(module, classes):
    for cls in classes:
        if isinstance(cls, str):
            own = type(module)
            if cls in (own.__name__, own.__qualname__, _full_name(own)):
                return True
        elif type(module) is cls:
            return True
    return False


def _checked(classes):
    for cls in classes:
        if not isinstance(cls, (str, type)):
            raise TypeError(f"a leaf module is named by its class or the class's name, got {cls!r}")
    return list(classes)


def _by_class(model, classes, flag, raise_if_not_found):
    classes = _checked(classes)
    found = _apply(model, lambda module: _is_one_of(module, classes), flag)
    if not found and raise_if_not_found:
        names = [cls if isinstance(cls, str) else _full_name(cls) for cls in classes]
        raise ValueError(f"no module of class {' or '.join(names)} in {type(model).__name__}")
    return found


def set_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found=True):
    """Marks every module of the given classes (class objects, their names or full names); returns them."""
    return _by_class(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(model, leaf_module_classes, raise_if_not_found=True):
    """Takes the marks back; returns the modules."""
    return _by_class(model, leaf_module_classes, False, raise_if_not_found)


def _by_name(model, wanted, covers, flag, raise_if_not_found):
    names = {id(module): name for name, module in model.named_modules()}
    found = _apply(model, lambda module: any(covers(names[id(module)], pattern) for pattern in wanted), flag)
    missing = [pattern for pattern in wanted if not any(covers(names[id(module)], pattern) for module in found)]
    if missing and raise_if_not_found:
        raise ValueError(f"no module named {', '.join(map(repr, missing))} in {type(model).__name__}")
    return found, missing


def set_z3_leaf_modules_by_name(model, module_names, flag=True, raise_if_not_found=True):
    """Marks the modules at these paths ("encoder.layer.0.mlp"); returns (modules, names that fit none)."""
    return _by_name(model, list(module_names), lambda path, name: path == name, flag, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(model, module_name_suffixes, flag=True, raise_if_not_found=True):
    """Marks every module whose path ends with one of these ("mlp" fits "layer.0.mlp"); returns (modules, suffixes that fit none)."""
    return _by_name(model, list(module_name_suffixes), lambda path, suffix: path == suffix or path.endswith("." + suffix), flag,
                    raise_if_not_found)
