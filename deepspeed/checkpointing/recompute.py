# SPDX-License-Identifier: Apache-2.0
"""Running a function without keeping its activations: only its inputs are saved (deepspeed.checkpointing.resting says where), and
backward runs it again. The second run finds the random states, the tracked ones too, and autocast as the first run did."""
import contextlib
import warnings

import torch
import torch.utils.checkpoint
from torch.utils import _pytree

from deepspeed.checkpointing.configuration import options
from deepspeed.checkpointing.random_states import Surroundings
from deepspeed.checkpointing.resting import SavedInputs
from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.logs import log_dist


def _boundary(what):
    """What the options `synchronize` and `profile` ask for, around one run of the function."""
    chosen = options()
    return _watched(what, chosen) if chosen.synchronize or chosen.profile else contextlib.nullcontext()


@contextlib.contextmanager
def _watched(what, chosen):
    device = get_accelerator()
    if chosen.synchronize:
        device.synchronize()
    if chosen.profile:
        begin, end = device.Event(enable_timing=True), device.Event(enable_timing=True)
        begin.record()
    try:
        yield
    finally:
        if chosen.profile:
            end.record()
            end.synchronize()
            log_dist(f"activation checkpointing: {what} took {begin.elapsed_time(end):.2f} ms")
        if chosen.synchronize:
            device.synchronize()


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


class _Gradient(torch.autograd.Function):
    """Hands an argument on and catches its gradient, with the strides that it has: a leaf's `.grad` takes the strides of the leaf, and
    what reads the gradient next might then add in another order than without checkpointing."""

    @staticmethod
    def forward(ctx, argument, caught, index):
        ctx.caught, ctx.index = caught, index
        return argument.view_as(argument)

    @staticmethod
    def backward(ctx, gradient):
        ctx.caught[ctx.index] = gradient
        return None, None, None


class CheckpointFunction(torch.autograd.Function):
    """apply(run_function, all_outputs, *args): the tensors among the outputs of run_function(*args), which appends all of its outputs to
    the list all_outputs. A lone output is returned bare."""

    @staticmethod
    def forward(ctx, run_function, all_outputs, *args):
        ctx.run_function = run_function
        ctx.surroundings = Surroundings(args)
        ctx.inputs = SavedInputs(args, run_function)
        tensors, ctx.inputs.tensors = ctx.inputs.tensors, None
        with _boundary("forward"), torch.no_grad(), ctx.inputs.settled():
            outputs = run_function(*args)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        all_outputs += outputs
        tensors = [value for value in outputs if _is_tensor(value)]
        ctx.mark_non_differentiable(*(t for t in tensors if not (t.is_floating_point() or t.is_complex())))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    @staticmethod
    def backward(ctx, *gradients):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("deepspeed.checkpointing.checkpoint works with .backward() without its `inputs` argument, not with "
                               "torch.autograd.grad(): use deepspeed.checkpointing.non_reentrant_checkpoint there")
        args = ctx.inputs.restore(ctx.saved_tensors, detach=True)
        caught = [None] * len(args)
        with _boundary("recomputation"), ctx.surroundings.all(), torch.enable_grad():
            args = [_Gradient.apply(value, caught, index) if _is_tensor(value) and value.requires_grad else value
                    for index, value in enumerate(args)]
            outputs = ctx.run_function(*args)
        del args
        outputs = filter(_is_tensor, outputs if isinstance(outputs, (tuple, list)) else [outputs])
        wanted = [(out, gradient) for out, gradient in zip(outputs, gradients) if gradient is not None and out.requires_grad]
        if wanted:
            torch.autograd.backward(*zip(*wanted))
        return None, None, *caught


# ------------------------------------------------------------------------------------------ arguments and outputs of any structure
_PLAIN = (tuple, list, dict)


def _is_leaf(value):
    """Containers are taken apart only where a tensor inside needs a gradient; a function may want to change any other."""
    if type(value) not in _PLAIN:
        return True
    inside = _pytree.tree_leaves(value, is_leaf=lambda v: type(v) not in _PLAIN)
    return not any(_is_tensor(v) and v.requires_grad for v in inside)


