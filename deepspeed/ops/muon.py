# SPDX-License-Identifier: Apache-2.0
"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, with Adam beside it for everything that is not a matrix."""
import torch

from deepspeed.ops._base import FusedOptimizer, all_or_nothing, dtensor_refused, name_of, opaque_refused, saved_states, sparse_refused
from deepspeed.ops._shards import is_dtensor, is_plain

# x -> a x + b x^3 + c x^5 drives every singular value in (0, 1] towards 1 (roughly 0.7 to 1.2), fastest near zero.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def _work_dtype(tensor):
    """bfloat16 on GPUs, where it is what the matrix units are for; elsewhere at least float32."""
    if tensor.device.type == "cuda":
        return torch.bfloat16
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32


def zeropower_via_newtonschulz5(G, steps=5):
    """The nearest semi-orthogonal matrix, about: U V^T of G = U S V^T. G has at least two dimensions; leading ones are a batch."""
    if G.ndim < 2:
        raise ValueError(f"G must have at least 2 dimensions, got shape {tuple(G.shape)}")
    a, b, c = NEWTON_SCHULZ
    X = G.to(_work_dtype(G))
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


def zeropower_via_gram_newtonschulz(G, steps=5):
    """As zeropower_via_newtonschulz5, iterating on the small Gram matrix: two products with the large side instead of two a step.

    With R = X X^T and Z = a I + b R + c R^2 an iteration is X <- Z X, hence R <- Z R Z. The product of the Zs is applied to X
    at the end. Its error grows with the conditioning of R, so the small matrices are float32 (or float64) on every device.
    """
    if G.ndim < 2:
        raise ValueError(f"G must have at least 2 dimensions, got shape {tuple(G.shape)}")
    a, b, c = NEWTON_SCHULZ
    X = G if G.dtype in (torch.float32, torch.float64) else G.float()
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    R = X @ X.mT
    eye = torch.eye(R.size(-1), dtype=R.dtype, device=R.device)
    product = eye
    for step in range(steps):
        Z = a * eye + b * R + c * R @ R
        product = Z @ product
        if step + 1 < steps:
            R = Z @ R @ Z
    X = product @ X
    return (X.mT if tall else X).to(G.dtype)


_ORTHOGONALISERS = {"standard": zeropower_via_newtonschulz5, "gram": zeropower_via_gram_newtonschulz}


def _orthogonaliser(ns_method):
    try:
        return _ORTHOGONALISERS[ns_method]
    except KeyError:
        raise ValueError(f"ns_method must be one of {sorted(_ORTHOGONALISERS)}, got {ns_method!r}") from None


def muon_update(grad, momentum, beta=0.95, ns_steps=5, nesterov=True, ns_method="gram"):
    """The direction of one step; updates `momentum` in place, leaves `grad` alone. Four-dimensional weights count as rows of filters.

    The result is scaled by sqrt(max(1, rows / columns)), which makes the learning rate independent of the shape.
    """
    momentum.lerp_(grad.to(momentum.dtype), 1 - beta)
    update = torch.lerp(grad.to(momentum.dtype), momentum, beta) if nesterov else momentum
    if not grad.numel():
        return update
    matrix = update.flatten(1) if update.ndim == 4 else update
    matrix = _orthogonaliser(ns_method)(matrix, steps=ns_steps)
    return (matrix * max(1.0, matrix.size(-2) / matrix.size(-1))**0.5).reshape(grad.shape)


def _check_rates(owner, **values):
    for key, value in values.items():
        if value is not None and not float(value) >= 0:
            raise ValueError(f"{owner}: {key} must not be negative or NaN, got {value}")


def _check_matrices(optimizer, params):
    for p in params:
        if not is_plain(p):
            raise dtensor_refused(optimizer, p) if is_dtensor(p) else opaque_refused(optimizer, p)
        shape = getattr(p, "ds_shape", p.shape)
        if len(shape) < 2:
            raise ValueError(f"{type(optimizer).__name__}: {name_of(optimizer, p)} has shape {list(shape)}: Muon needs at least two dimensions; "
                             "give it to Adam, as MuonWithAuxAdam does with use_muon=False")


def _refuse_sparse(optimizer):
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None and p.grad.is_sparse:
            raise sparse_refused(optimizer, p)


def _tensor_of(member):
    """A parameter that may have come with its name."""
    return member[1] if isinstance(member, tuple) else member


class Muon(torch.optim.Optimizer):
    """Muon for parameters that are all matrices (or stacks of them)."""

    def __init__(self, params, lr=0.02, weight_decay=0.0, momentum=0.95, ns_method="gram"):
        _check_rates(type(self).__name__, lr=lr, weight_decay=weight_decay, momentum=momentum)
        _orthogonaliser(ns_method)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, ns_method=ns_method))

    def add_param_group(self, param_group):
        with all_or_nothing(self):
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            _check_rates(type(self).__name__, **{key: group[key] for key in ("lr", "weight_decay", "momentum")})
            _check_matrices(self, group["params"])

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_sparse(self)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _muon_step(p, self.state[p], group)
        return loss

    def load_state_dict(self, state_dict):
        """As torch.optim.Optimizer, but momenta stay as wide as they are here. What is refused changes nothing."""
        with all_or_nothing(self):
            super().load_state_dict(state_dict)
            for p, _, saved in saved_states(self, state_dict):
                self.state[p]["momentum_buffer"] = _restored_momentum(self, p, saved)


