# SPDX-License-Identifier: Apache-2.0
"""The path of state that rests on the host while the model runs on an accelerator: gradients come down through staging memory, updated weights go
up, shards are sent to their places before a gather. Here the host plays both parts, with memory of two kinds that never mix."""
import pytest

from deepspeed._native import lib
from deepspeed.zero.tiers import Tiers
from tests.parity.launch import run
from tests.parity.test_offload import same, trained
from tests.parity.training import transport


def host():
    return lib().HostRest(False, 4096)


def files(folder):
    return lib().FileRest(str(folder), 3, 4096, 4096, 4, 2, apart=True)


TIERS = {"states": lambda folder: Tiers(rest=host()), "half the states": lambda folder: Tiers(rest=host(), rest_share=0.5),
         "states in files": lambda folder: Tiers(rest=files(folder)), "all": lambda folder: Tiers(rest=host(), parameter_rest=host()),
         "all in files": lambda folder: Tiers(rest=files(folder), parameter_rest=files(folder))}


def compare(stage, where, precision, folder):
    from deepspeed.engine import build
    with transport("c10d"):   # as accelerators do, it gathers from memory of any kind
        want = trained(stage, precision, {}, steps=8)
        usual, asked = build.tiers_of, []
        build.tiers_of = lambda *_: asked.append(TIERS[where](folder)) or asked[-1]
        try:
            got = trained(stage, precision, {}, steps=8)
        finally:
            build.tiers_of = usual
    assert asked
    same(got, want)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage,where", [(1, "states"), (2, "states"), (2, "states in files"), (3, "states"), (3, "half the states"), (3, "all"),
                                         (3, "all in files")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_bits(ranks, stage, where, precision, tmp_path):
    run(compare, ranks, stage, where, precision, tmp_path)
