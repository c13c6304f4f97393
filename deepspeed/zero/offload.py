# SPDX-License-Identifier: Apache-2.0
"""The hook surface of a sharded model: what callers take off for generation and put back."""
import functools


class PartitionedParameterCoordinator:
    """The schedule is static: there is no trace, so it never becomes invalid."""

    def is_invalid_trace(self):
        return False

    def is_complete_trace(self):
        return True

    def is_record_trace(self):
        return False

    def _invalidate_trace(self):
        pass

    def reset_step(self):
        pass


class DeepSpeedZeRoOffload:
    """`engine.optimizer` of an engine without an optimizer at stage 3; `optimizer.parameter_offload` otherwise.

    forward_hooks and backward_hooks are lists of removable handles that callers empty; _register_deepspeed_module() hooks
    the model again.
    """

    def __init__(self, module, managed=None):
        self.module = module
        self._managed = managed
        self.param_coordinator = PartitionedParameterCoordinator()
        self.forward_hooks = list(managed.module_hooks.handles) if managed is not None else []
        self.backward_hooks = []
        module.ds_external_parameters = functools.partial(_external_parameters, module)

    def get_param_coordinator(self):
        return self.param_coordinator

    def _register_deepspeed_module(self, module, count=None):
        managed = self._managed
        managed.module_hooks.remove()
        managed.module_hooks.reinstall()
        self.forward_hooks = list(managed.module_hooks.handles)

    def partition_all_parameters(self):
        self._managed.store.release_all()

    def empty_partition_cache(self):
        self.partition_all_parameters()
        self._managed.store.trim_pool()

    def destroy(self):
        if self._managed is not None:
            self._managed.settle(self.module)


def _external_parameters(module):
    for number, parameter in enumerate(module.__dict__.get("_ds_external_parameters", ())):
        yield str(number), parameter
