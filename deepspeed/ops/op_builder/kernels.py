# SPDX-License-Identifier: Apache-2.0
"""Builders by which programs ask for the optimizers' kernels beforehand. The kernels are part of the package: nothing is compiled."""
import warnings

from deepspeed._native import NativeExtensionError, lib


class KernelsBuilder:
    """Of the kernels behind one optimizer: `load()` gives the module that holds all of them, whose functions are this package's own."""
    NAME = BUILD_VAR = ""

    def absolute_name(self):
        return "deepspeed._C"

    def is_compatible(self, verbose=False):
        """Whether the module can be loaded here; with `verbose` it is said why not."""
        try:
            lib()
        except NativeExtensionError as error:
            if verbose:
                warnings.warn(f"{self.NAME}: {error}", stacklevel=2)
            return False
        return True

    def load(self, verbose=True):
        return lib()


class CPUAdamBuilder(KernelsBuilder):
    NAME, BUILD_VAR = "cpu_adam", "DS_BUILD_CPU_ADAM"


class CPUAdagradBuilder(KernelsBuilder):
    NAME, BUILD_VAR = "cpu_adagrad", "DS_BUILD_CPU_ADAGRAD"


class CPULionBuilder(KernelsBuilder):
    NAME, BUILD_VAR = "cpu_lion", "DS_BUILD_CPU_LION"


class FusedAdamBuilder(KernelsBuilder):
    NAME, BUILD_VAR = "fused_adam", "DS_BUILD_FUSED_ADAM"


class FusedLambBuilder(KernelsBuilder):
    NAME, BUILD_VAR = "fused_lamb", "DS_BUILD_FUSED_LAMB"


class FusedLionBuilder(KernelsBuilder):
    NAME, BUILD_VAR = "fused_lion", "DS_BUILD_FUSED_LION"
