# SPDX-License-Identifier: Apache-2.0
"""torch.compile where it takes liberties that eager execution does not."""
import subprocess
import sys

import pytest
import torch

from deepspeed.ops.activations import dropout_add
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.cross_entropy import FusedLinearCrossEntropy
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.ops.rope import RotaryEmbedding
from deepspeed.ops.sgd import FusedSGD


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_dropouts_of_one_tensor_have_masks_of_their_own(backend):
    def two(x):
        return dropout_add(x, torch.zeros_like(x), 0.5), dropout_add(x, torch.zeros_like(x), 0.5)

    torch._dynamo.reset()
    x = torch.ones(64, 32, requires_grad=True)
    first, second = torch.compile(two, backend=backend)(x)
    assert not torch.equal(first == 0, second == 0)
    assert 800 < (first == 0).sum() < 1250 and 800 < (second == 0).sum() < 1250  # of 2048
    (first + second).sum().backward()
    assert torch.equal(x.grad, (first + second).detach())


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    script = ("import torch\nfrom deepspeed.ops.normalization import rms_norm\n"
              "x = torch.randn(3, 8)\ny = torch.compile(lambda x: rms_norm(x), fullgraph=True, backend='eager')(x)\n"
              "assert torch.equal(y, rms_norm(x))")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_head_under_autocast_computes_in_its_dtype():
    torch.manual_seed(0)
    head = FusedLinearCrossEntropy(16, 50, bias=True)
    hidden, labels = torch.randn(20, 16, requires_grad=True), torch.randint(0, 50, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, labels)
        plain = torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, head.weight, head.bias).float(), labels)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, plain, rtol=1e-2)
    loss.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32


def test_tables_that_grew_in_evaluation_serve_training():
    rotary = RotaryEmbedding(8, max_positions=4)
    q = torch.randn(1, 9, 2, 8)
    with torch.inference_mode():
        rotary(q, q)
    q.requires_grad_()
    rotary(q, q)[0].sum().backward()
    assert q.grad is not None


def test_tables_get_values_when_they_leave_the_meta_device():
    with torch.device("meta"):
        rotary = RotaryEmbedding(8, max_positions=16)
    rotary.to_empty(device="cpu")
    assert torch.equal(rotary.cos, RotaryEmbedding(8, max_positions=16).cos)


@pytest.mark.parametrize("kind, options", [(FusedAdam, {}), (FusedLamb, {}), (FusedSGD, dict(momentum=0.9)), (FusedLion, {}), (DeepSpeedCPUAdagrad, {})])
def test_a_compiled_training_step_may_hold_the_optimizer(kind, options):
    torch._dynamo.reset()

    def losses(compiled):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = kind(model.parameters(), lr=0.01, **options)

        def train(x):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss
        train = torch.compile(train, backend="eager") if compiled else train
        x = torch.randn(16, 4)
        return [train(x).item() for _ in range(4)]

    assert losses(compiled=True) == losses(compiled=False)


def test_a_compiled_step():
    torch._dynamo.reset()
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    step = torch.compile(FusedLamb([p], lr=0.1).step, backend="eager")
    step(), step()
    assert (p < 0.9).all()
