# SPDX-License-Identifier: Apache-2.0
"""The fused optimizers against torch.optim, or the published formula, element by element at every one of 100 steps.

Tolerance: every element's distance to the same run in float64 is at most twice the largest that torch has among all parameters at that dtype,
plus two roundings (where torch happens to be exact). Distances are counted in roundings of the element, or of the root mean square of all
where the element is smaller: an average that cancels to almost nothing keeps the roundings of its terms. Parameters and states are held to it.
"""
import copy

import pytest
import torch

from deepspeed.ops import reference
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.sgd import FusedSGD

STEPS = 100
SHAPES = [(1,), (7,), (8,), (9,), (33, 31), (4099,), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step, like, dtype):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(dtype).to(p.dtype) for p in like]


def run(optimizer, params, dtype, names, steps=STEPS):
    """Yields ([params], {name: [states]}) in float64 after every step."""
    for step in range(steps):
        for p, g in zip(params, gradients(step, params, dtype)):
            p.grad = g
        optimizer.step()
        yield ([p.detach().double() for p in params],
               {name: [optimizer.state[p][name].double() for p in params] for name in names})


def spacing(exact, dtype):
    return exact.abs().clamp_min(exact.square().mean().sqrt()) * torch.finfo(dtype).eps + torch.finfo(dtype).tiny


def assert_close(ours, torchs, exact, dtype, what):
    ours, torchs, exact = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (ours, torchs, exact))
    unit = spacing(exact, dtype)
    bound = 2 * ((torchs - exact).abs() / unit).max() + 2
    errors = (ours - exact).abs() / unit
    assert (errors <= bound).all(), f"{what}: element {errors.argmax()}: {errors.max():.2f} roundings from float64, allowed {bound:.2f}"


TORCH_CASES = {
    "adamw": (lambda p: FusedAdam(p, lr=1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
              {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}),
    "adam": (lambda p: DeepSpeedCPUAdam(p, lr=1e-2, weight_decay=0.1, adamw_mode=False),
             lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1), {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}),
    "adam without decay": (lambda p: DeepSpeedCPUAdam(p, lr=1e-2, betas=(0.4, 0.9)),
                           lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.4, 0.9)), {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}),
    "adagrad": (lambda p: DeepSpeedCPUAdagrad(p, lr=1e-2, weight_decay=0.01), lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.01),
                {"exp_avg_sq": "sum"}),
    "sgd": (lambda p: FusedSGD(p, lr=1e-2, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1), {}),
    "sgd with momentum": (lambda p: FusedSGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
                          lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
                          {"momentum_buffer": "momentum_buffer"}),
    "nesterov": (lambda p: FusedSGD(p, lr=1e-2, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
                 {"momentum_buffer": "momentum_buffer"}),
}


@pytest.mark.parametrize("case", TORCH_CASES)
def test_float32_against_torch(case):
    ours_of, torch_of, names = TORCH_CASES[case]
    dtype = torch.float32
    ours, theirs = parameters(dtype), parameters(dtype)
    exact = [torch.nn.Parameter(p.detach().double()) for p in parameters(dtype)]
    runs = zip(run(ours_of(ours), ours, dtype, names), run(torch_of(theirs), theirs, dtype, names.values()),
               run(torch_of(exact), exact, dtype, names.values()))
    for step, ((p, s), (tp, ts), (ep, es)) in enumerate(runs):
        assert_close(p, tp, ep, dtype, f"step {step}: params")
        for name, torch_name in names.items():
            assert_close(s[name], ts[torch_name], es[torch_name], dtype, f"step {step}: {name}")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", TORCH_CASES)
