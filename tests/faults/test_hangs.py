# SPDX-License-Identifier: Apache-2.0
"""Ranks wait in vain: the job ends within seconds of the silence, rank 0 says who waits for whom and where everybody is."""
import json
import subprocess
import sys

import pytest

from deepspeed.comm.watch import EXIT_CODE
from tests.faults import stuck

SAID = "[deepspeed] hang: "
# From the silence to the end: everybody's turn, the reports, and on this machine also waiting for a core.
WITHIN_S = stuck.SILENCE_S + 20.0


def ended_by_watch(codes, outputs, seconds, killed=(), allowed=(EXIT_CODE,)):
    for rank, code in enumerate(codes):
        assert code in ((-9,) if rank in killed else allowed), (codes, outputs)
    assert seconds < WITHIN_S, (seconds, outputs)
    told = [rank for rank, text in enumerate(outputs) if SAID in text]
    assert len(told) == 1 and outputs[told[0]].count(SAID) == 1, outputs
    return told[0], outputs[told[0]]


@pytest.mark.parametrize("transport, size", [("shm", 3), ("c10d", 2)])
def test_sleeping_rank(tmp_path, transport, size):
    speaker, text = ended_by_watch(*stuck.run(stuck.sleeps_in_data_loader, size, transport, tmp_path))
    assert speaker == 0
    assert "rank 1 is not in a collective" in text and "in sleeps_in_data_loader" in text and "stuck.py" in text
    assert "time.sleep(1000)  # the data never comes" in text  # rank 1's own line, from rank 1's stack
    assert "missing: rank 1" in text or "rank 0 waits in" in text or "ranks 0, 2 wait in" in text
    assert "_step(engine)" in text  # and where rank 0 is
    records = {path.name: json.loads(path.read_text()) for path in (tmp_path / "flight").glob("rank*.json")}
    assert sorted(records) == [f"rank{r}.json" for r in range(size)]
    assert records["rank0.json"]["waits"] and not records["rank1.json"]["waits"]
    found = subprocess.run([sys.executable, "-m", "deepspeed.comm.flight_record", str(tmp_path / "flight")], capture_output=True, text=True)
    assert found.returncode == 1 and "rank 1 has not entered it" in found.stdout, found


@pytest.mark.parametrize("transport, size", [("shm", 2), ("c10d", 3)])
def test_rank_skips_a_backward(tmp_path, transport, size):
    _, text = ended_by_watch(*stuck.run(stuck.skips_a_backward, size, transport, tmp_path))
    # Both sides by name: what the others wait in, and the collective of the step that rank 1 went on to.
    if transport == "shm":
        assert "disagree about collective" in text and "phase reduce" in text and "phase norm" in text
    else:
        said = next(line for line in text.splitlines() if SAID in line)
        assert "ranks 0, 2 wait in all_gather" in said and "(step 1, phase gather_backward" in said and "for rank 1" in said, said
        assert "rank 1 waits in all_reduce" in said and "(step 1, phase norm, 24 bytes) for ranks 0, 2" in said, said
    assert "engine.backward(loss)" in text and "engine.step()" in text


def test_ranks_in_different_collectives(tmp_path):
    _, text = ended_by_watch(*stuck.run(stuck.another_order, 3, "auto", tmp_path))
    assert "the ranks disagree about collective #3" in text, text
    assert "ranks 0, 2 are in barrier #3 (step 1, 0 bytes)" in text and "rank 1 is in all_reduce #3 (step 1, 32 bytes)" in text


def test_stopped_rank_is_named_and_killed(tmp_path):
    speaker, text = ended_by_watch(*stuck.run(stuck.stopped, 3, "c10d", tmp_path), killed={1})
    assert speaker == 0 and "rank 1 does not answer" in text and "stopped by a signal (SIGSTOP)" in text


def test_rank_0_stopped_with_the_store_in_it(tmp_path):
    # Without the store a rank may see the end of rank 0 before its own watch has: then it fails by that.
    speaker, text = ended_by_watch(*stuck.run(stuck.rank_0_stopped, 3, "auto", tmp_path), killed={0}, allowed=(EXIT_CODE, 1))
    assert speaker != 0 and "rank 0 does not answer" in text and "stopped by a signal" in text


def test_rank_in_a_python_loop(tmp_path):
    _, text = ended_by_watch(*stuck.run(stuck.busy_loop, 2, "auto", tmp_path))
    assert "rank 1 is not in a collective" in text and "in spin_for_ever" in text and ("number += 1" in text or "while True" in text)


def test_collective_called_on_torch_that_the_others_never_enter(tmp_path):
    speaker, text = ended_by_watch(*stuck.run(stuck.plain_torch_collective, 3, "auto", tmp_path))
    assert speaker == 0
    assert "rank 1 waits in torch.distributed.all_reduce" in text and "rank 0 is not in a collective" in text
    assert "torch_dist.all_reduce(torch.ones(4))  # the others never come" in text


def test_slow_rank_is_left_alone(tmp_path):
    codes, outputs, _ = stuck.run(stuck.slow_but_alive, 2, "auto", tmp_path, silence_s=3.0)
    assert codes == [0, 0] and all("DONE" in text and SAID not in text for text in outputs), outputs


def test_an_exception_leaves_flight_records_of_all_ranks(tmp_path):
    codes, outputs, _ = stuck.run(stuck.one_rank_raises, 2, "auto", tmp_path)
    assert codes[1] == 1 and codes[0] != 0
    records = [json.loads((tmp_path / "flight" / f"rank{r}.json").read_text()) for r in range(2)]
    assert records[1]["reason"] == "ValueError: the cause"
    assert records[0]["groups"] and all(record["groups"][0]["records"] for record in records)


SCRIPT = """
import time, torch, deepspeed
from deepspeed import comm as dist
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(model=model, config={"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"},
    "zero_optimization": {"stage": 2}, "hang_detection": {"silence_s": 4, "flight_record": ""}})
for number in range(3):
    if number == 1 and dist.get_rank() == 1:
        time.sleep(1000)
    engine.backward(engine(torch.ones(2, 8)).sum())
    engine.step()
"""


def test_under_the_launcher_by_the_configuration(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    ended = subprocess.run([sys.executable, "-m", "deepspeed.launcher.runner", "-H", "", "--num_gpus", "2", "train.py"],
                           cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert ended.returncode == EXIT_CODE, ended
    assert ended.stderr.count(SAID) == 1 and "rank 1 is not in a collective, it is at" in ended.stderr, ended.stderr
    assert "failed first: exit code 124" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
