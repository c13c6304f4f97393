# SPDX-License-Identifier: Apache-2.0
"""The public names are frozen: each module hands on exactly what public_surface.json lists, and every name resolves.

After a deliberate change: `python -m tests.unit.test_public_surface` writes the list anew; read the difference before committing.
"""
import importlib
import json
from pathlib import Path

import pytest

SURFACE = Path(__file__).with_name("public_surface.json")
PACKAGE = Path(__file__).resolve().parents[2] / "deepspeed"
FROZEN = json.loads(SURFACE.read_text())


def public_modules():
    """Every module of the package that hands names on by a lazy table."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "_lazy.py" and " = attach(" in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_names(module):
    return sorted(importlib.import_module(module).__getattr__.exports)


def test_no_module_comes_or_goes_unnoticed():
    assert sorted(FROZEN) == sorted(public_modules())


@pytest.mark.parametrize("module", FROZEN)
def test_names_are_those_listed(module):
    assert public_names(module) == FROZEN[module]
    assert set(FROZEN[module]) <= set(dir(importlib.import_module(module)))


@pytest.mark.parametrize("module", FROZEN)
def test_every_name_resolves(module):
    loaded = importlib.import_module(module)
    missing = []
    for name in FROZEN[module]:
        try:
            getattr(loaded, name)
        except (AttributeError, ImportError) as error:
            missing.append(f"{module}.{name}: {error}")
    assert not missing, "\n".join(missing)


if __name__ == "__main__":
    names = {module: public_names(module) for module in public_modules()}
    SURFACE.write_text(json.dumps(names, indent=1) + "\n")
