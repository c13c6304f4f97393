# SPDX-License-Identifier: Apache-2.0
"""Loss scaling for fp16: a constant factor, or one that halves on overflow and doubles after a run of good steps."""
from dataclasses import dataclass
from enum import Enum


class LossScaleProfile(Enum):
    DEFAULT = 1
    AUTO = 2


@dataclass(frozen=True)
class LossScaleConfig:
    """What a checkpoint of the known package may carry."""
    low_precision_dtype: object = None
    dynamic_loss_scale: bool = False
    static_loss_scale: float = 1.0
    dynamic_loss_args: object = None
    profile: LossScaleProfile = LossScaleProfile.DEFAULT


class LossScaleFloorError(RuntimeError):
    """Gradients overflow although the loss scale is as small as it may get."""


class LossScalerBase:
    """A factor on the loss; gradients are divided by it before they are used."""

    dynamic = False

    def __init__(self, scale):
        self.cur_scale = float(scale)

    @property
    def loss_scale(self):
        return self.cur_scale

    def scale_gradient(self, module, grad_in, grad_out):
        return tuple(self.loss_scale * g for g in grad_in)

    def update_scale(self, overflow, where=""):
        """Called once for every step. `where` says which gradient overflowed, for messages."""

    def backward(self, loss, retain_graph=False):
        (loss * self.loss_scale).backward(retain_graph=retain_graph)

    def state_dict(self):
        return {"cur_scale": self.cur_scale}

    def load_state_dict(self, state):
        self.cur_scale = float(state["cur_scale"])


class LossScaler(LossScalerBase):
    """A constant scale: a step whose gradients are not finite is skipped, the scale stays."""

    def __init__(self, scale=1.0):
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """Halves the scale when `delayed_shift` overflows have come, doubles it after `scale_window` steps without one.

    With consecutive_hysteresis the tolerance is refilled by every good step, otherwise only when the scale doubles.
    """

    dynamic = True

    def __init__(self, init_scale=2.0**32, scale_factor=2.0, scale_window=1000, min_scale=1.0, delayed_shift=1,
                 consecutive_hysteresis=False, raise_error_at_min_scale=True, dtype=None):
        super().__init__(init_scale)
        self.scale_factor, self.scale_window, self.min_scale = float(scale_factor), int(scale_window), float(min_scale)
        self.delayed_shift, self.consecutive_hysteresis = int(delayed_shift), bool(consecutive_hysteresis)
        self.raise_error_at_min_scale = raise_error_at_min_scale
        self.cur_hysteresis = self.delayed_shift
        self.cur_iter = 0
        self.last_overflow_iter = -1

    def update_scale(self, overflow, where=""):
        if overflow:
            if self.delayed_shift == 1 or self.cur_hysteresis == 1:
                if self.cur_scale <= self.min_scale and self.raise_error_at_min_scale:
                    raise LossScaleFloorError(
                        f"fp16: gradients overflow{where} although the loss scale is at its floor of {self.min_scale:g} "
                        "(fp16.min_loss_scale). The loss itself is probably not finite: look at the data and the learning rate, or "
                        "use bf16")
                self.cur_scale = max(self.cur_scale / self.scale_factor, self.min_scale)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            if self.consecutive_hysteresis:
                self.cur_hysteresis = self.delayed_shift
            if (self.cur_iter - self.last_overflow_iter) % self.scale_window == 0:
                if not self.consecutive_hysteresis:
                    self.cur_hysteresis = self.delayed_shift
                self.cur_scale *= self.scale_factor
        self.cur_iter += 1

    def state_dict(self):
        return {name: getattr(self, name) for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)


def CreateLossScaler(dtype=None, static_loss_scale=1.0, dynamic_scaling=False, dynamic_loss_args=None):
    """The scaler for a dtype: none but fp16 needs one."""
    import torch
    if dtype != torch.half:
        return LossScaler(1.0)
    return DynamicLossScaler(**(dynamic_loss_args or {})) if dynamic_scaling else LossScaler(static_loss_scale)


def scaler_for(fp16):
    """The scaler the `fp16` section asks for; a scale of 1 when it is off."""
    if not fp16.enabled:
        return LossScaler(1.0)
    if fp16.loss_scale:
        return LossScaler(fp16.loss_scale)
    return DynamicLossScaler(init_scale=2.0**fp16.initial_scale_power, scale_window=fp16.loss_scale_window,
                             min_scale=fp16.min_loss_scale, delayed_shift=fp16.hysteresis,
                             consecutive_hysteresis=fp16.consecutive_hysteresis)
