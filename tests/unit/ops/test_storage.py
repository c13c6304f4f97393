# SPDX-License-Identifier: Apache-2.0
"""Split masters, stochastic rounding and narrow states through the optimizers' Python face."""
import copy
import pickle

import pytest
import torch

from deepspeed.ops import _storage, reference
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.muon import MuonWithAuxAdam
from deepspeed.ops.sgd import FusedSGD

SHAPES = [(1,), (255,), (256,), (257,), (33, 31), (4099,), (), (0, 3)]
KINDS = {
    "adam": lambda p, **o: FusedAdam(p, lr=1e-2, weight_decay=0.1, **o),
    "cpu adam": lambda p, **o: DeepSpeedCPUAdam(p, lr=1e-2, weight_decay=0.1, adamw_mode=False, **o),
    "lion": lambda p, **o: FusedLion(p, lr=1e-3, weight_decay=0.1, **o),
    "cpu lion": lambda p, **o: DeepSpeedCPULion(p, lr=1e-3, **o),
    "adagrad": lambda p, **o: DeepSpeedCPUAdagrad(p, lr=1e-2, weight_decay=0.1, **o),
    "lamb": lambda p, **o: FusedLamb(p, lr=1e-2, weight_decay=0.1, **o),
    "sgd": lambda p, **o: FusedSGD(p, lr=1e-2, momentum=0.9, nesterov=True, **o),
    "plain sgd": lambda p, **o: FusedSGD(p, lr=1e-2, **o),
}


def parameters(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)) for shape in SHAPES]


def give_gradients(step, *lists):
    generator = torch.Generator().manual_seed(1000 + step)
    for same in zip(*lists):
        g = torch.randn(same[0].shape, generator=generator).to(torch.bfloat16)
        for p in same:
            p.grad = g.to(p.dtype)


def master_of(p, state):
    bits = (p.detach().view(torch.int16).int() << 16) + state["low_bits"].int()
    return bits.view(torch.float32)


def states_of(optimizer, p):
    return {k: v for k, v in optimizer.state[p].items() if torch.is_tensor(v) and k != "low_bits"}


