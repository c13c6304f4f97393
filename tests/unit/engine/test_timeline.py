# SPDX-License-Identifier: Apache-2.0
"""The `timeline` option on two ranks: bounded, aligned, complete, and no trace of it when it is off."""
import json
import os

import torch

import deepspeed
from deepspeed import comm as dist
from deepspeed.comm import flight
from deepspeed.comm.recorder import recorder
from tests.parity.launch import run

CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
          "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 300,
                                "stage3_prefetch_bucket_size": 300}}


def make(extra):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(3)])
    return deepspeed.initialize(model=model, config=dict(CONFIG, **extra))[0]


def train(engine, steps):
    losses = []
    for _ in range(steps):
        loss = engine(torch.ones(2, 16) + dist.get_rank()).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def traced(folder):
    engine = make({"timeline": {"enabled": True, "folder": folder, "first_step": 1, "steps": 2}})
    losses = train(engine, 5)
    assert all(not ledger.take_trace() for _, ledger in flight.ledgers())  # recording has ended
    assert not any(hook for module in engine.module for hook in module._forward_pre_hooks.values() if "timeline" in repr(hook))
    engine.destroy()
    plain = make({})
    assert plain._timeline is None and train(plain, 5) == losses
    plain.destroy()


def test_traces_of_two_ranks(tmp_path):
    run(traced, 2, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["memory_rank0.json", "memory_rank1.json", "trace_rank0.json", "trace_rank1.json"]
    spans = []
    for rank in range(2):
        events = json.loads((tmp_path / f"trace_rank{rank}.json").read_text())["traceEvents"]
        mine = [e for e in events if e["ph"] == "X"]
        assert {e["args"]["step"] for e in mine} == {1, 2} and all(e["dur"] >= 0 and e["pid"] == rank for e in mine)
        assert [e["name"] for e in mine if e["cat"] == "step"] == ["forward", "backward", "step"] * 2
        assert [e["name"] for e in mine if e["cat"] == "units forward"] == ["0", "1", "2"] * 2
        assert [e["name"] for e in mine if e["cat"] == "units backward"] == ["2", "1", "0"] * 2
        names = {e["name"] for e in mine}
        assert {"gather_forward", "gather_backward", "reduce", "norm"} <= names, names
        assert {e["args"]["bytes"] for e in mine if e["name"] == "norm"} == {24}
        spans.append({(e["name"], e["args"]["step"]): (e["ts"], e["ts"] + e["dur"]) for e in mine if e["cat"] == "step"})
        memory = json.loads((tmp_path / f"memory_rank{rank}.json").read_text())
        assert memory["device"] == "cpu" and all(s["rss_bytes"] > 1e7 for s in memory["samples"])
        assert [s["what"] for s in memory["samples"] if "pss_bytes" in s][:6] == ["forward"] * 2 + ["backward"] * 2 + ["step"] * 2
    for phase in spans[0]:  # both ranks leave a step's collectives together: the same phases overlap on the common clock
        (begin, end), (other_begin, other_end) = spans[0][phase], spans[1][phase]
        assert phase[0] != "step" or (begin < other_end and other_begin < end), (phase, spans)


def logged():
    recorder.__init__()
    engine = make({"comms_logger": {"enabled": True, "prof_all": True}})
    dist.reset_log()
    train(engine, 2)
    dist.all_reduce(torch.ones(4))
    found = dist.log_summary(show_straggler=True, return_dict=True)
    engine.destroy()
    dist.configure(enabled=False)
    off = make({})
    train(off, 1)
    assert all(not ledger.tallies() for _, ledger in flight.ledgers())
    off.destroy()
    return found


def test_the_communication_log_has_the_engines_own_collectives():
    for found in run(logged, 2):
        assert found["summary"]["all_reduce"][16]["count"] == 1
        engine = found["engine"]
        (size, row), = engine["reduce: reduce_scatter"].items()  # three equal layers, padded
        assert size >= 4 * (16 * 16 + 16) and row["count"] == 6 and row["total_bytes"] == 6 * size and row["total_latency_ms"] > 0
        assert row["busbw_avg_gbps"] * 2 == row["tput_avg_gbps"] and 0 <= row["waited_ms"] <= row["total_latency_ms"] + 1
        assert engine["norm: all_reduce"][24]["count"] == 2
        assert row["straggler_rank"] in (0, 1) and row["straggler_ms"] >= 0
