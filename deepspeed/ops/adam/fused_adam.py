# SPDX-License-Identifier: Apache-2.0
from deepspeed.ops._base import FusedOptimizer, refuse_amsgrad
from deepspeed.ops._storage import add_options_to


class AdamBase(FusedOptimizer):
    """The Adam update; subclasses differ in their constructors."""

    state_names = ("exp_avg", "exp_avg_sq")
    needed_states = ("step", "exp_avg", "exp_avg_sq")
    adam_w_mode = True

    def _update(self, group, step, is_new, params, grads, states, backend, options):
        beta1, beta2 = group["betas"]
        backend.adam_step(params, grads, *states, step=step, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2),
                          eps=float(group["eps"]), weight_decay=float(group["weight_decay"]), adamw=bool(self.adam_w_mode),
                          bias_correction=bool(group.get("bias_correction", True)), **options)


class FusedAdam(AdamBase):
    """Adam (Kingma & Ba 2015) or, with `adam_w_mode`, AdamW (Loshchilov & Hutter 2019), all parameters of a group in one call.

    The numbers are those of torch.optim.Adam and AdamW. `set_grad_none`: zero_grad() drops gradients instead of zeroing them.
    """

    set_grad_none = True
    _settings = (*AdamBase._settings, "adam_w_mode", "set_grad_none")

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
                 amsgrad=False, set_grad_none=True, **storage_options):
        refuse_amsgrad("FusedAdam", amsgrad)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none = set_grad_none
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay),
                         **storage_options)

    def zero_grad(self, set_to_none=None):
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        """One update. Only `closure` is meant; the other arguments exist to be refused (use the engine for scaling)."""
        if any(x is not None for x in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam.step() takes no grads, output_params, scale or grad_norms: gradients are read from the parameters")
        if grad_scaler is not None:
            raise RuntimeError("FusedAdam.step() takes no grad_scaler: call scaler.step(optimizer) instead")
        return super().step(closure)


add_options_to(FusedAdam)