def test_narrow_parameters_against_float32_rounded_each_step(case, dtype):
    """A narrow parameter takes the float32 step from its value and is rounded once; the states stay float32, to the bit."""
    ours_of, _, names = TORCH_CASES[case]
    ours, wide = parameters(dtype), [torch.nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    optimizer, wide_optimizer = ours_of(ours), ours_of(wide)
    for step in range(STEPS):
        for p, w, g in zip(ours, wide, gradients(step, ours, dtype)):
            p.grad, w.grad = g, g.float()
        optimizer.step()
        wide_optimizer.step()
        for p, w in zip(ours, wide):
            with torch.no_grad():
                w.copy_(w.to(dtype))
            assert torch.equal(p.detach(), w.detach().to(dtype))
            for name in names:
                assert optimizer.state[p][name].dtype == torch.float32
                assert torch.equal(optimizer.state[p][name], wide_optimizer.state[w][name])


def lion_exact(p, g, s, lr=1e-2, b1=0.9, b2=0.99, wd=0.1):
    p.mul_(1 - lr * wd).sub_(lr * torch.sign(b1 * s["exp_avg"] + (1 - b1) * g))
    s["exp_avg"].mul_(b2).add_((1 - b2) * g)


def lamb_exact(p, g, s, lr=1e-2, b1=0.9, b2=0.999, wd=0.1, eps=1e-8):
    s["step"] += 1
    s["exp_avg"].mul_(b1).add_((1 - b1) * g)
    s["exp_avg_sq"].mul_(b2).add_((1 - b2) * g * g)
    u = (s["exp_avg"] / (1 - b1**s["step"])) / ((s["exp_avg_sq"] / (1 - b2**s["step"])).sqrt() + eps) + wd * p
    pn, un = p.norm(), u.norm()
    ratio = (pn / un).clamp(0.01, 10.0) if pn > 0 and un > 0 else 1.0
    p.sub_(lr * ratio * u)


FORMULA_CASES = {
    "fused lion": (lambda p: FusedLion(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), lion_exact, ["exp_avg"]),
    "cpu lion": (lambda p: DeepSpeedCPULion(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), lion_exact, ["exp_avg"]),
    "lamb": (lambda p: FusedLamb(p, lr=1e-2, weight_decay=0.1), lamb_exact, ["exp_avg", "exp_avg_sq"]),
}


@pytest.mark.parametrize("case", FORMULA_CASES)
def test_float32_against_the_formula(case):
    """The formula in float64 is exact, the formula in float32 is the yardstick: plain torch at that dtype."""
    ours_of, formula, names = FORMULA_CASES[case]
    ours = parameters(torch.float32)
    plain, exact = [p.detach().clone() for p in ours], [p.detach().double() for p in ours]
    states = [[{"step": 0, **{n: torch.zeros_like(p) for n in names}} for p in ps] for ps in (plain, exact)]
    for step, (p, s) in enumerate(run(ours_of(ours), ours, torch.float32, names)):
        for ps, ss in zip((plain, exact), states):
            for q, g, state in zip(ps, gradients(step, ours, torch.float32), ss):
                formula(q, g.to(q.dtype), state)
        assert_close(p, [q.double() for q in plain], exact, torch.float32, f"step {step}: params")
        for name in names:
            assert_close(s[name], [x[name].double() for x in states[0]], [x[name] for x in states[1]], torch.float32, f"step {step}: {name}")


@pytest.mark.parametrize("make", [lambda p: FusedAdam(p, weight_decay=0.1), lambda p: FusedLion(p, weight_decay=0.1),
                                  lambda p: FusedLamb(p, weight_decay=0.1), lambda p: DeepSpeedCPUAdagrad(p, weight_decay=0.1),
                                  lambda p: FusedSGD(p, momentum=0.9, nesterov=True), lambda p: FusedSGD(p, weight_decay=0.1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fallback_agrees_with_the_kernels(make, dtype, monkeypatch):
    kernel, fallback = parameters(dtype), parameters(dtype)
    results = []
    for params, backend in ((kernel, None), (fallback, reference)):
        with monkeypatch.context() as patch:
            if backend is not None:
                patch.setattr("deepspeed.ops._base._backend", lambda device: backend)
            *_, last = run(make(params), params, dtype, (), steps=10)
            results.append(last[0])
    for a, b in zip(*results):
        # Ten steps, each with a handful of float32 roundings and one to the parameter's dtype.
        torch.testing.assert_close(a, b, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(torch.float32).eps)


def test_bfloat16_states_are_kept_when_asked():
    p = torch.nn.Parameter(torch.randn(100, dtype=torch.bfloat16))
    optimizer = DeepSpeedCPUAdam([p], fp32_optimizer_states=False)
    p.grad = torch.randn(100).bfloat16()
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(optimizer.state[p]["exp_avg"], (p.grad.float() * (1 - 0.9)).bfloat16())


def test_group_dicts_are_kept_and_lr_is_read_each_step():
    p = torch.nn.Parameter(torch.ones(10))
    group = {"params": [p], "lr": 0.0, "foreach": None, "capturable": False, "fused": None, "initial_lr": 1.0}
    optimizer = DeepSpeedCPUAdam([group], lr=1.0)
    assert optimizer.param_groups[0] is group
    p.grad = torch.ones(10)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(10))
    group["lr"] = 0.5
    optimizer.step()
    assert (p.detach() < 0.6).all()
    again = DeepSpeedCPUAdam(torch.optim.AdamW([p]).param_groups)  # groups that carry every key of torch's AdamW
    again.step()


@pytest.mark.parametrize("kind", [DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion])
def test_adamw_mode_is_tolerated(kind):
    kind([torch.nn.Parameter(torch.ones(2))], lr=1e-3, weight_decay=0.0, adamw_mode=True)


def test_state_dict_round_trip_keeps_float32_states():
    p = torch.nn.Parameter(torch.randn(33, dtype=torch.bfloat16))
    optimizer = FusedAdam([p])
    for _ in range(3):
        p.grad = torch.randn(33).bfloat16()
        optimizer.step()
    q = torch.nn.Parameter(p.detach().clone())
    other = FusedAdam([q])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[q]["step"] == 3 and other.state[q]["exp_avg"].dtype == torch.float32
    assert torch.equal(other.state[q]["exp_avg"], optimizer.state[p]["exp_avg"])
    p.grad = q.grad = torch.randn(33).bfloat16()
    optimizer.step(), other.step()
    assert torch.equal(p.detach(), q.detach())
    # torch keeps the step in a tensor
    theirs = torch.optim.AdamW([torch.nn.Parameter(q.detach().float())])
    theirs.param_groups[0]["params"][0].grad = torch.randn(33)
    theirs.step()
    other.load_state_dict(theirs.state_dict())
    other.step()
    assert other.state[q]["step"] == 2


def test_closure_missing_gradients_and_layouts():
    weight = torch.nn.Parameter(torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last))
    transposed = torch.nn.Parameter(torch.randn(5, 7).t())
    unused = torch.nn.Parameter(torch.ones(3))
    plain = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in (weight, transposed)]
    ours, theirs = FusedAdam([weight, transposed, unused], lr=1e-2), torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.0)
    for p, q in zip((weight, transposed), plain):
        q.grad = torch.randn(q.shape)
        p.grad = q.grad  # contiguous, unlike the parameter

    def closure():
        assert torch.is_grad_enabled()
        return 4.5

    assert ours.step(closure) == 4.5
    theirs.step()
    for p, q in zip((weight, transposed), plain):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(unused.detach(), torch.ones(3)) and len(ours.state[unused]) == 0


