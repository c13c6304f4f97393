# SPDX-License-Identifier: Apache-2.0
"""How a fused optimizer keeps master values and states: the keyword options its constructor takes, and the tensors they need."""
import torch

from deepspeed._native import lib

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGE_BYTES = 2**22
OPTION_NAMES = ("master", "rounding", "state_dtype", "seed")
CODE_BLOCK = 256  # elements of an 8-bit state that share a scale; csrc/kernels/optim/forms.h
OPTIONS = """
    Keyword options, for less memory (bytes an element for Adam: float32 states and a float32 master beside a bfloat16 weight take 14):

    `master="split"`: bfloat16 parameters are the upper halves of float32 masters whose lower 16 bits are the state "low_bits" (12 bytes in
    all). Updates have the bits of a float32 master; the weight is the master rounded to nearest, ties away from zero.
    `rounding="stochastic"`: bfloat16 parameters have no master and are rounded up or down at random, right on average (10 bytes; Gupta et al.
    2015). The bits depend on `seed`, the parameter's place in the groups, its number of the update and the element alone.
    `state_dtype`: torch.float32 (default), torch.bfloat16 or torch.float16, or "8bit": blocks of 256 elements with a float32 scale each
    (Dettmers et al. 2022), in "<state>" and "<state>_scale" (2 bytes an Adam state pair). Errors: csrc/kernels/optim/forms.h.
    The engine keeps master values and states itself and refuses optimizers with these options.
"""


def add_options_to(*kinds):
    """Appends the text of OPTIONS to the classes' docstrings."""
    for kind in kinds:
        kind.__doc__ = kind.__doc__.rstrip() + "\n" + OPTIONS


def _zeros_like(param, dtype):
    """Zeros laid out like the parameter; large ones on the CPU in huge pages, which an update streams through a quarter faster."""
    like = torch.zeros_like if param.numel() * dtype.itemsize < _LARGE_BYTES or param.device.type != "cpu" else _huge_zeros_like
    return like(param, dtype=dtype, memory_format=torch.preserve_format)


def _huge_zeros_like(param, dtype, memory_format):
    # The strides that zeros_like would choose; a parameter with gaps has none of its own that fit.
    strides = torch.empty_like(param, dtype=dtype, device="meta", memory_format=memory_format).stride()
    return lib().long_lived_zeros(param.numel(), dtype, param.device).as_strided(param.shape, strides)


def scale_key(name):
    return name + "_scale"


class Storage:
    """The options of one optimizer, checked."""

    def __init__(self, owner, fp32_optimizer_states=True, master=None, rounding="nearest", state_dtype=None, seed=0):
        if master not in (None, "split"):
            raise ValueError(f"{owner}: master must be None or 'split', got {master!r}")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"{owner}: rounding must be 'nearest' or 'stochastic', got {rounding!r}")
        if master and rounding == "stochastic":
            raise ValueError(f"{owner}: a split master is exact: master='split' and rounding='stochastic' exclude each other")
        if state_dtype is not None and state_dtype != "8bit" and state_dtype not in STATE_DTYPES:
            raise ValueError(f"{owner}: state_dtype must be '8bit' or one of {STATE_DTYPES}, got {state_dtype!r}")
        if not 0 <= int(seed) < 2**64:
            raise ValueError(f"{owner}: seed must lie in [0, 2^64), got {seed}")
        self.is_split, self.is_stochastic, self.is_8bit = master == "split", rounding == "stochastic", state_dtype == "8bit"
        self.state_dtype, self.fp32_states, self.seed = state_dtype, bool(fp32_optimizer_states), int(seed)

    @classmethod
    def of_states(cls, owner, states, names):
        """The options that made these states ({parameter: {name: tensor}}), as far as they show: rounding does not."""
        options = {}
        for param, state in states.items():
            if "low_bits" in state:
                options["master"] = "split"
            for name in names:
                if scale_key(name) in state:
                    options["state_dtype"] = "8bit"
                elif name in state and state[name].dtype != torch.float32:
                    as_param = state[name].dtype == param.dtype
                    options.update(dict(fp32_optimizer_states=False) if as_param else dict(state_dtype=state[name].dtype))
        return cls(owner, **options)

    @property
    def is_plain(self):
        """Whether master values and states are what they are without any option."""
        return not (self.is_split or self.is_stochastic or self.is_8bit or self.state_dtype is not None)

    def splits(self, param):
        return self.is_split and param.dtype == torch.bfloat16

    def dtype_of(self, param):
        """Of a state that is kept in floats."""
        if self.state_dtype is not None:
            return self.state_dtype
        return torch.float32 if self.fp32_states else param.dtype

    def fresh(self, param, names, unsigned):
        """The tensors of a parameter that has not been stepped: {key: zeros}. A large parameter itself moves into huge pages, too."""
        tensors = {}
        if param.device.type == "cpu" and param.nbytes >= _LARGE_BYTES:
            lib().settle(param.detach())

        def zeros(dtype):
            return _zeros_like(param, dtype)

        for name in names:
            if self.is_8bit:
                tensors[name] = zeros(torch.uint8 if name in unsigned else torch.int8)
                blocks = (param.numel() + CODE_BLOCK - 1) // CODE_BLOCK
                tensors[scale_key(name)] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
            else:
                tensors[name] = zeros(self.dtype_of(param))
        if self.splits(param):
            tensors["low_bits"] = zeros(torch.int16)
        return tensors

    def restored(self, param, fresh, saved):
        """`fresh` filled from the saved state of a parameter. Float states may differ in dtype; codes and low bits must be what they are here."""
        for key, tensor in fresh.items():
            if key not in saved:
                if key == "low_bits":
                    continue  # saved without: the weight is the master
                raise ValueError(f"the saved state has no {key!r}: was it saved with another state_dtype?")
            value = saved[key]
            if value.is_floating_point() != tensor.is_floating_point():
                raise ValueError(f"the saved {key} is {value.dtype}, this optimizer keeps it in {tensor.dtype}: use the same state_dtype")
            if value.shape != tensor.shape:
                raise ValueError(f"the saved {key} has shape {list(value.shape)}, here it is {list(tensor.shape)}")
            tensor.copy_(value)
        return fresh

    def call_options(self, params, states, names, step, places):
        """The keyword arguments of lib().adam_step and its kin. places(params): their numbers in the optimizer."""
        options = {}
        if params and self.splits(params[0]):
            options["low_bits"] = [s["low_bits"] for s in states]
        if self.is_8bit:
            options["scales"] = [[s[scale_key(name)] for s in states] for name in names]
        if self.is_stochastic:
            options["rounding"] = (self.seed, step, places(params))
        return options
