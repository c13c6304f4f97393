# SPDX-License-Identifier: Apache-2.0
"""Reading a caller's model parallel unit, whatever generation of method names it has; None is a model that is not split."""


def _ask(mpu, default, *methods):
    for method in methods:
        if mpu is not None and hasattr(mpu, method):
            return getattr(mpu, method)()
    return default


def bwc_tensor_model_parallel_rank(mpu=None):
    return _ask(mpu, 0, "get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank")


def bwc_tensor_model_parallel_world_size(mpu=None):
    return _ask(mpu, 1, "get_tensor_model_parallel_world_size", "get_slice_parallel_world_size", "get_model_parallel_world_size")


def bwc_tensor_model_parallel_group(mpu=None):
    return _ask(mpu, None, "get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group")


def bwc_pipeline_parallel_world_size(mpu=None):
    return _ask(mpu, 1, "get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def bwc_pipeline_parallel_group(mpu=None):
    return _ask(mpu, None, "get_pipeline_model_parallel_group", "get_pipe_parallel_group")
