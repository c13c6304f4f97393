# SPDX-License-Identifier: Apache-2.0
"""Build backend and CMake driver.

pyproject.toml names this module as the PEP 517 backend. It is setuptools' own backend except for one thing: pip runs a
backend in an isolated environment, which hides the torch of the environment being installed into. The extension modules must
be compiled against exactly that torch, so `_outer_torch` asks the environment's interpreter for it, outside the isolation.

Environment variables:
  DS_CUDA               0 or 1: leave CUDA code out, or insist on it (default: in when nvcc is found and torch has CUDA)
  DS_TORCH_PYTHON       interpreter whose torch to build against (default: found, see `_interpreters`)
  TORCH_CUDA_ARCH_LIST  as in torch (default "8.0;9.0+PTX")
  MAX_JOBS              parallel compilations
  DS_BUILD_DIR          build directory, kept between builds (default: one per Python and torch version under build/)
  DS_CMAKE_ARGS         more arguments for cmake
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools import build_meta as _setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = os.path.dirname(os.path.abspath(__file__))
MINIMUM_TORCH = (2, 11)
MINIMUM_CMAKE = (3, 24)

# Run by the candidate interpreter: reads torch's own description of itself without importing it (an import takes seconds).
_PROBE = """
import importlib.util, json, os, sys, sysconfig
spec = importlib.util.find_spec("torch")
out = {"python": list(sys.version_info[:2]), "suffix": sysconfig.get_config_var("EXT_SUFFIX"), "dir": None}
if spec is not None and spec.submodule_search_locations:
    out["dir"] = list(spec.submodule_search_locations)[0]
    scope = {}
    exec(open(os.path.join(out["dir"], "version.py")).read(), scope)
    out["version"] = scope["__version__"]
    out["cuda"] = scope.get("cuda")
