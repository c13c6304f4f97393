# SPDX-License-Identifier: Apache-2.0
import types

import pytest
import torch

from deepspeed import comm as dist
from deepspeed.comm.recorder import recorder, tensor_bytes
from tests.parity.launch import on_ranks


@pytest.fixture(autouse=True)
def quiet_recorder():
    yield
    recorder.__init__()


def test_bytes():
    assert tensor_bytes([torch.zeros(3), (torch.zeros(2, dtype=torch.bfloat16),), None]) == 16


def test_configuration_sources():
    section = types.SimpleNamespace(enabled=True, prof_all=False, prof_ops=["all_reduce"], verbose=False, debug=True)
    dist.configure(types.SimpleNamespace(comms_logger=section))
    assert recorder.enabled and not recorder.prof_all and recorder.prof_ops == ["all_reduce"] and recorder.debug
    assert recorder.wants("all_reduce", False) and not recorder.wants("barrier", False) and recorder.wants("barrier", True)
    dist.configure({"comms_logger": {"enabled": True}}, enabled=False)
    assert not recorder.enabled and not recorder.wants("all_reduce", True)


@on_ranks(2)
def test_counts_bytes_and_summary():
    recorder.__init__()
    dist.all_reduce(torch.ones(4))
    assert not dist.has_comm_data()
    dist.configure(enabled=True)
    for n in (4, 4, 8):
        dist.all_reduce(torch.ones(n))
    dist.all_gather_into_tensor(torch.empty(4), torch.ones(2), log_name="my gather")
    dist.all_reduce(torch.ones(4), async_op=True).wait()
    assert dist.has_comm_data() and dist.get_comm_operation_count() == 5
    assert dist.get_logged_comm_ops() == ["all_reduce", "my gather"]
    summary = dist.log_summary(show_straggler=True, return_dict=True)["summary"]
    assert {size: row["count"] for size, row in summary["all_reduce"].items()} == {16: 3, 32: 1}
    row = summary["my gather"][16]
    assert row["count"] == 1 and row["total_latency_ms"] > 0 and row["straggler_ms"] >= 0
    dist.reset_log()
    assert not dist.has_comm_data() and dist.log_summary() is None
    recorder.__init__()