def test_threads_change_no_bit():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            p = torch.nn.Parameter(torch.randn(600_001, generator=generator).to(dtype))
            p.grad = torch.randn(600_001, generator=generator).to(dtype)
            for kind in (FusedAdam, FusedLamb):
                kind([p], lr=1e-2).step()
            results.append(p.detach().clone())
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("name", ["ZenFlowCPUAdam", "ZenFlowSelectiveAdamW", "ZenFlowSelectiveAdamW_stage3"])
def test_zenflow_says_that_it_is_not_built(name):
    from deepspeed.ops import adam
    with pytest.raises(NotImplementedError, match=f"{name} is not built yet"):
        getattr(adam, name)([torch.nn.Parameter(torch.ones(4))], lr=1e-3)


def test_sgd_groups():
    p = torch.nn.Parameter(torch.ones(4))
    for options, message in [(dict(momentum=-1.0), "momentum must not be"), (dict(nesterov=True), "nesterov needs"), (dict(lr=-1.0), "lr must not be"),
                             (dict(momentum=0.9, dampening=0.1, nesterov=True), "nesterov needs")]:
        with pytest.raises(ValueError, match=message):
            FusedSGD([p], **options)
    optimizer = FusedSGD([p], lr=0.5)
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9  # a buffer appears when it is needed
    optimizer.step()
    assert torch.equal(p.detach(), torch.zeros(4)) and torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(4))
    optimizer.zero_grad()
    assert p.grad is None


def grouped(dtype=torch.float32, **options):
    params = parameters(dtype)
    groups = [{"params": params[:4], "lr": 1e-2}, {"params": params[4:], "lr": 1e-3}]
    return params, DeepSpeedCPUAdam(groups, weight_decay=0.1, **options)


