# SPDX-License-Identifier: Apache-2.0
"""Probe: what each op would run as here, and why."""
import os

from deepspeed.report.facts import Fact, no, yes

# What callers know them as: fused_* are the same optimizers under another name.
_OPTIMIZERS = (("adam", "cpu_adam, fused_adam"), ("lion", "cpu_lion, fused_lion"), ("adagrad", "cpu_adagrad"), ("lamb", "fused_lamb"),
               ("sgd", ""))


def _kernel(core, capability):
    """(text, works, advice) for the kernels of optimizers and reductions."""
    from deepspeed.report.gpus import runs_on
    target = core.chosen_target()
    if capability is None:
        return f"CPU kernel, {target}: this job would run on the CPU", True, ""
    if not core.CUDA_VERSION:
        return ("none: there is a GPU, but this build has no CUDA code", False,
                "build with nvcc on PATH and DS_CUDA=1, or train with DS_ACCELERATOR=cpu")
    if not runs_on(core.BUILD_INFO["cuda_architectures"], capability):
        return (f"none: compiled for {core.BUILD_INFO['cuda_architectures']}, the GPU is {capability}", False,
                f"build with TORCH_CUDA_ARCH_LIST={capability}")
    return f"CUDA kernel for compute capability {capability}", True, ""


def _collectives(on_gpu):
    asked = os.environ.get("DS_TRANSPORT") or "auto"
    if on_gpu:
        return yes("collectives", "NCCL: tensors are on GPUs")
    try:
        os.close(os.memfd_create("deepspeed"))
        shared = True
    except OSError:
        shared = False
    if asked == "c10d":
        return yes("collectives", "Gloo: DS_TRANSPORT=c10d asks for it")
    if shared:
        return yes("collectives", "shared memory between ranks of one host, Gloo between hosts")
    return no("collectives", "Gloo: memfd_create is refused here",
              "allow memfd_create in the sandbox; shared memory is several times faster")


def operators():
    from deepspeed._native import core as load
    from deepspeed.report.gpus import capabilities
    core = load()
    found = capabilities()
    text, works, advice = _kernel(core, found[0] if found else None)
    facts = []
    for name, known_as in (*_OPTIMIZERS, ("gradient reduction", "")):
        label = f"{name} ({known_as})" if known_as else name
        facts.append(yes(label, text) if works else no(label, text, advice))
    facts.append(Fact("muon, other torch.optim", "torch: the update is its own"))
    facts.append(_collectives(bool(found)))
    engine = core.io_engine_name()
    facts.append(yes("async_io", "io_uring") if engine == "io_uring" else
                 no("async_io", f"{engine}: no io_uring", "see files below; reading and writing works, with more processor time"))
    return facts
