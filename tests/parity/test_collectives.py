# SPDX-License-Identifier: Apache-2.0
"""What a step sends: counted on the carrier itself."""
import torch
import torch.distributed as dist

from tests.parity.cases import CASES
from tests.parity.launch import on_ranks
from tests.parity.training import config, start, transport


def _totals(engine):
    """phase -> (collectives, bytes) over all groups of the engine."""
    groups = engine._managed.transports
    found = {}
    for carrier in {id(t): t for t in (groups.world, groups.shard, groups.reduce) if t is not None}.values():
        for phase, (count, size) in carrier.counts().items():
            old = found.get(phase, (0, 0))
            found[phase] = (old[0] + count, old[1] + size)
    return found


def counted(engine, case, steps=3):
    """phase -> collectives in each of `steps` steps; all steps must agree."""
    seen = []
    for step in range(steps):
        before = _totals(engine)
        engine.backward(engine(*case.batch(step, 0, dist.get_rank())))
        engine.step()
        after = _totals(engine)
        seen.append({p: after[p][0] - before.get(p, (0, 0))[0] for p in after if after[p][0] != before.get(p, (0, 0))[0]})
    assert all(one == seen[0] for one in seen), seen
    return seen[0]


def check_counts(name, choice):
    case = CASES[name]
    # Without a fixed order of collectives the tied weight is freed between its two users, and gathered for each.
    reuses = 1 if name == "tied" and choice == "shm" else 0
    with transport(choice):
        for stage in (0, 1, 2, 3):
            engine = start(case.build(), config(stage))
            trained = sum(engine._managed.store.flat_info(f)["trainable"] for f in range(engine._managed.store.flats))
            flats = engine._managed.store.flats
            assert trained > 3, "one unit would show nothing"
            got = counted(engine, case)
            assert got.pop("norm") == 1, (stage, got)
            want = {0: {"reduce": trained, "gather_grads": trained},
                    1: {"reduce": trained, "gather_updated": trained},
                    2: {"reduce": trained, "gather_updated": trained},
                    3: {"gather_forward": flats + reuses, "gather_backward": flats + reuses, "reduce": trained}}[stage]
            assert got == want, f"stage {stage} of {name} over {choice}: {got}, expected {want}"
            engine.destroy()


@on_ranks(2)
def test_two_collectives_a_unit_at_stages_1_and_2_and_three_at_stage_3():
    for name in ("gpt", "tied"):
        for choice in ("shm", "c10d"):
            check_counts(name, choice)


@on_ranks(2)
def test_persistent_units_are_gathered_once_a_step():
    case = CASES["gpt"]
    engine = start(case.build(), config(3, zero={"stage3_param_persistence_threshold": 10**6}))
    trained = engine._managed.store.flats
    got = counted(engine, case)
    assert got == {"reduce": trained, "gather_updated": trained, "norm": 1}, got
    engine.destroy()


@on_ranks(2)
def test_accumulation_and_evaluation_send_no_more_than_they_must():
    case = CASES["gpt"]
    for stage in (1, 2, 3):
        engine = start(case.build(), config(stage, accumulation=3))
        flats = engine._managed.store.flats
        before = _totals(engine)
        for micro in range(2):  # no boundary: nothing is updated
            engine.backward(engine(*case.batch(0, micro, dist.get_rank())))
            engine.step()
        after = _totals(engine)
        assert after["reduce"][0] - before.get("reduce", (0, 0))[0] == 2 * flats
        assert after.get("gather_updated") == before.get("gather_updated")
        before = after
        with torch.no_grad():
            engine(*case.batch(0, 0, dist.get_rank()))
        after = _totals(engine)
        changed = {p: after[p][0] - before[p][0] for p in after if after[p] != before.get(p)}
        assert changed == ({"gather_forward": flats} if stage == 3 else {}), changed
        engine.destroy()
