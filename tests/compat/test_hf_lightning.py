# SPDX-License-Identifier: Apache-2.0
"""Lightning's DeepSpeed strategy beside Lightning's own DDP.

The strategy takes no accelerator but Lightning's CUDA one. On a machine without a GPU that class is given CPU devices here; the strategy,
its precision plugin and its loops are Lightning's, unchanged.
"""
import importlib.util
import os
import tempfile

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.parity.launch import on_ranks

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

import lightning  # noqa: E402
from lightning.pytorch.accelerators import CUDAAccelerator  # noqa: E402
from lightning.pytorch.plugins.environments import TorchElasticEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy  # noqa: E402

TIMEOUT_S = 240
BAR = 1e-4


class CpuInPlaceOfCuda(CUDAAccelerator):
    def setup_device(self, device):
        """Nothing to choose."""

    def setup(self, trainer):
        """No flags, no cache."""

    def teardown(self):
        """No cache."""

    @staticmethod
    def parse_devices(devices):
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("cpu", index) for index in devices]

    @staticmethod
    def is_available():
        return True


class Layer(nn.Linear):
    """Starts from the same weights, which bf16 can hold, whatever dtype it is made in: zero.Init in bf16 draws other random numbers."""

    def reset_parameters(self):
        draw = numpy.random.RandomState(self.in_features).uniform
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                parameter.copy_(torch.from_numpy(draw(-1, 1, tuple(parameter.shape)) / self.in_features**0.5).bfloat16())


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = None, []

    def configure_model(self):   # at stage 3 under zero.Init
        if self.net is None:
            self.net = nn.Sequential(Layer(9, 33), nn.Tanh(), Layer(33, 33), nn.Tanh(), Layer(33, 5))

    def _loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0].to(self.net[0].weight.dtype)).float(), batch[1])

    def training_step(self, batch, number):
        loss = self._loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, number):
        self.log("held_out", self._loss(batch), sync_dist=True)

    def predict_step(self, batch, number):
        return self.net(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)), "interval": "step"}]


def data():
    generator = torch.Generator().manual_seed(1)
    rows = torch.utils.data.TensorDataset(torch.randn(32, 9, generator=generator), torch.randint(0, 5, (32,), generator=generator))
    return torch.utils.data.DataLoader(rows, batch_size=4)


def trainer(stage, **settings):
    strategy = DDPStrategy() if stage is None else DeepSpeedStrategy(stage=stage, process_group_backend="gloo")
    return lightning.Trainer(accelerator="cpu" if stage is None else CpuInPlaceOfCuda(), strategy=strategy, devices=2, logger=False,
                             enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                             plugins=[TorchElasticEnvironment()], **settings)


def fit(stage, epochs=2, resume=None, **settings):
    model, runs = Model(), trainer(stage, max_epochs=epochs, **settings)
    runs.fit(model, data(), data(), ckpt_path=resume)
    return model, runs, [*model.losses, runs.callback_metrics["held_out"].item()]


def close(found, wanted):
    return len(found) == len(wanted) and all(abs(a - b) <= BAR * abs(b) for a, b in zip(found, wanted))


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="lightning-") as path:
        yield path


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("settings", [dict(gradient_clip_val=0.5), dict(accumulate_grad_batches=2)], ids=["clipping", "accumulation"])
def test_losses(settings):
    """Not both at once: Lightning divides the loss by accumulate_grad_batches before engine.backward, which divides it again."""
    plain = fit(None, **settings)[2]
    for stage in (1, 2, 3):
        assert close(fit(stage, **settings)[2], plain), stage


@on_ranks(2, timeout=TIMEOUT_S)
def test_losses_in_bf16():
    """bf16 weights and fp32 masters here, fp32 weights and autocast there: the same arithmetic for this model."""
    plain = fit(None, precision="bf16-mixed", gradient_clip_val=0.5)[2]
    assert not close(plain, fit(None, gradient_clip_val=0.5)[2])
    for stage in (1, 2, 3):
        assert close(fit(stage, precision="bf16-mixed", gradient_clip_val=0.5)[2], plain), stage


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [2, 3])
def test_save_resume_validate_predict(stage, folder):
    through = fit(stage, epochs=3)[2]
    _, runs, begun = fit(stage, epochs=2)
    path = os.path.join(folder, "it.ckpt")
    runs.save_checkpoint(path)
    _, runs, rest = fit(stage, epochs=3, resume=path)
    assert close(begun[:-1] + rest, through)
    held_out = trainer(stage).validate(Model(), data(), ckpt_path=path, verbose=False)[0]["held_out"]
    assert held_out == pytest.approx(begun[-1], rel=BAR)
    predicted = torch.cat(trainer(stage).predict(Model(), data(), ckpt_path=path))
    assert predicted.shape == (16, 5) and torch.isfinite(predicted).all()


@on_ranks(2, timeout=TIMEOUT_S)
def test_the_saved_folder_becomes_one_file(folder):
    """What Lightning's users run afterwards: zero_to_fp32."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    model, runs, _ = fit(3, epochs=1)
    path = os.path.join(folder, "it.ckpt")
    runs.save_checkpoint(path)
    dist.barrier()
    state = get_fp32_state_dict_from_zero_checkpoint(path)
    assert {name: tuple(value.shape) for name, value in state.items()} == {name: tuple(p.shape) for name, p in model.named_parameters()}
