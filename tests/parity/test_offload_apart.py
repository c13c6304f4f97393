# SPDX-License-Identifier: Apache-2.0
"""The path of state that rests on the host while the model runs on an accelerator: gradients come down through staging memory, updated weights go
up, shards are sent to their places before a gather. Here the host plays both parts, with memory of two kinds that never mix."""
import contextlib

import pytest

from deepspeed._native import lib
from deepspeed.zero.tiers import Tiers
from tests.parity.launch import run
from tests.parity.test_offload import same, trained
from tests.parity.tiny import config, engine_of, tiny
from tests.parity.training import transport


def host():
    return lib().HostRest(False, 4096)


def files(folder, most_in_memory=0):
    return lib().FileRest(str(folder), 3, 4096, 4096, 4, 2, apart=True, most_in_memory=most_in_memory)


SOME = 5000   # elements: of two ranks each has 8700
TIERS = {"states": lambda folder: Tiers(rest=host()), "half the states": lambda folder: Tiers(rest=host(), rest_share=0.5),
         "states in files": lambda folder: Tiers(rest=files(folder)), "all": lambda folder: Tiers(rest=host(), parameter_rest=host()),
         "all in files": lambda folder: Tiers(rest=files(folder), parameter_rest=files(folder)),
         "some in files": lambda folder: Tiers(rest=files(folder), parameter_rest=files(folder, SOME))}


@contextlib.contextmanager
def resting(where, folder):
    """Engines that are built have these tiers, whatever the configuration says."""
    from deepspeed.engine import build
    usual, asked = build.tiers_of, []
    build.tiers_of = lambda *_: asked.append(TIERS[where](folder)) or asked[-1]
    try:
        yield
    finally:
        build.tiers_of = usual
    assert asked


def compare(stage, where, precision, folder):
    with transport("c10d"):   # as accelerators do, it gathers from memory of any kind
        want = trained(stage, precision, {}, steps=8)
        with resting(where, folder):
            got = trained(stage, precision, {}, steps=8)
    same(got, want)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage,where", [(1, "states"), (2, "states"), (2, "states in files"), (3, "states"), (3, "half the states"), (3, "all"),
                                         (3, "all in files"), (3, "some in files")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_bits(ranks, stage, where, precision, tmp_path):
    run(compare, ranks, stage, where, precision, tmp_path)


def built(where, folder, look):
    with transport("c10d"), resting(where, folder):
        engine = engine_of(tiny(width=65), config(3, bf16={"enabled": True}))
    found = look(engine)
    engine.destroy()
    return found


def shares(engine):
    """(elements of this rank, whether their states rest) of each slice, in the order of forward."""
    return [(s.master.numel(), s.rests, engine._managed.rests_elsewhere(s.master)) for s in engine.optimizer.slices]


def test_the_first_slices_stay_where_the_model_runs(tmp_path):
    found = run(built, 2, "half the states", tmp_path, shares)
    assert found[0] == found[1]
    numels, rests, away = zip(*found[0])
    assert rests == away and not rests[0] and rests[-1]
    resting_numel = sum(numel for numel, rests, _ in found[0] if rests)
    assert abs(resting_numel - sum(numels) / 2) <= min(numel for numel, rests, _ in found[0] if rests) / 2 + 64 * len(numels)   # 64: padding


def parameter_places(engine):
    from deepspeed.zero.accounting import places
    return {where: size for what, size, where in places(engine.optimizer) if what == "parameters"}


def test_some_parameters_rest_in_memory_and_the_others_in_files(tmp_path):
    for found in run(built, 2, "some in files", tmp_path, parameter_places):
        assert set(found) == {"the host's memory", str(tmp_path)}
        assert 2 * SOME / 2 < found["the host's memory"] <= 2 * SOME