SingleDeviceMuon = Muon


def _momentum_dtype(p):
    return torch.promote_types(p.dtype, torch.float32)


def _restored_momentum(optimizer, p, saved):
    """Copied from what was saved: torch rounds loaded states to the parameter's dtype."""
    momentum = saved.get("momentum_buffer")
    if momentum is None:
        raise ValueError(f"{type(optimizer).__name__}: the saved state of {name_of(optimizer, p)} has no 'momentum_buffer': it holds {sorted(saved)}")
    if momentum.shape != p.shape:
        raise ValueError(f"{type(optimizer).__name__}: {name_of(optimizer, p)}: the saved momentum_buffer has shape {list(momentum.shape)}, "
                         f"here it is {list(p.shape)}")
    return momentum.to(device=p.device, dtype=_momentum_dtype(p), copy=True)


def _muon_step(p, state, group):
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p, dtype=_momentum_dtype(p))
    update = muon_update(p.grad, state["momentum_buffer"], beta=float(group["momentum"]), ns_method=group.get("ns_method", "gram"))
    lr = float(group["lr"])
    wide = p if p.dtype in (torch.float32, torch.float64) else p.float()
    wide.mul_(1 - lr * float(group["weight_decay"])).add_(update, alpha=-lr)
    if wide is not p:
        p.copy_(wide)


class MuonWithAuxAdam(FusedOptimizer):
    """Muon for the parameters tagged `use_muon`, AdamW for the others.

    A group says which with its key `use_muon`; a group without the key is read parameter by parameter from the attribute
    `use_muon`, and where that is missing too, matrices take Muon. `muon_lr` and `adam_lr` replace `lr` for their half; a group's own
    `lr` wins over both. State: momentum_buffer, or step, exp_avg and exp_avg_sq.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    needed_states = ("step", "exp_avg", "exp_avg_sq")
    _muon_lr, _adam_lr = 0.02, 3e-4
    _settings = (*FusedOptimizer._settings, "_muon_lr", "_adam_lr")

    def __init__(self, params, lr=None, muon_lr=None, adam_lr=None, momentum=0.95, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-10,
                 ns_method="gram"):
        _check_rates(type(self).__name__, lr=lr, muon_lr=muon_lr, adam_lr=adam_lr, momentum=momentum)
        _orthogonaliser(ns_method)
        self._muon_lr = next(x for x in (muon_lr, lr, 0.02) if x is not None)
        self._adam_lr = next(x for x in (adam_lr, lr, 3e-4) if x is not None)
        super().__init__(self._split(list(params)), dict(momentum=momentum, weight_decay=weight_decay, betas=betas, eps=eps, ns_method=ns_method))

    @staticmethod
    def _wants_muon(group, p):
        return bool(group.get("use_muon", getattr(p, "use_muon", p.ndim >= 2)))

    def _split(self, params):
        """Bare parameters become a Muon group and an Adam group; given groups are kept as they are."""
        if not params or isinstance(params[0], dict):
            return params
        halves = [{"params": [p for p in params if self._wants_muon({}, _tensor_of(p)) is kind], "use_muon": kind} for kind in (True, False)]
        return [half for half in halves if half["params"]]

    def add_param_group(self, param_group):
        members = param_group["params"]
        members = [members] if torch.is_tensor(members) else list(members)
        param_group["params"] = members
        kinds = {self._wants_muon(param_group, _tensor_of(p)) for p in members}
        if len(kinds) > 1 and "lr" not in param_group and self._muon_lr != self._adam_lr:
            raise ValueError("a parameter group holds matrices for Muon and other parameters for Adam, whose learning rates differ: "
                             "give the group an lr or split it by use_muon")
        param_group.setdefault("lr", self._muon_lr if kinds == {True} else self._adam_lr)
        super().add_param_group(param_group)

    def _check_params(self, group):
        super()._check_params(group)
        _check_matrices(self, [p for p in group["params"] if self._wants_muon(group, p)])

    def _check_group(self, group):
        super()._check_group(group)
        if not float(group["momentum"]) >= 0.0:
            raise ValueError(f"momentum must not be negative or NaN, got {group['momentum']}")

    def _check_step(self):
        super()._check_step()
        _refuse_sparse(self)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = super().step(closure)  # the Adam half, after the closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and self._wants_muon(group, p):
                    _muon_step(p, self.state[p], group)
        return loss

    def _restore(self, p, group, saved):
        if self._wants_muon(group, p):
            self.state[p]["momentum_buffer"] = _restored_momentum(self, p, saved)
        else:
            super()._restore(p, group, saved)

    def _batches(self, group):
        return super()._batches({**group, "params": [p for p in group["params"] if not self._wants_muon(group, p)]})

    def _update(self, group, step, is_new, params, grads, states, backend, options):
        beta1, beta2 = group["betas"]
        backend.adam_step(params, grads, *states, step=step, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2),
                          eps=float(group["eps"]), weight_decay=float(group["weight_decay"]), adamw=True, bias_correction=True, **options)


SingleDeviceMuonWithAuxAdam = MuonWithAuxAdam
