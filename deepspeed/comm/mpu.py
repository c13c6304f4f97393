# SPDX-License-Identifier: Apache-2.0
"""Reading a caller's model parallel unit: an object with Megatron's methods, whatever generation of names it has, or a torch DeviceMesh.
None is a model that is not split."""
from torch.distributed.device_mesh import DeviceMesh

_TENSOR_DIMENSIONS = ("tensor_parallel", "tensor_model_parallel", "model_parallel", "tensor", "model", "tp", "mp")


def _tensor_mesh(mesh):
    """The dimension of a mesh along which ranks share tensors; all of a mesh with one dimension."""
    names = mesh.mesh_dim_names or ()
    found = [name for name in _TENSOR_DIMENSIONS if name in names]
    if found:
        return mesh[found[0]]
    if mesh.ndim == 1:
        return mesh
    raise ValueError(f"device mesh with the dimensions {tuple(names) or mesh.ndim}: none is called "
                     f"{', '.join(_TENSOR_DIMENSIONS[:-1])} or {_TENSOR_DIMENSIONS[-1]}; pass the one along which ranks share tensors, "
                     "mesh[\"name\"]")


def _ask(mpu, default, *methods):
    for method in methods:
        if mpu is not None and hasattr(mpu, method):
            return getattr(mpu, method)()
    return default


def bwc_tensor_model_parallel_rank(mpu=None):
    if isinstance(mpu, DeviceMesh):
        return _tensor_mesh(mpu).get_local_rank()
    return _ask(mpu, 0, "get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank")


def bwc_tensor_model_parallel_world_size(mpu=None):
    if isinstance(mpu, DeviceMesh):
        return _tensor_mesh(mpu).size()
    return _ask(mpu, 1, "get_tensor_model_parallel_world_size", "get_slice_parallel_world_size", "get_model_parallel_world_size")


def bwc_tensor_model_parallel_group(mpu=None):
    if isinstance(mpu, DeviceMesh):
        return _tensor_mesh(mpu).get_group()
    return _ask(mpu, None, "get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group")


def bwc_pipeline_parallel_world_size(mpu=None):
    return _ask(mpu, 1, "get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def bwc_pipeline_parallel_group(mpu=None):
    return _ask(mpu, None, "get_pipeline_model_parallel_group", "get_pipe_parallel_group")