print(json.dumps(out))
"""


# ---- finding torch and tools ----------------------------------------------------------------------------------------

def _process(pid):
    """(parent's id, command line, environment, working directory) of a process; None when unreadable or not Linux."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            parent = int(f.read().rpartition(")")[2].split()[1])
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            command = f.read().decode(errors="replace").split("\0")
        with open(f"/proc/{pid}/environ", "rb") as f:
            environment = dict(item.split("=", 1) for item in f.read().decode(errors="replace").split("\0") if "=" in item)
        return parent, command, environment, os.readlink(f"/proc/{pid}/cwd")
    except (OSError, ValueError):
        return None


def _told_interpreters(command, environment, cwd):
    """Interpreters that a front end like uv was told to install for, by option, active environment or habit."""
    for i, word in enumerate(command):
        if word in ("--python", "-p", "--prefix") and i + 1 < len(command):
            word = "--python=" + command[i + 1]
        if word.startswith(("--python=", "--prefix=")):
            place = os.path.join(cwd, word.partition("=")[2])
            yield from (place, os.path.join(place, "bin", "python"))
    if os.path.basename(command[0]).startswith("python"):
        yield command[0]
    for prefix in (environment.get("VIRTUAL_ENV"), environment.get("CONDA_PREFIX"), os.path.join(cwd, ".venv")):
        if prefix:
            yield os.path.join(prefix, "bin", "python")


def _interpreters():
    """Candidates for "the environment's interpreter" with the environment variables to run it in, best first.

    pip runs the backend with the interpreter of the environment that is installed into and only changes its search path; the
    variables of pip's own process undo that. Front ends that build in a fresh virtual environment instead (uv, python -m build)
    are looked through by asking their processes, our nearest ancestors, where they were told to install.
    """
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
    if os.environ.get("DS_TORCH_PYTHON"):
        yield os.environ["DS_TORCH_PYTHON"], plain
        return
    process = _process(os.getppid())
    yield sys.executable, process[2] if process else plain
    if "pip-build-env-" in os.environ.get("PYTHONPATH", ""):
        return
    for _ in range(2):
        if process is None:
            return
        parent, command, environment, cwd = process
        for interpreter in _told_interpreters(command, environment, cwd):
            yield interpreter, plain
        process = _process(parent)


def _probe(interpreter, environment):
    """What torch `interpreter` sees, as a dict, or None when it cannot be run or sees none fit for this Python."""
    try:
        run = subprocess.run([interpreter, "-c", _PROBE], capture_output=True, text=True, cwd="/", env=environment, timeout=60)
        found = json.loads(run.stdout) if run.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    if not found or not found["dir"] or found["suffix"] != sysconfig.get_config_var("EXT_SUFFIX"):
        return None
    return found


def _outer_torch():
    """The torch to build against: {"dir", "version", "cuda", ...}. Exits with one clear message when there is none."""
    tried = []
    # Visible without looking outside: --no-build-isolation, or torch among the build requirements.
    found = None if os.environ.get("DS_TORCH_PYTHON") else _probe(sys.executable, None)
    for interpreter, environment in [] if found else _interpreters():
        if interpreter not in tried:
            tried.append(interpreter)
            found = _probe(interpreter, environment)
        if found:
            break
    if not found:
        raise SystemExit(
            "\ndeepspeed is compiled against the torch of the environment it is installed into, and none was found by:\n  "
            + "\n  ".join(tried) + "\nInstall torch>=2.11 there first (pip install torch), or name the interpreter that has it "
            "in DS_TORCH_PYTHON.\n")
    version = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", found["version"]).groups())
    if version < MINIMUM_TORCH:
        raise SystemExit(f"\ndeepspeed needs torch >= 2.11; {found['dir']} is torch {found['version']}.\n")
    return found


def _tool(name, minimum=()):
    """Path of a working command of at least that version, or None."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
        found = tuple(int(part) for part in re.search(r"(\d+)\.(\d+)", answer.stdout).groups())
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None
    return path if answer.returncode == 0 and found >= minimum else None


def _run(command):
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"\ndeepspeed: this command failed, its messages are above:\n  {shlex.join(command)}\n")


# ---- setuptools commands --------------------------------------------------------------------------------------------

class CMakeBuild(build_ext):
    """Both extension modules in one ninja run, in a build directory that stays: the next build compiles what changed."""

    def build_extensions(self):
        torch = _outer_torch()
        cmake, ninja = _tool("cmake", MINIMUM_CMAKE), _tool("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("\ncmake >= 3.24 and ninja are needed: pip install cmake ninja\n")
        cuda = os.environ.get("DS_CUDA", "AUTO")
        tag = f"{sys.implementation.cache_tag}-torch{torch['version']}-cuda{cuda}"
        build_dir = os.path.abspath(os.path.join(ROOT, os.environ.get("DS_BUILD_DIR", os.path.join("build", tag))))
        output_dir = os.path.join(build_dir, "modules")
        os.makedirs(build_dir, exist_ok=True)
        configure = [
            cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DDS_TORCH_DIR={torch['dir']}", f"-DDS_CUDA={cuda}", "-DDS_TORCH=ON", "-DDS_TESTS=OFF",
            f"-DDS_PYTHON_OUTPUT_DIR={output_dir}", *shlex.split(os.environ.get("DS_CMAKE_ARGS", ""))
        ]
        print(f"deepspeed: building against torch {torch['version']} in {torch['dir']}", flush=True)
        _run(configure)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        _run([cmake, "--build", build_dir, "--target", "_core", "_C", *jobs])
        for extension in self.extensions:
            target = self.get_ext_fullpath(extension.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            self.copy_file(os.path.join(output_dir, os.path.basename(target)), target)

    def get_source_files(self):
        return []


class CleanBuildPy(build_py):
    """Starts from an empty build/lib*: what an earlier tree left there would otherwise be packed into the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class SourceDist(sdist):
    """Adds what compiling and testing need to the files setuptools picks."""

    def make_release_tree(self, base_dir, files):
        more = ["CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py"]
        for top in ("csrc", "tests", "configs", "examples", "docs"):
            for folder, folders, names in os.walk(os.path.join(ROOT, top)):
                folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
                more += [os.path.relpath(os.path.join(folder, name), ROOT) for name in names if not name.endswith((".pyc", ".so"))]
        super().make_release_tree(base_dir, sorted({*files, *more}))


# ---- PEP 517 / 660 hooks: setuptools', plus the tools the machine lacks ----------------------------------------------

build_sdist = _setuptools.build_sdist
build_wheel = _setuptools.build_wheel
build_editable = _setuptools.build_editable
prepare_metadata_for_build_wheel = _setuptools.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _setuptools.prepare_metadata_for_build_editable


def _missing_tools():
    missing = [] if _tool("cmake", MINIMUM_CMAKE) else ["cmake>=3.24"]
    return missing + ([] if _tool("ninja") else ["ninja"])


def get_requires_for_build_sdist(config_settings=None):
    return []


def get_requires_for_build_wheel(config_settings=None):
    return _missing_tools()


get_requires_for_build_editable = get_requires_for_build_wheel

if __name__ == "__main__":
    setup(
        ext_modules=[Extension("deepspeed._core", []), Extension("deepspeed._C", [])],
        cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy, "sdist": SourceDist},
    )