@pytest.mark.parametrize("options", [{}, dict(master="split"), dict(state_dtype="8bit"), dict(rounding="stochastic")])
def test_subgroups_step_alone_and_are_rolled_back_to_the_bit(options):
    (params, ours), (plain, theirs) = grouped(torch.bfloat16, **options), grouped(torch.bfloat16, **options)

    def equal():
        return all(torch.equal(p, q) and {k: v for k, v in ours.state[p].items() if not torch.is_tensor(v)}
                   == {k: v for k, v in theirs.state[q].items() if not torch.is_tensor(v)}
                   and all(torch.equal(v, theirs.state[q][k]) for k, v in ours.state[p].items() if torch.is_tensor(v))
                   for p, q in zip(params, plain))

    for step in range(4):
        for p, q, g in zip(params, plain, gradients(step, params, torch.bfloat16)):
            p.grad = q.grad = g
        ours.step_subgroup(0)
        assert not torch.equal(params[2], plain[2]) and torch.equal(params[4], plain[4])
        ours.rollback_subgroup(0)
        assert equal(), step
        ours.step_subgroup(0), ours.step_subgroup(1)
        theirs.step()
        assert equal(), step
        ours.rollback_subgroup(1), ours.rollback_subgroup(0)
        ours.step()
        assert equal(), step
    with pytest.raises(RuntimeError, match="no step to undo"):
        ours.rollback_subgroup(0)  # step() is not a step of the subgroup
    with pytest.raises(ValueError, match="subgroup_id must lie in"):
        ours.step_subgroup(2)


def test_a_rolled_back_step_can_be_done_again_with_other_gradients():
    params, optimizer = grouped()
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    assert optimizer.step_subgroup(0, lambda: 3.5) == 3.5
    assert optimizer.rollback_subgroup(0, lambda: 2.5) == 2.5
    assert all(torch.equal(p, b) for p, b in zip(params, before)) and len(optimizer.state[params[0]]) == 0
    optimizer.step_subgroup(0)
    assert all(not torch.equal(p, b) for p, b in zip(params[:4], before))


def test_twenty_thousand_small_parameters_are_updated_as_one_large_one():
    small = [torch.nn.Parameter(torch.full((64,), 1.0 + i % 7)) for i in range(20_000)]
    large = torch.nn.Parameter(torch.cat([p.detach() for p in small]))
    large.grad = torch.randn(large.shape, generator=torch.Generator().manual_seed(0))
    for p, g in zip(small, large.grad.split(64)):
        p.grad = g
    for params in (small, [large]):
        FusedAdam(params, lr=1e-2, weight_decay=0.1).step()
    assert torch.equal(torch.cat([p.detach() for p in small]), large.detach())


def test_bad_input_is_named():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    p.grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"params\[0\]: dtype must be float32, bfloat16 or float16"):
        FusedAdam([p]).step()
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedAdam([p], amsgrad=True)
    with pytest.raises(ValueError, match="maximize"):
        DeepSpeedCPUAdam([{"params": [p], "maximize": True}])
    with pytest.raises(ValueError, match="lr must not be negative"):
        FusedLion([p], lr=-1.0)
    with pytest.raises(ValueError, match="betas"):
        FusedAdam([p], betas=(1.0, 0.9))
    with pytest.raises(RuntimeError, match="grad_norms"):
        FusedAdam([p]).step(grad_norms=[1.0])
    from deepspeed._native import lib
    x, short = torch.ones(4), torch.ones(3)
    hyper = dict(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has shape \[3\], its parameter \[4\]"):
        lib().lion_step([x], [x], [short], **hyper)
    with pytest.raises(ValueError, match=r"grads has 0 tensors, params 1"):
        lib().lion_step([x], [], [x], **hyper)
    with pytest.raises(ValueError, match=r"params\[0\] overlaps itself or has gaps"):
        lib().lion_step([torch.ones(8)[::2]], [x], [x], **hyper)
    with pytest.raises(ValueError, match="sparse"):
        lib().lion_step([x], [x.to_sparse()], [x], **hyper)


def test_sgd_kernel_against_torch():
    from deepspeed._native import lib
    for options in (dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(momentum=0.9, dampening=0.5, weight_decay=0.1)):
        ours, theirs = parameters(torch.float32), parameters(torch.float32)
        exact = [torch.nn.Parameter(p.detach().double()) for p in ours]
        buffers = [torch.zeros_like(p) for p in ours]
        optimizers = [torch.optim.SGD(ps, lr=1e-2, **options) for ps in (theirs, exact)]
        h = {**dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False), **options}
        for step in range(STEPS):
            for p, q, e, g in zip(ours, theirs, exact, gradients(step, ours, torch.float32)):
                p.grad, q.grad, e.grad = g, g.clone(), g.double()
            lib().sgd_step([p.detach() for p in ours], [p.grad for p in ours], buffers, lr=1e-2, first_step=step == 0, **h)
            for optimizer in optimizers:
                optimizer.step()
            assert_close([p.detach().double() for p in ours], [q.detach().double() for q in theirs], [e.detach() for e in exact],
                         torch.float32, f"{options} step {step}")
