# SPDX-License-Identifier: Apache-2.0
"""The optimizer updates of ``deepspeed._C`` in torch operations: the fallback on devices without a kernel, and an oracle of the tests.

Same names, arguments and results (to rounding). Lists hold one tensor a parameter; arithmetic is float32, or float64 for float64 tensors.
"""
import torch


def _wide(tensor):
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _each(update, grad_scale, params, grads, *states):
    """Runs update(p, g, *states) in place on wide copies and writes back what is narrow."""
    for p, g, *own in zip(params, grads, *states):
        tensors = [p, *own]
        wide = [_wide(t) for t in tensors]
        update(wide[0], g.to(wide[0].dtype) * grad_scale, *wide[1:])
        for t, w in zip(tensors, wide):
            if t is not w:
                t.copy_(w)


def adam_step(params, grads, exp_avgs, exp_avg_sqs, *, step, lr, beta1, beta2, eps, weight_decay, adamw, bias_correction, grad_scale=1.0):
    """Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019)."""
    bc1 = 1 - beta1**step if bias_correction else 1.0
    bc2 = 1 - beta2**step if bias_correction else 1.0

    def update(p, g, m, v):
        if adamw:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(bc2**0.5).add_(eps), value=-lr / bc1)

    _each(update, grad_scale, params, grads, exp_avgs, exp_avg_sqs)


def lion_step(params, grads, exp_avgs, *, lr, beta1, beta2, weight_decay, grad_scale=1.0):
    """Lion (Chen et al. 2023)."""

    def update(p, g, m):
        direction = torch.lerp(m, g, 1 - beta1).sign_()
        p.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
        m.lerp_(g, 1 - beta2)

    _each(update, grad_scale, params, grads, exp_avgs)


def adagrad_step(params, grads, sums, *, lr, eps, weight_decay, grad_scale=1.0):
    """Adagrad (Duchi et al. 2011)."""

    def update(p, g, s):
        g = g + weight_decay * p if weight_decay else g
        s.addcmul_(g, g)
        p.addcdiv_(g, s.sqrt().add_(eps), value=-lr)

    _each(update, grad_scale, params, grads, sums)


def sgd_step(params, grads, momentum_buffers, *, lr, momentum, dampening, weight_decay, nesterov, first_step, grad_scale=1.0):
    """torch.optim.SGD. momentum_buffers is empty when momentum is 0."""

    def update(p, g, *buffer):
        g = g + weight_decay * p if weight_decay else g
        if buffer:
            buffer[0].copy_(g) if first_step else buffer[0].mul_(momentum).add_(g, alpha=1 - dampening)
            g = g + momentum * buffer[0] if nesterov else buffer[0]
        p.add_(g, alpha=-lr)

    _each(update, grad_scale, params, grads, *([momentum_buffers] if momentum_buffers else []))


def lamb_step(params, grads, exp_avgs, exp_avg_sqs, *, step, lr, beta1, beta2, eps, weight_decay, bias_correction, eps_inside_sqrt,
              min_coeff, max_coeff, grad_scale=1.0):
    """LAMB (You et al. 2020). Returns the trust ratios, float64."""
    bc1 = 1 - beta1**step if bias_correction else 1.0
    bc2 = 1 - beta2**step if bias_correction else 1.0
    ratios = []

    def update(p, g, m, v):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        second = v / bc2
        u = (m / bc1) / ((second + eps).sqrt() if eps_inside_sqrt else second.sqrt() + eps) + weight_decay * p
        p_norm, u_norm = p.double().norm().item(), u.double().norm().item()
        ratios.append(min(max(p_norm / u_norm, min_coeff), max_coeff) if p_norm != 0 and u_norm != 0 else 1.0)
        p.add_(u, alpha=-lr * ratios[-1])

    _each(update, grad_scale, params, grads, exp_avgs, exp_avg_sqs)
    return torch.tensor(ratios, dtype=torch.float64)
