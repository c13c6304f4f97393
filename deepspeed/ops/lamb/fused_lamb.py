# SPDX-License-Identifier: Apache-2.0
import torch

from deepspeed.ops._base import FusedOptimizer, refuse_amsgrad
from deepspeed.ops._storage import add_options_to


class FusedLamb(FusedOptimizer):
    """LAMB (You et al. 2020): Adam's direction plus weight decay, scaled for each parameter by ||p|| / ||direction||.

    The ratio is clamped to [min_coeff, max_coeff] and is 1 where a norm is zero. `max_grad_norm` > 0 clips the norm of each group's gradients first.
    `eps_inside_sqrt` takes sqrt(v + eps) instead of sqrt(v) + eps.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    needed_states = ("step", "exp_avg", "exp_avg_sq")
    has_whole_norms = True
    _coefficients = ()
    _settings = (*FusedOptimizer._settings, "_coefficients")

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, eps_inside_sqrt=False, weight_decay=0.0,
                 max_grad_norm=0.0, max_coeff=10.0, min_coeff=0.01, amsgrad=False, **storage_options):
        refuse_amsgrad("FusedLamb", amsgrad)
        if not 0.0 <= min_coeff <= max_coeff:
            raise ValueError(f"min_coeff and max_coeff must satisfy 0 <= min_coeff <= max_coeff, got {min_coeff} and {max_coeff}")
        self._coefficients = []
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, eps_inside_sqrt=eps_inside_sqrt,
                                      weight_decay=weight_decay, max_grad_norm=max_grad_norm, max_coeff=max_coeff, min_coeff=min_coeff),
                         **storage_options)

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None):
        """One update. Only `closure` is meant; the other arguments exist to be refused."""
        if any(x is not None for x in (grads, output_params, grad_norms)) or scale not in (None, 1.0):
            raise RuntimeError("FusedLamb.step() takes no grads, output_params, scale or grad_norms: gradients are read from the parameters")
        return super().step(closure)

    def _check_step(self):
        super()._check_step()
        self._coefficients = []

    def _update(self, group, step, is_new, params, grads, states, backend, options):
        beta1, beta2 = group["betas"]
        ratios = backend.lamb_step(
            params, grads, *states, step=step, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2), eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]), bias_correction=bool(group["bias_correction"]),
            eps_inside_sqrt=bool(group["eps_inside_sqrt"]), min_coeff=float(group["min_coeff"]), max_coeff=float(group["max_coeff"]),
            grad_scale=self._clip_scale(group), **options)
        self._coefficients.append((self._places(params), ratios))  # on the device until somebody asks

    def _clip_scale(self, group):
        limit = float(group["max_grad_norm"])
        if limit <= 0:
            return 1.0
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in group["params"] if p.grad is not None]
        norm = float(torch.stack([n.to(norms[0].device) for n in norms]).norm())  # one wait for a GPU, not one a parameter
        scale = limit / (norm + 1e-6)
        return 1.0 if scale > 1.0 else scale  # a norm that is no number spreads to every gradient, as with torch's clip_grad_norm_

    def get_lamb_coeffs(self):
        """The ratios of the last step, one a parameter that had a gradient, in the order of the groups and their parameters."""
        ratios = {number: ratio for numbers, batch in self._coefficients for number, ratio in zip(numbers, batch.tolist())}
        return [ratios[number] for number in sorted(ratios)]


add_options_to(FusedLamb)
