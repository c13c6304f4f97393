# SPDX-License-Identifier: Apache-2.0
"""Parameters that are no piece of memory: DTensors are stepped where their elements lie, everything else is refused when it is given."""
import copy

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.ops.multi_tensor import clip_grad_norm_
from deepspeed.ops.muon import Muon, MuonWithAuxAdam
from deepspeed.ops.sgd import FusedSGD
from tests.parity.launch import on_ranks

SHAPES, ELEMENTWISE = [(5, 3), (7,), (1, 2)], {
    FusedAdam: {}, DeepSpeedCPUAdam: dict(fp32_optimizer_states=False), FusedLion: {}, DeepSpeedCPUAdagrad: {}, FusedSGD: dict(momentum=0.9)}
KINDS = [*ELEMENTWISE, FusedLamb, Muon, MuonWithAuxAdam]


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def distributed(tensors, placement):
    mesh = init_device_mesh("cpu", (2,))
    return [torch.nn.Parameter(distribute_tensor(t.clone(), mesh, [placement])) for t in tensors]


def step(optimizer, params, seed, placement):
    for p, g in zip(params, values(seed)):
        p.grad = distribute_tensor(g, p.device_mesh, [placement]) if isinstance(p, DTensor) else g
    optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_dtensors_are_stepped_as_whole_tensors_are(kind):
    """Sharded unevenly (one rank has nothing of the last) and replicated; the gradients' placements need not be the parameters'."""
    for placement in (Shard(0), Replicate()):
        whole, parts = [torch.nn.Parameter(t) for t in values(0)], distributed(values(0), placement)
        theirs, ours = (kind(params, lr=0.1, **ELEMENTWISE[kind]) for params in (whole, parts))
        for seed in (1, 2):
            step(theirs, whole, seed, None)
            step(ours, parts, seed, Shard(0))
        assert all(ours.state[p][name].placements == p.placements for p in parts for name in ours.state_names)
        other = kind(distributed(values(3), placement), lr=0.1, **ELEMENTWISE[kind])
        other.load_state_dict(copy.deepcopy(ours.state_dict()))
        continued = other.param_groups[0]["params"]
        with torch.no_grad():
            for p, q in zip(continued, parts):
                p.copy_(q)
        step(theirs, whole, 4, None)
        step(ours, parts, 4, Replicate())
        step(other, continued, 4, Shard(0))
        for p, q, r in zip(whole, parts, continued):
            assert torch.equal(p.detach(), q.detach().full_tensor()) and torch.equal(q.detach().full_tensor(), r.detach().full_tensor())
            for name in ours.state_names:
                assert torch.equal(theirs.state[p][name], ours.state[q][name].full_tensor())


@on_ranks(2)
def test_dtensors_that_are_refused():
    plain, matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), *distributed(values(0)[:2], Shard(0))
    for kind, params in ((FusedLamb, [vector]), (Muon, [matrix]), (MuonWithAuxAdam, [matrix])):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}: parameter 1 of group 0 is a DTensor, of which a process holds a part"):
            kind([plain if kind is not FusedLamb else torch.nn.Parameter(torch.ones(2)), *params])
        optimizer = kind([plain])
        with pytest.raises(TypeError, match=rf"^{kind.__name__}: parameter 'w' is a DTensor"):
            kind([("plain", plain), ("w", params[0])])
        with pytest.raises(TypeError, match="parameter 0 of group 1 is a DTensor"):
            optimizer.add_param_group({"params": params, **({"use_muon": True} if kind is MuonWithAuxAdam else {})})
        assert len(optimizer.param_groups) == 1
    MuonWithAuxAdam([plain, vector])  # Adam's
    for options in (dict(master="split"), dict(rounding="stochastic"), dict(state_dtype="8bit")):
        with pytest.raises(ValueError, match="FusedAdam: parameter 0 of group 0 is a DTensor: master='split'"):
            FusedAdam([vector], **options)
    optimizer = FusedAdam([vector])
    with pytest.raises(ValueError, match=r"tensors\[0\] is a tensor subclass"):
        vector.grad = vector.detach().clone()
        clip_grad_norm_([vector], 1.0)
    assert not optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_memory_for_a_kernel_is_refused_when_it_is_given(kind):
    subclass = TwoTensor(torch.ones(2, 2), torch.ones(2, 2))
    good = torch.nn.Parameter(torch.ones(2, 2))
    odd = {"a TwoTensor": subclass.requires_grad_(), "a sparse tensor": torch.eye(2).to_sparse().requires_grad_(),
           "a nested tensor": torch.nested.nested_tensor([torch.ones(2)]).requires_grad_()}
    for said, p in odd.items():
        with pytest.raises(TypeError, match=f"^{kind.__name__}: parameter 1 of group 0 is {said}"):
            kind([good, p])
        optimizer = kind([good])
        with pytest.raises(TypeError, match=f"^{kind.__name__}: parameter 0 of group 1 is {said}"):
            optimizer.add_param_group({"params": [p], "use_muon": True})
        assert len(optimizer.param_groups) == 1