@pytest.mark.parametrize("kind", KINDS)
def test_split_master_has_the_bits_of_a_float32_master(kind):
    split, wide = parameters(), parameters(torch.float32)
    ours, theirs = KINDS[kind](split, master="split"), KINDS[kind](wide)
    for step in range(100):
        give_gradients(step, split, wide)
        ours.step(), theirs.step()
        for p, w in zip(split, wide):
            assert torch.equal(master_of(p, ours.state[p]), w.detach()), step
            for key, value in states_of(theirs, w).items():
                assert torch.equal(ours.state[p][key], value), (step, key)
            # the weight is a nearest bfloat16: half a unit in the last place of it away, at most
            unit = torch.ldexp(torch.ones_like(w), torch.frexp(w.detach())[1] - 8)
            assert ((p.detach().float() - w).abs() <= unit / 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_is_one_of_the_two_neighbours_and_repeats(kind):
    first, again, wide = parameters(), parameters(), parameters(torch.float32)
    optimizers = [KINDS[kind](p, rounding="stochastic", seed=11) for p in (first, again)]
    wide_optimizer = KINDS[kind](wide)
    for step in range(5):
        give_gradients(step, first, again, wide)
        for optimizer in (*optimizers, wide_optimizer):
            optimizer.step()
        for p, q, w in zip(first, again, wide):
            assert torch.equal(p, q)
            down = (w.detach().view(torch.int32) & ~0xffff).view(torch.float32)  # towards zero
            up = ((w.detach().view(torch.int32) & ~0xffff) + 0x10000).view(torch.float32)
            assert ((p.float() == down) | (p.float() == up)).all()
            with torch.no_grad():
                w.copy_(p)
            for key, value in states_of(wide_optimizer, w).items():
                assert torch.equal(optimizers[0].state[p][key], value)


def test_stochastic_rounding_does_not_depend_on_threads_or_absent_neighbours():
    results, before = [], torch.get_num_threads()
    for threads, with_first in ((1, True), (2, True), (2, False)):
        torch.set_num_threads(threads)
        a, b = torch.nn.Parameter(torch.ones(100_003, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(600_001, dtype=torch.bfloat16))
        b.grad = torch.full((600_001,), 0.3, dtype=torch.bfloat16)
        a.grad = torch.ones_like(a) if with_first else None
        FusedAdam([a, b], lr=1e-3, rounding="stochastic", seed=5).step()
        results.append(b.detach().clone())
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_stochastic_rounding_is_right_on_average():
    """Steps of a sixteenth of a unit, which rounding to nearest would lose: after 160 of them the mean has moved by ten units."""
    p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = FusedSGD([p], lr=2.0**-7 / 16, rounding="stochastic", seed=1)
    for _ in range(160):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    # Each step errs with a variance below unit^2 / 4; the mean of 20 000 elements after 160 steps has a deviation of 0.045 units.
    moved = (p.detach().double().mean() - 1) / 2.0**-7
    assert abs(moved - 10) < 5 * 0.045


@pytest.mark.parametrize("kind", ["adam", "lion", "adagrad", "sgd", "lamb"])
def test_bfloat16_states_are_float32_states_rounded_each_step(kind):
    narrow, wide = parameters(torch.float32), parameters(torch.float32)
    ours, theirs = KINDS[kind](narrow, state_dtype=torch.bfloat16), KINDS[kind](wide)
    for step in range(20):
        give_gradients(step, narrow, wide)
        ours.step(), theirs.step()
        for p, w in zip(narrow, wide):
            assert torch.equal(p, w)
            for key, value in states_of(theirs, w).items():
                assert ours.state[p][key].dtype == torch.bfloat16
                value.copy_(value.bfloat16())
                assert torch.equal(ours.state[p][key].float(), value)


def decoded(codes, scale):
    """What csrc/kernels/optim/forms.h says, in torch."""
    scales = scale.repeat_interleave(_storage.CODE_BLOCK)[:codes.numel()].reshape(codes.shape).double()
    if codes.dtype == torch.int8:
        t = codes.double() / 127
        return t * t.abs() * scales
    return ((codes.double() + 1) / 256)**4 * scales


@pytest.mark.parametrize("kind", ["adam", "cpu adam", "lion", "adagrad", "sgd", "lamb"])
def test_8bit_states_stay_within_their_error(kind):
    """Every step starts from the decoded states; the new ones are coded within the error that forms.h promises."""
    narrow, wide = parameters(torch.float32), parameters(torch.float32)
    ours, theirs = KINDS[kind](narrow, state_dtype="8bit"), KINDS[kind](wide)
    for step in range(20):
        give_gradients(step, narrow, wide)
        ours.step(), theirs.step()
        for p, w in zip(narrow, wide):
            torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-5, atol=1e-6)  # the same states, decoded in float32 here and float64 there
            with torch.no_grad():
                w.copy_(p)
            for key, value in states_of(theirs, w).items():
                codes, scale = ours.state[p][key], ours.state[p][key + "_scale"]
                assert codes.dtype == (torch.uint8 if key == "exp_avg_sq" else torch.int8) and scale.numel() == (p.numel() + 255) // 256
                back = decoded(codes, scale)
                scales = scale.repeat_interleave(256)[:p.numel()].reshape(p.shape).double().clamp_min(1e-30)
                t = value.double().abs() / scales
                if key == "exp_avg_sq":
                    assert ((back / scales)**0.25 - t**0.25).abs().max().item() <= 1 / 256 + 1e-5 if p.numel() else True
                else:
                    assert ((back - value).abs() / scales <= t.sqrt() / 127 + 1 / 64516 + 1e-5).all()
                value.copy_(back)


@pytest.mark.parametrize("options", [dict(master="split"), dict(rounding="stochastic", seed=3), dict(state_dtype="8bit"),
                                     dict(master="split", state_dtype="8bit"), dict(rounding="stochastic", state_dtype=torch.bfloat16)])
def test_training_reaches_what_float32_reaches(options):
    """A least-squares problem: the loss falls as far as with float32 masters and states, within the resolution of a bfloat16 weight."""
    generator = torch.Generator().manual_seed(0)
    x, solution = torch.randn(512, 64, generator=generator), torch.randn(64, 8, generator=generator)
    y = x @ solution

    def final_loss(dtype, **options):
        w = torch.nn.Parameter(torch.zeros(64, 8, dtype=dtype))
        optimizer = FusedAdam([w], lr=2e-2, betas=(0.9, 0.99), **options)
        for _ in range(300):
            w.grad = (x.t() @ (x @ w.detach().float() - y) / 512).to(dtype)
            optimizer.step()
        return (x @ w.detach().float() - y).square().mean().item()

    start = y.square().mean().item()
    best = final_loss(torch.float32)
    assert best < 1e-4 * start
    has_small_steps = "master" in options or "rounding" in options  # a bfloat16 weight rounded to nearest loses them, with any states
    assert final_loss(torch.bfloat16 if has_small_steps else torch.float32, **options) < 1e-3 * start  # weights off by 2^-9 of themselves: (2^-9)^2 * 64 / 3 of the start is 8e-5


@pytest.mark.parametrize("options", [dict(master="split"), dict(state_dtype="8bit"), dict(master="split", state_dtype="8bit"),
                                     dict(state_dtype=torch.bfloat16), dict(rounding="stochastic", seed=9)])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, options):
    params = parameters()
    optimizer = KINDS[kind](params, **options)
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = KINDS[kind](copies, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 5):
        give_gradients(step, params, copies)
        optimizer.step(), other.step()
    for p, q in zip(params, copies):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(other.state[q][key], value) if torch.is_tensor(value) else other.state[q][key] == value


