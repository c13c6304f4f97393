# SPDX-License-Identifier: Apache-2.0
from deepspeed.ops._base import FusedOptimizer
from deepspeed.ops._storage import add_options_to


class FusedSGD(FusedOptimizer):
    """Stochastic gradient descent with the numbers of torch.optim.SGD, all parameters of a group in one call.

    With `momentum`, state[p]["momentum_buffer"] starts as the first gradient (undamped); `nesterov` steps along gradient + momentum * buffer
    (Sutskever et al. 2013) and needs momentum > 0 and dampening 0. `set_grad_none`: zero_grad() drops gradients instead of zeroing them.
    """

    state_names = ("momentum_buffer",)
    set_grad_none = True
    _settings = (*FusedOptimizer._settings, "set_grad_none")

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, set_grad_none=True, **storage_options):
        self.set_grad_none = set_grad_none
        super().__init__(params, dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov),
                         **storage_options)

    def _check_group(self, group):
        super()._check_group(group)
        if not float(group["momentum"]) >= 0.0:
            raise ValueError(f"momentum must not be negative or NaN, got {group['momentum']}")
        if group["nesterov"] and (float(group["momentum"]) == 0.0 or float(group["dampening"]) != 0.0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0, got {group['momentum']} and {group['dampening']}")

    def _names_in(self, group):
        return self.state_names if float(group["momentum"]) != 0.0 else ()

    def zero_grad(self, set_to_none=None):
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def _update(self, group, step, is_new, params, grads, states, backend, options):
        backend.sgd_step(params, grads, *(states or [[]]), lr=float(group["lr"]), momentum=float(group["momentum"]),
                         dampening=float(group["dampening"]), weight_decay=float(group["weight_decay"]), nesterov=bool(group["nesterov"]),
                         first_step=is_new, **options)


add_options_to(FusedSGD)
