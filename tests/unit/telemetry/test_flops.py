# SPDX-License-Identifier: Apache-2.0
"""Operations of a forward pass against formulas written out by hand, layer by layer, and the tree they are booked on."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepspeed.profiling.flops_profiler import FlopsProfiler, get_model_profile
from deepspeed.profiling.flops_profiler.profiler import (duration_to_string, flops_to_string, macs_to_string, number_to_string,
                                                         params_to_string)
from deepspeed.telemetry.flops import report


class Call(nn.Module):
    """A module that only calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def r(*shape):
    return torch.randn(*shape)


LSTM = 4 * (8 * 16 + 16 * 16)  # MACs by token: four gates, from the input and from the hidden state
GRU, PLAIN = LSTM // 4 * 3, LSTM // 4
# name: (module, arguments, MACs, FLOPs besides the MACs' two each)
CASES = {
    "linear": (nn.Linear(16, 32), (r(4, 16),), 4 * 16 * 32, 0),
    "linear of three dimensions": (nn.Linear(16, 32, bias=False), (r(2, 3, 16),), 6 * 16 * 32, 0),
    "conv1d": (nn.Conv1d(3, 8, 3), (r(2, 3, 10),), 2 * 8 * 8 * 3 * 3, 2 * 8 * 8),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1, stride=2), (r(2, 3, 16, 16),), 2 * 8 * 64 * 27, 2 * 8 * 64),
    "conv2d, groups, no bias": (nn.Conv2d(4, 8, 3, groups=2, bias=False), (r(2, 4, 8, 8),), 2 * 8 * 36 * 2 * 9, 0),
    "conv3d": (nn.Conv3d(2, 3, 2), (r(1, 2, 4, 4, 4),), 3 * 27 * 2 * 8, 3 * 27),
    "transposed conv": (nn.ConvTranspose2d(3, 8, 3, stride=2, bias=False), (r(2, 3, 8, 8),), 2 * 3 * 64 * 8 * 9, 0),
    "layer norm": (nn.LayerNorm(16), (r(4, 16),), 0, 5 * 64),
    "layer norm, plain": (nn.LayerNorm(16, elementwise_affine=False), (r(4, 16),), 0, 4 * 64),
    "batch norm, fixed": (nn.BatchNorm2d(3), (r(2, 3, 8, 8),), 0, 2 * 384),
    "group norm": (nn.GroupNorm(2, 4), (r(2, 4, 8, 8),), 0, 5 * 512),
    "gelu": (nn.GELU(), (r(4, 16),), 0, 64),
    "leaky relu": (nn.LeakyReLU(), (r(4, 16),), 0, 64),
    "softmax": (nn.Softmax(-1), (r(4, 16),), 0, 64),
    "max pool": (nn.MaxPool2d(2), (r(2, 3, 8, 8),), 0, 384),
    "mean pool to one": (nn.AdaptiveAvgPool2d(1), (r(2, 3, 8, 8),), 0, 384),
    "upsample": (nn.Upsample(scale_factor=2), (r(2, 3, 8, 8),), 0, 2 * 3 * 256),
    "embedding": (nn.Embedding(10, 16), (torch.zeros(4, 5, dtype=torch.long),), 0, 0),
    "dropout, at rest": (nn.Dropout(), (r(4, 16),), 0, 0),
    "lstm": (nn.LSTM(8, 16), (r(5, 3, 8),), 15 * LSTM, 15 * 16 * 13),
    "lstm, both directions": (nn.LSTM(8, 16, bidirectional=True), (r(5, 3, 8),), 2 * 15 * LSTM, 2 * 15 * 16 * 13),
    "gru": (nn.GRU(8, 16), (r(5, 3, 8),), 15 * GRU, 15 * 16 * 10),
    "rnn of two layers": (nn.RNN(8, 16, 2), (r(5, 3, 8),), 15 * (PLAIN + 2 * 16 * 16), 2 * 15 * 16 * 2),
    "lstm cell": (nn.LSTMCell(8, 16), (r(3, 8),), 3 * LSTM, 3 * 16 * 13),
    "matmul": (Call(torch.matmul), (r(2, 4, 8, 16), r(2, 4, 16, 8)), 8 * 8 * 16 * 8, 0),
    "matrix by vector": (Call(torch.matmul), (r(8, 16), r(16)), 8 * 16, 0),
    "bmm": (Call(torch.bmm), (r(4, 8, 16), r(4, 16, 8)), 4 * 8 * 16 * 8, 0),
    "baddbmm": (Call(torch.baddbmm), (r(4, 8, 8), r(4, 8, 16), r(4, 16, 8)), 4 * 8 * 16 * 8, 0),
    "addmm": (Call(torch.addmm), (r(8), r(8, 16), r(16, 8)), 8 * 16 * 8, 0),
    "einsum": (Call(lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b)), (r(2, 8, 4, 16), r(2, 8, 4, 16)), 2 * 4 * 8 * 8 * 16, 0),
    "linear function": (Call(F.linear), (r(4, 16), r(32, 16)), 4 * 16 * 32, 0),
    "attention": (Call(F.scaled_dot_product_attention), (r(2, 4, 8, 16), r(2, 4, 12, 16), r(2, 4, 12, 16)), 2 * 2 * 4 * 8 * 12 * 16, 0),
    "sum of two": (Call(lambda a, b: a + b), (r(4, 16), r(4, 16)), 0, 64),
    "comparison and selection": (Call(lambda a, b: torch.where(a > b, a, b)), (r(4, 16), r(4, 16)), 0, 0),
    "cross entropy": (Call(F.cross_entropy), (r(4, 16), torch.zeros(4, dtype=torch.long)), 0, 64),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_costs(name, mode):
    module, args, macs, others = CASES[name]
    with mode():
        flops, counted, params = get_model_profile(module, args=args, print_profile=False, as_string=False, warm_up=0)
    assert (counted, flops) == (macs, 2 * macs + others)
    assert params == sum(p.numel() for p in module.parameters())


