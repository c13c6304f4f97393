# SPDX-License-Identifier: Apache-2.0
"""The arrows between the folders of csrc/: what each may include, of ours and of others'."""
import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Everyone may include base; a folder below LibTorch's line may also include platform.
ALLOWED = {
    "base": set(),
    "config": {"nlohmann"},
    "platform": {"cuda"},
    "plan": set(),
    "kernels": {"platform", "hwy", "cuda"},
    "io": {"platform", "liburing"},
    "checkpoint": {"io", "plan", "platform", "nlohmann"},
    # LibTorch starts here
    "comm": {"platform", "torch", "cuda"},
    "ops": {"kernels", "platform", "torch", "cuda"},
    "optim": {"comm", "ops", "kernels", "plan", "platform", "torch", "cuda"},
    "offload": {"io", "platform", "plan", "torch", "cuda"},
    "zero": {"optim", "offload", "comm", "plan", "platform", "torch", "cuda"},
    "inference": {"kernels", "comm", "platform", "torch", "cuda"},
}
OTHERS = {
    "nlohmann": "nlohmann", "hwy": "hwy", "liburing": "liburing", "pybind11": "python", "Python": "python", "torch": "torch",
    "ATen": "torch", "c10": "torch", "caffe2": "torch", "cuda": "cuda", "cub": "cuda", "nccl": "nccl",
}
SUFFIXES = {".h", ".cpp", ".cc", ".cu", ".cuh"}
_INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)


def sources(folder):
    return sorted(path for path in (CSRC / folder).rglob("*") if path.suffix in SUFFIXES)


def belongs_to(header):
    """The folder of ours or the library that a header belongs to; None for the standard library and the system."""
    first = re.split(r"[/._]", header)[0]
    if (CSRC / header.split("/")[0]).is_dir() and "/" in header:
        return header.split("/")[0]
    return OTHERS.get(first)


def includes(path):
    text = path.read_text()
    for match in _INCLUDE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


def test_every_folder_has_its_line():
    folders = {path.name for path in CSRC.iterdir() if path.is_dir() and sources(path.name)}
    assert folders - {"bindings"} <= set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_includes_point_up(folder):
    wrong = []
    for path in sources(folder):
        for line, _, header in includes(path):
            home = belongs_to(header)
            if home is not None and home not in ALLOWED[folder] | {folder, "base"}:
                wrong.append(f"{path.relative_to(CSRC.parent)}:{line} includes {header}")
    assert not wrong, "\n".join(wrong)


def test_our_headers_are_named_from_the_root():
    """`#include "folder/file.h"`, so that the test above sees every arrow; nothing includes the bindings."""
    wrong = []
    for path in sources("."):
        for line, quote, header in includes(path):
            generated = header.startswith("bindings_") and path.parent.name == "bindings"
            if quote == '"' and not generated and belongs_to(header) != "hwy" and not (CSRC / header).is_file():
                wrong.append(f"{path.relative_to(CSRC.parent)}:{line} {header} is not a file below csrc/")
            if header.startswith("bindings/") and path.relative_to(CSRC).parts[0] != "bindings":
                wrong.append(f"{path.relative_to(CSRC.parent)}:{line} includes the bindings")
    assert not wrong, "\n".join(wrong)


def test_the_build_links_no_more_than_that():
    text = (CSRC / "CMakeLists.txt").read_text()
    targets = {"ds_torch": "torch", "ds_uring": "liburing", "hwy::hwy": "hwy", "nlohmann_json::nlohmann_json": "nlohmann"}
    seen = set()
    for match in re.finditer(r"^\s*ds_folder\((\w+)(?: OBJECTS)?(?: DEPENDS ([^)]*))?\)", text, re.MULTILINE):
        folder, depends = match[1], (match[2] or "").replace("${kernels}", "ds_kernels").split()
        seen.add(folder)
        for target in depends:
            home = targets.get(target, target.removeprefix("ds_"))
            assert home in ALLOWED[folder] | {"base"}, f"ds_{folder} links {target}"
    assert seen == set(ALLOWED)
