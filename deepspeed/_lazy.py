# SPDX-License-Identifier: Apache-2.0
"""Packages that hand names on without importing them (PEP 562), and honest errors for what is not built yet.

A package's table maps each public name to its home: "deepspeed.comm" (the module itself), "deepspeed.engine:initialize"
(an attribute) or "deepspeed.engine:" (an attribute of the same name). The home is imported on first access.

Note [Names not built yet]: a name that belongs to a later release is neither defined nor a stub. Reading it from the
package raises AttributeError, so `hasattr` and `getattr(..., default)` answer truthfully; importing it raises ImportError.
Both say what is missing. The import statement discards the text of an AttributeError, hence the finder: Python asks it
only after every other finder has failed to find the module.
"""
import importlib
import sys
import types


def names(home, *attributes):
    """Table entries for attributes of module `home` that keep their name."""
    return {attribute: f"{home}:{attribute}" for attribute in attributes}


def resolve(package, name, home):
    """The object that `package`.`name` stands for."""
    module_name, colon, attribute = home.partition(":")
    module = importlib.import_module(module_name)
    if not colon:
        return module
    try:
        return getattr(module, attribute or name)
    except AttributeError as error:
        raise AttributeError(f"{package}.{name} is missing: {module_name} has no {attribute or name}") from error


def attach(package, exports, not_built=None):
    """`__getattr__, __dir__, __all__` for a package with the table `exports`; `not_built` maps a name to its subject."""
    not_built = dict(not_built or {})
    for name, subject in not_built.items():
        _finder().subjects[f"{package}.{name}"] = subject

    def __getattr__(name):
        home = exports.get(name)
        if home is None:
            if name in not_built:
                raise AttributeError(not_built_message(f"{package}.{name}", not_built[name]))
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = resolve(package, name, home)
        sys.modules[package].__dict__[name] = value
        return value

    def __dir__():
        return sorted(set(exports) | set(sys.modules[package].__dict__))

    class Package(types.ModuleType):
        """Note [A name for a module and a function]: importing a submodule sets it on its package, over a function of the same
        name (`initialize` in initialize.py, say). The function stays; the module is reached by import."""

        def __setattr__(self, name, value):
            home = exports.get(name, "")
            if ":" in home and isinstance(value, types.ModuleType) and value.__name__ == f"{package}.{name}":
                value = resolve(package, name, home)
            super().__setattr__(name, value)

    sys.modules[package].__class__ = Package
    __getattr__.exports = exports
    # `from package import *` must not bring submodules: some are called torch, types or logging.
    return __getattr__, __dir__, sorted(name for name, home in exports.items() if home != f"{package}.{name}")


def alias(name, target):
    """Makes module `name` the very module `target`, so that what a caller sets on one is seen through the other.

    To be called from the body of module `name`; the import system hands out whatever sys.modules holds afterwards.
    """
    sys.modules[name] = importlib.import_module(target)


def mirror(name, target):
    """Makes module `name` show what module `target` has and pass on what is set or deleted, beside its own lazy names.

    For callers that replace a function there and expect the library to call theirs.
    """

    class Mirror(types.ModuleType):
        def __getattribute__(self, attribute):
            if not _is_dunder(attribute):
                home = importlib.import_module(target)
                if hasattr(home, attribute):
                    return getattr(home, attribute)
            return super().__getattribute__(attribute)

        def __setattr__(self, attribute, value):
            if _is_dunder(attribute) or isinstance(value, types.ModuleType):
                super().__setattr__(attribute, value)
            else:
                setattr(importlib.import_module(target), attribute, value)

        def __delattr__(self, attribute):
            delattr(importlib.import_module(target), attribute)

    sys.modules[name].__class__ = Mirror


def _is_dunder(name):
    return name.startswith("__") and name.endswith("__")


def not_built_message(name, subject):
    return f"{name} is not built yet: {subject} will come in a later release of this library"


class _NotBuiltFinder:
    """Last in sys.meta_path: turns `import deepspeed.<not built>` into an error that says so."""

    def __init__(self):
        self.subjects = {}

    def find_spec(self, fullname, path=None, target=None):
        subject = self.subjects.get(fullname)
        if subject is not None:
            raise ModuleNotFoundError(not_built_message(fullname, subject))
        return None


def _finder():
    for finder in sys.meta_path:
        if type(finder).__name__ == _NotBuiltFinder.__name__ and hasattr(finder, "subjects"):
            return finder
    finder = _NotBuiltFinder()
    sys.meta_path.append(finder)
    return finder