def of_torch(optimizer):
    """What torch's own __getstate__ leaves: pickles of before carry no more."""
    old = type(optimizer).__new__(type(optimizer))
    old.__setstate__(copy.deepcopy(torch.optim.Optimizer.__getstate__(optimizer)))
    return old


def through_a_file(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def assert_stays_with(optimizer, other, steps=(3, 4)):
    """Both have the same parameters and states, to the bit, after more steps with the same gradients."""
    params, copies = ([p for group in o.param_groups for p in group["params"]] for o in (optimizer, other))
    for step in steps:
        give_gradients(step, params, copies)
        optimizer.step(), other.step()
    for p, q in zip(params, copies):
        assert p is not q and torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(other.state[q][key], value) if torch.is_tensor(value) else other.state[q][key] == value


@pytest.mark.parametrize("options", [{}, dict(master="split"), dict(state_dtype="8bit"), dict(master="split", state_dtype=torch.bfloat16),
                                     dict(rounding="stochastic", seed=9)])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_go_on_to_the_bit(kind, copied, steps, options):
    params = parameters()
    optimizer = KINDS[kind]([{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0}], **options)
    for step in range(steps):
        give_gradients(step, params)
        optimizer.step()
    other = copied(optimizer)
    assert vars(other.storage) == vars(optimizer.storage)
    assert_stays_with(optimizer, other)
    later = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    for o in (optimizer, other):
        o.add_param_group({"params": [copy.deepcopy(later)]})
    assert_stays_with(optimizer, other, steps=(5,))
    other.zero_grad()


@pytest.mark.parametrize("options", [{}, dict(master="split"), dict(state_dtype="8bit"), dict(state_dtype=torch.float16)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cpu adam"])  # whose adamw_mode does not show
def test_pickles_without_settings_are_read_by_their_states(kind, options):
    params = parameters()
    optimizer = KINDS[kind](params, **options)
    give_gradients(0, params)
    optimizer.step()
    other = of_torch(optimizer)
    assert_stays_with(optimizer, other)
    other.zero_grad()


def test_settings_outlive_copies_and_loading():
    p = torch.nn.Parameter(torch.ones(4))
    adam = copy.deepcopy(FusedAdam([p], adam_w_mode=False, set_grad_none=False))
    assert not adam.adam_w_mode and not adam.set_grad_none
    cpu = through_a_file(DeepSpeedCPUAdam([p], adamw_mode=False, fp32_optimizer_states=False))
    assert not cpu.adam_w_mode and not cpu.fp32_optimizer_states and not cpu.storage.fp32_states
    with pytest.raises(RuntimeError, match="no step to undo"):
        cpu.rollback_subgroup(0)
    cpu.load_state_dict(cpu.state_dict())  # torch calls __setstate__ there
    assert not cpu.storage.fp32_states
    muon = copy.deepcopy(MuonWithAuxAdam([p], muon_lr=0.5, adam_lr=0.25))
    muon.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})
    assert muon.param_groups[-1]["lr"] == 0.5
    muon = copy.deepcopy(of_torch(muon))
    muon.param_groups[1]["params"][0].grad = torch.ones(2, 2)
    muon.step()
    narrow = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    half = DeepSpeedCPUAdam([narrow], fp32_optimizer_states=False)
    narrow.grad = torch.ones_like(narrow)
    half.step()
    assert of_torch(half).storage.is_plain and not of_torch(half).storage.fp32_states


def test_state_dict_of_another_kind_is_refused():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    plain, coded = FusedAdam([p]), FusedAdam([p], state_dtype="8bit")
    plain.step()
    with pytest.raises(ValueError, match="state_dtype"):
        coded.load_state_dict(plain.state_dict())


def test_layouts_and_mixed_dtypes():
    weight = torch.randn(6, 5, 4, 3).bfloat16()
    params = [torch.nn.Parameter(weight.to(memory_format=torch.channels_last)), torch.nn.Parameter(torch.randn(7))]
    plain = [torch.nn.Parameter(weight.clone()), torch.nn.Parameter(params[1].detach().clone())]
    optimizers = [FusedAdam(ps, lr=1e-2, master="split") for ps in (params, plain)]
    for step in range(3):
        give_gradients(step, params, plain)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(params, plain):
        assert torch.equal(p, q)
    assert "low_bits" not in optimizers[0].state[params[1]]  # a float32 parameter is its own master


LAYOUTS = [dict(), dict(master="split"), dict(state_dtype=torch.bfloat16), dict(rounding="stochastic")]


@pytest.mark.parametrize("kind", [FusedAdam, FusedLamb, FusedLion, DeepSpeedCPUAdagrad, FusedSGD])
@pytest.mark.parametrize("options", LAYOUTS)
def test_states_follow_a_parameter_to_another_memory_format(kind, options):
    """There and back, after steps; a 1 x 1 convolution has both formats at once. Random bits go with the place in memory, so those differ."""
    shapes = [(6, 5, 4, 3), (6, 5, 1, 1), (600, 5, 30, 30)][:2 if options else 3]  # the last one's states lie in huge pages
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    moving, still = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    momentum = dict(momentum=0.9) if kind is FusedSGD else {}
    optimizers = [kind(params, lr=1e-2, **momentum, **options) for params in (moving, still)]
    for step, memory_format in enumerate([torch.contiguous_format, torch.channels_last, torch.channels_last, torch.contiguous_format]):
        for p in moving:
            p.data = p.data.to(memory_format=memory_format)
        give_gradients(step, moving, still)
        kept = [dict(optimizers[0].state[p]) for p in moving]
        for optimizer in optimizers:
            optimizer.step()
        for p, q, before in zip(moving, still, kept):
            ours, theirs = optimizers[0].state[p], optimizers[1].state[q]
            if not options.get("rounding"):
                assert torch.equal(p, q) and all(torch.equal(ours[name], theirs[name]) for name in ours if torch.is_tensor(ours[name]))
            assert all(ours[name] is before[name] for name in before if torch.is_tensor(before[name]))
        assert all(t.stride() == moving[0].stride() for t in optimizers[0].state[moving[0]].values() if torch.is_tensor(t))


def test_8bit_states_cannot_follow_and_say_why():
    p = torch.nn.Parameter(torch.randn(6, 5, 4, 3))
    optimizer = FusedAdam([p], state_dtype="8bit")
    give_gradients(0, [p])
    optimizer.step()
    p.data = p.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="8-bit codes, whose blocks share scales in the order of memory"):
        optimizer.step()


