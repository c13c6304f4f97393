# SPDX-License-Identifier: Apache-2.0
"""The builders that programs ask for operations: what is here says so, and what is not says that."""
import pytest

import deepspeed
from deepspeed._native import NativeExtensionError, lib
from deepspeed.ops import op_builder
from deepspeed.ops.op_builder import kernels
from deepspeed.ops.op_builder.all_ops import ALL_OPS

NAMES = {"async_io", "cpu_adagrad", "cpu_adam", "cpu_lion", "fused_adam", "fused_lamb", "fused_lion"}


def test_every_builder_loads_what_it_stands_for():
    assert set(ALL_OPS) == NAMES and deepspeed.ops.__compatible_ops__ == dict.fromkeys(NAMES, True)
    for name, builder in ALL_OPS.items():
        assert builder.NAME == name and builder.BUILD_VAR.startswith("DS_BUILD_") and builder.is_compatible(verbose=True)
        assert builder.load().__name__ == builder.absolute_name()


def test_the_line_people_know():
    assert deepspeed.ops.adam.cpu_adam.CPUAdamBuilder().load() is lib()


def test_without_the_compiled_module(monkeypatch):
    def missing():
        raise NativeExtensionError("not compiled")
    monkeypatch.setattr(kernels, "lib", missing)
    assert not op_builder.CPUAdamBuilder().is_compatible()
    with pytest.warns(UserWarning, match="cpu_adam: not compiled"):
        op_builder.CPUAdamBuilder().is_compatible(verbose=True)
    with pytest.raises(NativeExtensionError):
        op_builder.CPUAdamBuilder().load()


def test_what_is_not_built_says_so():
    assert getattr(op_builder, "TransformerBuilder", None) is None
    with pytest.raises(ImportError, match="TransformerBuilder is not built yet"):
        from deepspeed.ops.op_builder import TransformerBuilder  # noqa: F401
