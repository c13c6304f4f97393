# SPDX-License-Identifier: Apache-2.0
"""Probes: versions, how this build was made, programs, environment variables."""
import importlib.util
import os
import platform
import re
import shutil
import sys

from deepspeed.report.facts import Fact, no, read_text, yes

_REBUILD = "rebuild with `pip install .` in the source tree, with this Python"
# package, what it is for here
_OPTIONAL = (("matplotlib", "pictures of `deepspeed plan`"), ("tensorboard", "the tensorboard monitor"), ("wandb", "the wandb monitor"),
             ("comet_ml", "the comet monitor"), ("transformers", "models of Hugging Face"), ("accelerate", "the trainer of Hugging Face"),
             ("mpi4py", "rendezvous under mpirun"))
_PROGRAMS = (("pdsh", "several hosts, the default way", "apt-get install pdsh"), ("ssh", "several hosts", "apt-get install openssh-client"),
             ("mpirun", "several hosts by MPI", "apt-get install openmpi-bin"),
             ("srun", "several hosts under Slurm", "ask who runs the cluster"),
             ("numactl", "binding ranks to cores and memory", "apt-get install numactl"),
             ("nvcc", "building the CUDA code", "install the CUDA toolkit that fits torch, or set CUDA_HOME"),
             ("ninja", "building", "pip install ninja"), ("cmake", "building", "pip install cmake"))


def torch_facts():
    """(version, CUDA version, folder) of the installed torch without importing it; ("", "", "") when there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "", "", ""
    folder = spec.submodule_search_locations[0]
    text = read_text(os.path.join(folder, "version.py"))
    version = re.search(r"__version__ = '([^']*)'", text)
    cuda = re.search(r"^cuda[^=\n]*= '([^']*)'", text, re.MULTILINE)
    return version[1] if version else "unknown", cuda[1] if cuda else "", folder


def _installed(package):
    if importlib.util.find_spec(package) is None:
        return ""
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown version"


def versions():
    from deepspeed._version import __version__
    release = dict(line.split("=", 1) for line in read_text("/etc/os-release").splitlines() if "=" in line)
    version, cuda, folder = torch_facts()
    facts = [yes("deepspeed", f"{__version__} in {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}"),
             Fact("Python", f"{platform.python_version()} at {sys.executable}")]
    facts.append(yes("torch", f"{version} ({'CUDA ' + cuda if cuda else 'CPU only'}) in {folder}") if version else
                 no("torch", "not installed", "pip install 'torch>=2.11', then build deepspeed again"))
    facts += [Fact("operating system", release.get("PRETTY_NAME", "unknown").strip('"')), Fact("kernel", platform.release()),
              Fact("C library", " ".join(platform.libc_ver()) or "unknown")]
    for package, purpose in _OPTIONAL:
        found = _installed(package)
        facts.append(yes(package, found) if found else no(package, "not installed", f"only for {purpose}: pip install {package}"))
    return facts


def _cuda_build(core):
    info = core.BUILD_INFO
    if core.CUDA_VERSION:
        names = " ".join(info["cuda_architectures"].split(";"))
        return [yes("CUDA code", f"yes, by nvcc {core.CUDA_VERSION}"), Fact("CUDA architectures", names)]
    why = info["cuda_refusal"] or f"the build was told so (DS_CUDA={info['cuda_asked']})"
    return [no("CUDA code", f"left out: {why}",
               "only the CPU can train; for GPUs have nvcc of torch's CUDA version on PATH and build with DS_CUDA=1")]


def _torch_fit(core):
    version = torch_facts()[0]
    built = core.TORCH_VERSION
    if version.split("+")[0].split(".")[:2] == built.split("+")[0].split(".")[:2]:
        return yes("built against torch", f"{built}, which fits the installed one")
    return no("built against torch", f"{built}, but {version or 'none'} is installed", _REBUILD)


def build():
    from deepspeed._native import NativeExtensionError, _extension_exists, core as load
    try:
        core = load()
    except NativeExtensionError as error:
        return [no("compiled modules", str(error), _REBUILD)]
    info = core.BUILD_INFO
    facts = [Fact("version", core.VERSION), Fact("compiler", f"{info['compiler']}, {info['build_type']}, {info['flags']}"),
             _torch_fit(core)]
    facts += _cuda_build(core)
    facts.append(yes("deepspeed._C", "there") if _extension_exists("_C") else no("deepspeed._C", "missing", _REBUILD))
    facts.append(Fact("instruction sets compiled", " ".join(core.compiled_targets())))
    chosen = core.chosen_target()
    if chosen.startswith(("EMU", "SCALAR")):
        facts.append(no("instruction set chosen", f"{chosen} (plain code)",
                        "this processor has none of those compiled; CPU kernels will be slow"))
    else:
        facts.append(yes("instruction set chosen", chosen))
    facts.append(Fact("libraries", f"Highway {info['highway'] or '?'}, nlohmann/json {info['nlohmann_json'] or '?'}, "
                      f"liburing {'yes' if info['liburing'] else 'no'}"))
    return facts


def programs():
    facts = []
    for name, purpose, advice in _PROGRAMS:
        path = shutil.which(name)
        facts.append(yes(name, path) if path else no(name, "not found", f"only for {purpose}: {advice}"))
    return facts


def environment():
    """The variables that are set, of those the library reads, and NCCL's."""
    from deepspeed._environment import VARIABLES
    from deepspeed._native import core
    meanings = {name: variable.meaning for name, variable in VARIABLES.items()}
    meanings.update((name, meaning) for name, _, meaning in core().environment_table() if name not in meanings)
    facts = [Fact(name, f"{os.environ[name]}  ({meaning})") for name, meaning in sorted(meanings.items()) if os.environ.get(name)]
    facts += [Fact(name, os.environ[name]) for name in sorted(os.environ) if name.startswith(("NCCL_", "GLOO_", "OMP_", "MALLOC_"))]
    return facts or [Fact("set", "none of those the library reads")]