class _Call:
    """The function with its arguments as a flat list, and its outputs flat as well."""

    def __init__(self, function, args, kwargs):
        self.function = function
        self.leaves, self._specs = [], []   # a spec for each argument; None: it is its own leaf
        for value in (*args, *kwargs.values()):
            leaves, spec = ([value], None) if _is_leaf(value) else _pytree.tree_flatten(value, is_leaf=_is_leaf)
            self.leaves += leaves
            self._specs.append(spec)
        self._keywords = list(kwargs)
        self._outputs = None
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *leaves):
        values, begin = [], 0
        for spec in self._specs:
            end = begin + (1 if spec is None else spec.num_leaves)
            values.append(leaves[begin] if spec is None else _pytree.tree_unflatten(leaves[begin:end], spec))
            begin = end
        cut = len(values) - len(self._keywords)
        outputs = self.function(*values[:cut], **dict(zip(self._keywords, values[cut:])))
        if _is_tensor(outputs):
            self._outputs = None
            return [outputs]
        flat, self._outputs = _pytree.tree_flatten(outputs, is_leaf=lambda v: not isinstance(v, _PLAIN))
        return flat

    def outputs(self, flat):
        """Of one kind with what the function returned; a tuple or list of one is that one, a longer list is a tuple."""
        return flat[0] if self._outputs is None else _single_or_tuple(_pytree.tree_unflatten(flat, self._outputs))


def _single_or_tuple(outputs):
    if type(outputs) not in (tuple, list):
        return outputs
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def checkpoint(function, *args, **kwargs):
    """function(*args, **kwargs), its activations recomputed in backward by a backward pass inside the backward pass (reentrant).

    At least one tensor among the arguments must require a gradient, or nothing inside gets one. Works with backward() only.
    Returns what the function returns, a tuple or list of one as that one.
    """
    if torch.compiler.is_compiling():
        return _while_compiling(_reentrant, function, args, kwargs)
    return _reentrant(function, args, kwargs)


def _reentrant(function, args, kwargs):
    call = _Call(function, args, kwargs)
    if not torch.is_grad_enabled():
        with _boundary("forward"):
            return _single_or_tuple(function(*args, **kwargs))
    if not any(_is_tensor(leaf) and leaf.requires_grad for leaf in call.leaves):
        warnings.warn("deepspeed.checkpointing.checkpoint: no argument requires a gradient, so nothing inside will get one; "
                      "non_reentrant_checkpoint does not need that", stacklevel=3)
    leaves, call.leaves = call.leaves, None
    everything = []
    tensors = CheckpointFunction.apply(call, everything, *leaves)
    tensors = iter((tensors,) if _is_tensor(tensors) else tensors)
    return call.outputs([next(tensors) if _is_tensor(value) else value for value in everything])


class _SecondRun:
    """Around every further run: torch asks for the context once and enters it at each backward of a graph that is kept."""

    def __init__(self, surroundings):
        self._surroundings, self._entered = surroundings, []

    def __enter__(self):
        stack = contextlib.ExitStack()
        stack.enter_context(_boundary("recomputation"))
        stack.enter_context(self._surroundings.randomness())
        self._entered.append(stack)

    def __exit__(self, *error):
        return self._entered.pop().__exit__(*error)


def non_reentrant_checkpoint(function, *args, **kwargs):
    """The same by saved-tensor hooks: works with inputs that need no gradient and with torch.autograd.grad."""
    if torch.compiler.is_compiling():
        return _while_compiling(_non_reentrant, function, args, kwargs)
    return _non_reentrant(function, args, kwargs)


def _non_reentrant(function, args, kwargs):
    call = _Call(function, args, kwargs)
    if not torch.is_grad_enabled():
        with _boundary("forward"):
            return _single_or_tuple(function(*args, **kwargs))
    first, call.leaves = [call.leaves], None
    surroundings = Surroundings(first[0])
    inputs = SavedInputs(first[0], call)
    tensors, inputs.tensors = inputs.tensors, None

    def run(*saved):
        return call(*(first.pop() if first else inputs.restore(saved, detach=False)))

    with inputs.settled():
        flat = torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False,
                                                 context_fn=lambda: (_boundary("forward"), _SecondRun(surroundings)))
    return call.outputs(flat)


@torch._disable_dynamo
def _outside_the_graph(kind, function, args, kwargs):
    return kind(function, args, kwargs)


def _while_compiling(kind, function, args, kwargs):
    """torch compiles its own checkpoint, in which nothing moves; where inputs do move, the graph ends."""
    chosen = options()
    if chosen.partition_activations or chosen.checkpoint_in_cpu:
        return _outside_the_graph(kind, function, args, kwargs)
    return _single_or_tuple(torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs))
