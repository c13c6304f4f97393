# SPDX-License-Identifier: Apache-2.0
"""Where torch.compile stops: at the borders of units.

Note [Compiled models]: hooks gather a unit before the modules that use it run and free it after. None of that is arithmetic, so Dynamo
neither traces the hooks into a graph (the graph ends at a module that has some) nor compiles them as functions of their own. The module's
forward between its hooks is compiled whole: its guards see gathered parameters of their own class, never freed ones.
The hooks of the outermost module run outside its graph, as torch.compile leaves the hooks of the module it is given. Backward needs
nothing: hooks sit on the nodes of compiled graphs as on any other node, and what a graph saves shares the parameters' storages.
"""
import sys

REASON = "parameters are gathered and freed at the borders of ZeRO units"


def not_in_graphs(function):
    """Decorator: a graph ends where it meets this function. What torch.compiler.disable() says of a function, without its
    wrapper at each call and without importing Dynamo for those who do not compile."""
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = REASON
    return function


def keep_out_of_graphs():
    """Dynamo, once it is there (optimizers import it, as torch.compile does), runs the code of this folder as it is."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and not rules.check_file(__file__).skipped:
        rules.add(__package__)


def prepare(instances):
    """A model with so many modules at borders is about to be compiled: each may need a graph of its own, and all may share their code."""
    import torch._dynamo as dynamo
    keep_out_of_graphs()
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, instances)
    dynamo.config.accumulated_recompile_limit = max(dynamo.config.accumulated_recompile_limit, 4 * instances)
