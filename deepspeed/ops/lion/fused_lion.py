# SPDX-License-Identifier: Apache-2.0
from deepspeed.ops._base import FusedOptimizer
from deepspeed.ops._storage import add_options_to


class LionBase(FusedOptimizer):
    """The Lion update; subclasses differ in their constructors."""

    state_names = needed_states = ("exp_avg",)

    def _update(self, group, step, is_new, params, grads, states, backend, options):
        beta1, beta2 = group["betas"]
        backend.lion_step(params, grads, *states, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2),
                          weight_decay=float(group["weight_decay"]), **options)


class FusedLion(LionBase):
    """Lion (Chen et al. 2023), all parameters of a group in one call.

    `set_grad_none`: zero_grad() drops gradients instead of zeroing them.
    """

    set_grad_none = True
    _settings = (*LionBase._settings, "set_grad_none")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, set_grad_none=True, adamw_mode=None, **storage_options):
        self.set_grad_none = set_grad_none
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), **storage_options)

    def zero_grad(self, set_to_none=None):
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None):
        """One update. Only `closure` is meant; the other arguments exist to be refused."""
        if any(x is not None for x in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedLion.step() takes no grads, output_params, scale or grad_norms: gradients are read from the parameters")
        return super().step(closure)


add_options_to(FusedLion)