def test_bilinear_and_batch_norm_in_training():
    flops, macs, _ = get_model_profile(nn.Bilinear(4, 5, 6, bias=False), args=[r(3, 4), r(3, 5)], print_profile=False, as_string=False)
    assert macs == 3 * 4 * 5 * 6 and flops == 2 * macs
    model = nn.BatchNorm1d(3)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(r(8, 3))
    profiler.stop_profile()
    assert profiler.get_total_flops() == 5 * 24


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states, causal=True):
        batch, length, width = hidden_states.shape
        qkv = self.qkv(self.norm(hidden_states)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (part.squeeze(2).transpose(1, 2) for part in qkv.split(1, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return hidden_states + self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Transformer(nn.Module):
    """In the manner of a hub: keywords in, a dict out, tied weights."""

    def __init__(self, vocabulary=50, width=16, layers=3, checkpointed=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.checkpointed = checkpointed

    def forward(self, input_ids=None, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.checkpointed == "reentrant") if self.checkpointed else block(x)
        return {"logits": self.head(x), "past": None}


TOKENS, BATCH, LENGTH, WIDTH = 12, 2, 6, 16
BLOCK_MACS = TOKENS * WIDTH * 4 * WIDTH + 2 * BATCH * 4 * LENGTH * LENGTH * 4
MODEL_MACS = 3 * BLOCK_MACS + TOKENS * WIDTH * 50


def ids():
    return torch.arange(TOKENS).view(BATCH, LENGTH)


def test_model_with_keywords_and_tied_weights():
    model = Transformer()
    _, macs, params = get_model_profile(model, kwargs={"input_ids": ids(), "use_cache": False}, print_profile=False, as_string=False)
    assert macs == MODEL_MACS
    assert params == 50 * 16 + 3 * (2 * 16 + 16 * 48 + 48 + 16 * 16 + 16)  # the tied matrix once
    assert model.training and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("checkpointed", [False, "reentrant", "saved tensors"])
def test_backward_is_not_counted_with_or_without_activation_checkpointing(checkpointed):
    model = Transformer(checkpointed=checkpointed)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(input_ids=ids())["logits"].sum().backward()
    profiler.stop_profile()
    assert profiler.get_total_macs() == MODEL_MACS
    assert [profiler.record_of(block).macs for block in model.blocks] == [BLOCK_MACS] * 3
    assert profiler.record_of(model.blocks[0]).calls == 1


def test_figures_are_booked_on_the_modules_that_ran():
    model = Transformer()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(input_ids=ids())
    model(input_ids=ids())
    profiler.stop_profile()
    block = profiler.record_of(model.blocks[1])
    inside = sum(profiler.record_of(part).macs for part in model.blocks[1].children())
    assert block.macs == 2 * BLOCK_MACS and block.macs - inside == 2 * 2 * BATCH * 4 * LENGTH * LENGTH * 4  # attention is the block's own
    assert block.calls == 2 and 0 < block.latency_s < profiler.get_total_duration()
    profiler.reset_profile()
    assert profiler.get_total_macs() == 0 and profiler.get_total_macs(as_string=True) == "0 MACs"


def test_a_module_used_twice_and_one_that_calls_itself():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, depth=2):
            return self.linear(x) if depth == 0 else self(self.linear(x), depth - 1)

    flops, macs, params = get_model_profile(Recursive(), args=[r(2, 4)], print_profile=False, as_string=False)
    assert (macs, params) == (3 * 2 * 16, 20)


def test_ignored_modules():
    model = Transformer()
    by_class = get_model_profile(model, kwargs={"input_ids": ids()}, print_profile=False, as_string=False, ignore_modules=[Block])
    one = get_model_profile(model, kwargs={"input_ids": ids()}, print_profile=False, as_string=False, ignore_modules=[model.blocks[0]])
    assert (by_class[1], one[1]) == (MODEL_MACS - 3 * BLOCK_MACS, MODEL_MACS - BLOCK_MACS)


def test_an_error_in_the_model_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match="shapes"):
        get_model_profile(model, args=[r(2, 4)], print_profile=False, warm_up=0)
    assert model.training and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    (r(2, 2) + 1).sum()


def test_attention_module_is_counted_where_torch_would_fuse_it():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with torch.no_grad():
        _, macs, _ = get_model_profile(layer, args=[r(2, 8, 16)], print_profile=False, as_string=False)
    assert macs == 16 * 16 * 64 + 16 * 2 * 16 * 32 + 2 * 2 * 8 * 8 * 16


def test_report(tmp_path):
    out = tmp_path / "reports" / "flops.txt"
    model = Transformer()
    strings = get_model_profile(model, kwargs={"input_ids": ids()}, output_file=str(out), top_modules=2)
    text = out.read_text()
    assert strings[1] == macs_to_string(MODEL_MACS) and strings[1] in text
    lines = {" ".join(line.split()[:2]) if line.startswith("  ") else line.split("  ")[0]: line for line in text.splitlines() if line}
    assert "100.0%" in lines["Transformer"] and macs_to_string(BLOCK_MACS) in lines["(1) Block"]
    assert "in_features=16, out_features=48, bias=True" in lines["(qkv) Linear"]
    assert macs_to_string(3 * BLOCK_MACS) in lines["(blocks) ModuleList"]  # never called itself: its children's sum
    assert "depth 2:" in text and "Block" in text.split("depth 2:")[1].split("depth 3:")[0]
    get_model_profile(model, kwargs={"input_ids": ids()}, output_file=str(out), module_depth=1)
    assert "(embed) Embedding" in out.read_text() and "(qkv)" not in out.read_text()
    get_model_profile(model, kwargs={"input_ids": ids()}, output_file=str(out), detailed=False)
    assert "(embed)" not in out.read_text() and "fwd MACs per GPU" in out.read_text()


def test_calls_and_modes():
    class Generator(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            Generator.calls += 1
            return self.linear(x)

        def generate(self, x, steps=3):
            for _ in range(steps):
                x = self(x)
            return x

    for warm_up, calls in ((0, 1), (1, 2), (3, 4)):
        Generator.calls = 0
        _, macs, _ = get_model_profile(Generator(), (2, 4), print_profile=False, as_string=False, warm_up=warm_up)
        assert (macs, Generator.calls) == (32, calls)
    _, macs, _ = get_model_profile(Generator(), args=[r(2, 4)], kwargs={"steps": 5}, print_profile=False, as_string=False, mode="generate")
    assert macs == 5 * 32
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    frozen[0].eval()
    get_model_profile(frozen, (2, 4), print_profile=False)
    assert frozen.training and frozen[1].training and not frozen[0].training


def test_packed_sequences():
    packed = nn.utils.rnn.pack_padded_sequence(r(5, 3, 8), [5, 3, 2])
    _, macs, _ = get_model_profile(nn.GRU(8, 16), args=[packed], print_profile=False, as_string=False)
    assert macs == 10 * GRU


def test_recomputing_and_groups_in_an_engines_report():
    times = {"bwd": 40.0, "step": 10.0}  # ms
    engine = SimpleNamespace(train_micro_batch_size_per_gpu=lambda: 2, gradient_accumulation_steps=lambda: 4, world_size=8, dp_world_size=4,
                             mp_world_size=2, timers=lambda name: SimpleNamespace(elapsed=lambda reset: times[name]))
    profiler = FlopsProfiler(nn.Linear(10, 10), engine, recompute_fwd_factor=1.0)
    profiler.start_profile()
    profiler.model(r(500, 10))
    profiler.stop_profile()
    profiler.record_of(profiler.model).latency_s = 0.01
    lines = dict(line.split(":", 1) for line in report.summary(profiler).splitlines())
    lines = {label: value.strip() for label, value in lines.items()}
    assert lines["bwd FLOPS per GPU = 3 * fwd flops / bwd latency"] == "30 MFLOPS"  # 3 * 100 K in 10 ms
    assert lines["fwd+bwd FLOPS per GPU = 4 * fwd flops / (fwd+bwd latency)"] == "20 MFLOPS"
    assert lines["iter latency = micro-batches * (fwd+bwd latency) + step latency"] == "90 ms"
    assert lines["samples/second, all ranks"] == f"{2 * 4 * 4 / 0.09:.2f}"
    assert lines["params of model = params per GPU * mp_size"] == "220"


def test_printed_profile_and_misuse(capsys):
    profiler = FlopsProfiler(nn.Linear(4, 4))
    profiler.start_profile()
    with pytest.raises(RuntimeError, match="running already"):
        profiler.start_profile()
    profiler.model(r(2, 4))
    profiler.stop_profile()
    profiler.print_model_profile()
    profiler.print_model_aggregated_profile()
    assert "fwd latency" in capsys.readouterr().out
    profiler.end_profile()
    with pytest.raises(ValueError, match="input_shape, args or kwargs"):
        get_model_profile(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="mode"):
        get_model_profile(nn.Linear(4, 4), (2, 4), mode="backward")
    assert get_model_profile(nn.Linear(4, 4), (2, 4), print_profile=False) == ("64 ", "32 MACs", "20")


def test_operations_of_other_libraries_are_named(tmp_path):
    @torch.library.custom_op("flops_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    out = tmp_path / "flops.txt"
    get_model_profile(Call(torch.ops.flops_test.twice), args=[r(3)], output_file=str(out), warm_up=0)
    assert "flops_test::twice (1 calls)" in out.read_text()


def test_numbers_as_text():
    texts = ["0 ", "5 ", "999 ", "1 K", "1.23 K", "2.5 G", "500 u"]
    assert [number_to_string(x) for x in (0, 5, 999, 1000, 1234.5, 2.5e9, 0.0005)] == texts
    assert flops_to_string(1.5e12) == "1.5 TFLOPS" and macs_to_string(2560) == "2.56 KMACs"
    assert params_to_string(7e9) == "7 B" and params_to_string(740) == "740"
    assert duration_to_string(0.00143) == "1.43 ms" and duration_to_string(1234.5) == "1234.5 s"
    assert number_to_string(1234567, "K", 3) == "1234.567 K"
    with pytest.raises(ValueError, match="'X' is unknown"):
        number_to_string(1, "X")
