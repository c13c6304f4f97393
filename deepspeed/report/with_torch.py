# SPDX-License-Identifier: Apache-2.0
"""Probe: what only torch can tell. Takes as long as importing it."""
import time

from deepspeed.report.facts import Fact, no, size, yes


def _compiled_module():
    from deepspeed._native import NativeExtensionError, lib
    try:
        lib()
    except NativeExtensionError as error:
        return no("deepspeed._C", str(error), "build it again with `pip install .`")
    return yes("deepspeed._C", "loads")


def _cuda(torch):
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [no("CUDA in torch", f"not available ({'built for CUDA ' + built if built else 'a CPU build'})",
                   "see devices above" if built else "install a CUDA build of torch if there is a GPU")]
    facts = [yes("CUDA in torch", f"{torch.version.cuda}, {torch.cuda.device_count()} devices"),
             Fact("NCCL in torch", ".".join(map(str, torch.cuda.nccl.version()))), Fact("cuDNN", torch.backends.cudnn.version())]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        x = torch.ones(1024, device=f"cuda:{number}")
        works = float((x + x).sum()) == 2048
        facts.append(yes(f"GPU {number} computes", f"{size(free)} of {size(total)} free") if works else
                     no(f"GPU {number} computes", "wrong sum", "the device or its driver is faulty"))
        for other in range(number + 1, torch.cuda.device_count()):
            direct = torch.cuda.can_device_access_peer(number, other)
            facts.append(Fact(f"GPU {number} reaches GPU {other}", "directly" if direct else "through the host"))
    return facts


def with_torch():
    begin_s = time.perf_counter()
    import torch
    facts = [yes("torch imports", f"{torch.__version__} in {time.perf_counter() - begin_s:.1f} s"), _compiled_module()]
    from torch import distributed
    there = distributed.is_available()
    backends = [name for name in ("nccl", "gloo", "mpi") if there and getattr(distributed, f"is_{name}_available")()]
    facts.append(yes("torch.distributed", " ".join(backends)) if backends else
                 no("torch.distributed", "not in this build of torch", "install the usual build of torch"))
    from deepspeed.device import get_accelerator
    facts.append(Fact("accelerator", f"{get_accelerator()._name}, {get_accelerator().device_count()} ranks fit"))
    return facts + _cuda(torch)
