# SPDX-License-Identifier: Apache-2.0
"""Probes: NVIDIA devices through the driver's own library, NCCL. No CUDA context is created, no torch imported."""
import ctypes
import ctypes.util
import glob
import os
import shutil
import subprocess

from deepspeed.report.facts import Fact, no, read_text, size, yes
from deepspeed.report.software import torch_facts

_MAJOR, _MINOR = 75, 76   # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_SMI_TIMEOUT_S = 8


class Driver:
    """libcuda by ctypes. OSError when it is missing, RuntimeError with its own words when it does not work."""

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)

    def call(self, name, *arguments):
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: error {code}" + (f" ({text.value.decode()})" if text.value else ""))

    def integer(self, name, *arguments):
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def devices(self):
        """(name, bytes, "9.0") of each."""
        for number in range(self.integer("cuDeviceGetCount")):
            device = self.integer("cuDeviceGet", number)
            name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
            self.call("cuDeviceGetName", name, 256, device)
            self.call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
            capability = [self.integer("cuDeviceGetAttribute", attribute, device) for attribute in (_MAJOR, _MINOR)]
            yield name.value.decode(), total.value, "{}.{}".format(*capability)


def capabilities():
    """Compute capabilities of the devices a job here would use; [] without any, or when DS_ACCELERATOR asks for the CPU."""
    if os.environ.get("DS_ACCELERATOR", "").lower() == "cpu":
        return []
    try:
        return [capability for _, _, capability in Driver().devices()]
    except (OSError, RuntimeError, AttributeError):
        return []


def runs_on(architectures, capability):
    """Whether code for "80-real;90-real;90-virtual" runs on capability "9.0": binary code within a major version, PTX upwards."""
    mine = int(capability.replace(".", ""))
    for entry in filter(None, architectures.split(";")):
        number, _, kind = entry.partition("-")
        number = int("".join(filter(str.isdigit, number)) or 0)
        if kind != "virtual" and number // 10 == mine // 10 and number <= mine or kind != "real" and number <= mine:
            return True
    return False


def _code_fits(capability):
    from deepspeed._native import core
    architectures = core().BUILD_INFO["cuda_architectures"]
    if not architectures:
        return Fact("kernels for it", "none in this build")
    if runs_on(architectures, capability):
        return yes("kernels for it", architectures)
    return no("kernels for it", f"this build has {architectures}", f"build with TORCH_CUDA_ARCH_LIST={capability}")


def _no_gpu(reason):
    nodes = glob.glob("/dev/nvidia[0-9]*")
    if nodes:
        return no("GPUs", f"{reason}, although {len(nodes)} device nodes exist",
                  "install or repair the NVIDIA driver; in a container start it with --gpus all")
    return no("GPUs", reason, "training runs on the CPU; where there is a GPU: install the NVIDIA driver, in a container use --gpus all")


def devices():
    facts = []
    if os.environ.get("DS_ACCELERATOR", "").lower() == "cpu":
        facts.append(Fact("DS_ACCELERATOR", "cpu: devices are not used, whatever follows"))
    try:
        driver = Driver()
        found = list(driver.devices())
    except OSError:
        return [*facts, _no_gpu("no NVIDIA driver (libcuda.so.1)")]
    except RuntimeError as error:
        return [*facts, _no_gpu(f"the driver does not work: {error}")]
    if not found:
        hidden = " (CUDA_VISIBLE_DEVICES is set)" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        return [*facts, _no_gpu("the driver offers none" + hidden)]
    version = driver.integer("cuDriverGetVersion")
    facts.append(Fact("driver", f"{_driver_release()}, up to CUDA {version // 1000}.{version % 1000 // 10}"))
    for number, (name, total, capability) in enumerate(found):
        facts.append(yes(f"GPU {number}", f"{name}, {size(total)}, compute capability {capability}"))
    for capability in sorted({capability for _, _, capability in found}):
        facts.append(_code_fits(capability))
    return facts


def _driver_release():
    words = read_text("/proc/driver/nvidia/version").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown release")


def nvidia_smi():
    """What is in use now."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return [no("nvidia-smi", "not found", "not needed; it comes with the NVIDIA driver and shows who uses a GPU")]
    done = subprocess.run([path, "--query-gpu=index,memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits"],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SMI_TIMEOUT_S)
    if done.returncode != 0:
        return [no("nvidia-smi", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"code {done.returncode}",
                   "the driver does not answer: reload it, or look at dmesg")]
    rows = (line.split(", ") for line in done.stdout.strip().splitlines())
    return [Fact(f"GPU {row[0]} in use", f"{row[1]} of {row[2]} MiB, {row[3]} % busy") for row in rows if len(row) == 4]


def _nccl_path():
    folder = os.path.dirname(torch_facts()[2])
    beside = sorted(glob.glob(os.path.join(folder, "nvidia", "nccl", "lib", "libnccl.so*"))) if folder else []
    return beside[0] if beside else ctypes.util.find_library("nccl")


def nccl():
    """The library torch would use, its version from the file itself."""
    version, cuda, _ = torch_facts()
    path = _nccl_path()
    if not path:
        if version and not cuda:
            return [Fact("NCCL", "none, and torch is a CPU build that needs none: ranks talk through shared memory or Gloo")]
        return [no("NCCL", "no libnccl beside torch or on the system", "pip install the CUDA build of torch, which brings it")]
    number = ctypes.c_int()
    if ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number)) != 0:
        return [no("NCCL", f"{path} does not tell its version", "reinstall torch")]
    n = number.value
    facts = [yes("NCCL", f"{n // 10000}.{n // 100 % 100}.{n % 100} in {path}")]
    fabric = sorted(os.listdir("/sys/class/infiniband")) if os.path.isdir("/sys/class/infiniband") else []
    facts.append(Fact("InfiniBand", " ".join(fabric) or "none: between hosts NCCL uses TCP"))
    return facts
