# SPDX-License-Identifier: Apache-2.0
"""The arrows between the rooms of the package: a room imports only rooms below it. Lazy tables and imports inside functions count."""
import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "deepspeed"

# Rooms by height; rooms of one line do not know each other.
LEVELS = [
    {"_lazy", "_environment", "_version", "_errors", "_config_keys", "_config_helpers", "_arguments", "_native", "_torch_version"},
    {"constants", "device", "_compiler", "_entries"},
    {"telemetry", "_installation"},
    {"config"},
    {"comm", "ops", "git_version_info"},
    {"precision", "schedules", "data", "parallel", "checkpointing"},
    {"zero"},
    {"checkpoint"},
    {"engine"},
    {"planning", "report", "nvme"},
    {"launcher"},
    # import paths users have: only the top may hand them on
    {"runtime", "utils", "accelerator", "module_inject", "monitor", "profiling", "env_report"},
    {""},  # deepspeed/__init__.py
]
HEIGHT = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}
COMPILED = {"_core", "_C"}
_HOME = re.compile(r"deepspeed((?:\.\w+)+)(?::\w*)?")


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def rooms_named_in(path):
    """(line, room) for every module of the package that the file imports or names in a lazy table."""
    tree = ast.parse(path.read_text())
    lazy = any(isinstance(node, ast.Name) and node.id in ("attach", "alias") for node in ast.walk(tree))
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)[:-node.level]
            found = [".".join(base + ([node.module] if node.module else []))]
        elif isinstance(node, ast.ImportFrom):
            found = [f"deepspeed.{name.name}" for name in node.names] if node.module == "deepspeed" else [node.module]
        elif lazy and isinstance(node, ast.Constant) and isinstance(node.value, str) and _HOME.fullmatch(node.value):
            found = [node.value.partition(":")[0]]
        for module in found:
            parts = module.split(".")
            if parts[0] == "deepspeed" and len(parts) > 1 and parts[1] not in COMPILED:
                yield node.lineno, parts[1]


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("room", sorted({room_of(path) for path in FILES}))
def test_arrows_point_down(room):
    assert room in HEIGHT, f"the room deepspeed/{room} has no place in LEVELS"
    wrong = []
    for path in (path for path in FILES if room_of(path) == room):
        for line, other in rooms_named_in(path):
            if other != room and HEIGHT.get(other, 0) >= HEIGHT[room] and not (HEIGHT[other] == HEIGHT[room] and room in LEVELS[-2]):
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports deepspeed.{other}")
    assert not wrong, "\n".join(wrong)


def test_import_paths_hold_no_code():
    """Files under the users' import paths define nothing."""
    for room in LEVELS[-2]:
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not isinstance(node, (ast.FunctionDef, ast.ClassDef)), f"{path}:{node.lineno} defines {node.name}"
