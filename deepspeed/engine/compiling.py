# SPDX-License-Identifier: Apache-2.0
"""The engine's module under torch.compile."""
from deepspeed.device import get_accelerator


class Compilation:
    _compiled = False

    def compile(self, backend=None, compile_kwargs=None, schedule=None, compiled_autograd_enabled=False):
        """Compiles the module in place with torch.compile."""
        if schedule is not None or compiled_autograd_enabled:
            raise NotImplementedError("compile: schedules of passes and compiled autograd are not built yet; call compile() without them")
        self.module.compile(backend=backend or get_accelerator().get_compile_backend(), **(compile_kwargs or {}))
        self._compiled = True

    @property
    def is_compiled(self):
        return self._compiled

    def register_compile_pass(self, pass_name, pass_fn, contract=None):
        raise NotImplementedError(f"register_compile_pass({pass_name!r}): passes over the compiled graph are not built yet; "
                                  "engine.compile() runs torch.compile without them")

    def get_compile_time(self):
        """Seconds that passes over the compiled graph have taken, as [(name, position, seconds)]: none run."""
        return []
