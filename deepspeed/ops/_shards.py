# SPDX-License-Identifier: Apache-2.0
"""Tensors that are no piece of memory themselves: DTensors, of which this process holds a part, sparse ones, subclasses with a dispatch of their own."""
import torch

_PYTHON = torch._C.DispatchKey.Python


def is_plain(tensor):
    """Whether the kernels can take the tensor's memory as it is."""
    return not torch._C._dispatch_keys(tensor).has(_PYTHON) and tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def is_dtensor(tensor):
    if not torch._C._dispatch_keys(tensor).has(_PYTHON):
        return False
    from torch.distributed.tensor import DTensor  # takes a second to import
    return isinstance(tensor, DTensor)


def describe(tensor):
    """What a message calls a tensor that is not plain."""
    if torch._C._dispatch_keys(tensor).has(_PYTHON):
        return f"a {type(tensor).__name__} (a tensor subclass)"
    kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse" if "sparse" in str(tensor.layout) else str(tensor.layout)
    return f"a {kind} tensor"


def local_part(tensor, like):
    """This process's part of a DTensor, laid over the processes as the DTensor `like`: a view, unless that takes communication."""
    if tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    part = tensor.to_local()
    return part if is_plain(part) else part.wait()  # of a collective that still runs


def as_part_of(param, tensor):
    """A DTensor like `param` of which `tensor` is this process's part."""
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(tensor, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())