def test_bad_options_are_named(monkeypatch):
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    for options, message in [(dict(master="half"), "master must be"), (dict(rounding="up"), "rounding must be"), (dict(seed=-1), "seed must lie"),
                             (dict(state_dtype=torch.int8), "state_dtype must be"), (dict(master="split", rounding="stochastic"), "exclude each other")]:
        with pytest.raises(ValueError, match=message):
            FusedAdam([p], **options)
    with pytest.raises(ValueError, match="needs bfloat16"):
        FusedAdam([torch.nn.Parameter(torch.ones(4, dtype=torch.float16))], master="split")
    with pytest.raises(TypeError, match="mastr"):
        FusedAdam([p], mastr="split")
    p.grad = torch.ones_like(p)
    optimizer = FusedAdam([p], master="split")
    monkeypatch.setattr("deepspeed.ops._base._backend", lambda device: reference)
    with pytest.raises(ValueError, match="low_bits: no kernel"):
        optimizer.step()


def test_bad_storage_is_named_by_the_kernels():
    from deepspeed._native import lib
    x, w = torch.ones(300), torch.ones(300, dtype=torch.bfloat16)
    codes, scale, low = torch.zeros(300, dtype=torch.int8), torch.zeros(2), torch.zeros(300, dtype=torch.int16)

    def lion(p, m, **options):
        lib().lion_step([p], [torch.ones_like(p)], [m], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, **options)

    for p, m, options, message in [
            (x, codes, {}, "no scales for exp_avgs"),
            (x, codes, dict(scales=[[scale[:1]]]), r"scales of exp_avgs\[0\] must be a contiguous float32 tensor of 2 elements"),
            (x, codes, dict(scales=[[scale, scale]]), "scales has 2 tensors, params 1"),
            (x, x.clone(), dict(low_bits=[low]), r"params\[0\]: only bfloat16 has low_bits"),
            (w, x, dict(low_bits=[low[:7]]), r"low_bits\[0\] has shape \[7\]"),
            (w, x, dict(low_bits=[low.int()]), r"low_bits\[0\]: dtype must be int16"),
            (w, x, dict(low_bits=[low], rounding=(1, 1, [0])), "exclude each other"),
            (w, x, dict(rounding=(1, 1, [])), "numbers has 0 tensors"),
            (w, x, dict(rounding=(1, 1, [1 << 24])), "not below"),
            (w, torch.ones(300, dtype=torch.int32), {}, r"exp_avgs\[0\]: dtype must be float32, bfloat16 or float16, not Int")]:
        with pytest.raises(ValueError, match=message):
            lion(p, m, **options)


def test_the_engine_refuses_the_options():
    from deepspeed.zero.stepper import recognise
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    assert recognise(FusedSGD([p])) == ("sgd", None)
    with pytest.raises(ValueError, match="FusedAdam was made with master, rounding or state_dtype"):
        recognise(FusedAdam([p], state_dtype="8bit"))
