# SPDX-License-Identifier: Apache-2.0
"""DummyOptim: parameter groups without an optimizer."""


class DummyOptim:
    """What stands for the optimizer of a model that is not trained: it has `param_groups` and nothing else."""

    def __init__(self, params):
        self.param_groups = [{"params": params}]
