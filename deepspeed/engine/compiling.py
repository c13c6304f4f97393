# SPDX-License-Identifier: Apache-2.0
"""The engine's module under torch.compile; see the Note in deepspeed.zero.borders."""
from deepspeed.device import get_accelerator
from deepspeed.zero import borders


class Compilation:
    _compiled = False

    def compile(self, backend=None, compile_kwargs=None, schedule=None, compiled_autograd_enabled=False):
        """Compiles the module in place with torch.compile; graphs end where ZeRO gathers and frees parameters, and nowhere else.

        Units are modules of one class, and where each instance needs a graph of its own (an index it computes with, a cache it fills)
        there are as many as instances: torch._dynamo.config.recompile_limit is raised to allow them.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise NotImplementedError("compile: schedules of passes and compiled autograd are not built yet; call compile() without them")
        options = dict(compile_kwargs or {})
        hooked = self._managed.module_hooks.hooked if self._managed is not None else 0
        if hooked and options.get("fullgraph"):
            raise ValueError(f"compile: fullgraph cannot hold at ZeRO stage 3, where graphs end at the borders of units ({hooked} modules of "
                             "this model): leave fullgraph out, or use stage 2")
        borders.prepare(hooked)
        self.module.compile(backend=backend or get_accelerator().get_compile_backend(), **options)
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
