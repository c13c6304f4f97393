# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from deepspeed import comm as dist
from deepspeed.runtime.utils import CheckOverflow, DummyOptim
from tests.parity.launch import on_ranks


def parameter(value=None):
    made = torch.nn.Parameter(torch.zeros(3))
    if value is not None:
        made.grad = torch.tensor([0.0, value, 0.0])
    return made


@pytest.mark.parametrize("value,found", [(1.0, False), (math.inf, True), (-math.inf, True), (math.nan, True), (None, False)])
def test_alone(value, found):
    made = parameter(value)
    assert CheckOverflow([made]).check() is found and CheckOverflow([{"params": [made]}]).check() is found
    assert CheckOverflow().check([[made]]) is found
    with pytest.raises(ValueError, match="needs parameters"):
        CheckOverflow().check()


def test_by_norm():
    check = CheckOverflow()
    assert not check.check_using_norm([1.0, torch.tensor(2.0)]) and check.check_using_norm([1.0, -1.0])
    assert check.check_using_norm([math.nan])


@on_ranks(2)
def test_one_rank_tells_all():
    made = parameter(math.inf if dist.get_rank() == 1 else 1.0)
    check = CheckOverflow([made])
    assert check.check() is True and check.has_overflow_serial([made]) is (dist.get_rank() == 1)
    assert check.check_using_norm([-1.0 if dist.get_rank() else 1.0]) is True
    assert check.check_using_norm([1.0]) is False


def test_dummy():
    made = [parameter()]
    assert DummyOptim(made).param_groups == [{"params": made}]
