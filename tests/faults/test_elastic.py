# SPDX-License-Identifier: Apache-2.0
"""Elastic jobs on one host: what is restarted, when that ends, and that nobody stays behind. On two hosts: test_hosts.py."""

import os
import signal

import pytest

from tests.faults.job import Job

FLAGS = ("--num_gpus", "3", "--elastic_training")
WITH_CHILD = """
child = subprocess.Popen(["sleep", "60"])
note(child.pid, "-child")
time.sleep(60)
"""


def test_restarts_with_the_ranks_that_are_left_and_gives_up_in_the_end(tmp_path):
    """A killed rank is not started again, one that raised is; its exit code is the job's when no restart is left."""
    with Job(tmp_path, """
        print("begin", os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], os.environ["TORCHELASTIC_RESTART_COUNT"], *sys.argv[1:])
        mark("%s.%d" % (os.environ["TORCHELASTIC_RESTART_COUNT"], rank))
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if rank == 1: wait_for("0.0"); wait_for("0.2"); os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 0:
            wait_for(os.environ["TORCHELASTIC_RESTART_COUNT"] + ".1"); sys.exit(5)
        time.sleep(60)
        """, flags=(*FLAGS, "--max_restarts", "2"), args=("a b", )) as job:
        code, out, err = job.finish(60)
        assert job.survivors() == []
    assert code == 5, err
    assert sorted(line for line in out.splitlines() if line.startswith("begin")) == sorted(
        f"begin {rank} {world} {count} --local_rank={rank} a b" for count, world in enumerate((3, 2, 2)) for rank in range(world))
    assert err.count("failed: killed by signal 9") == 1 and err.count("failed: exit code 5") == 2 and "no restart is left" in err
    assert "the elastic agent (process" in err and "failed first: exit code 5" in err


@pytest.mark.parametrize("number,code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_the_launchers_end_is_that_of_all(tmp_path, number, code):
    with Job(tmp_path, WITH_CHILD, flags=FLAGS) as job:
        job.wait_for_pids(6, timeout_s=60)
        job.process.send_signal(number)
        assert job.finish(20)[0] == code
        assert job.survivors(within_s=2) == []


def test_the_agents_death_is_that_of_its_ranks(tmp_path):
    with Job(tmp_path, "note(os.getppid(), '-agent')" + WITH_CHILD, flags=FLAGS) as job:
        job.wait_for_pids(9, timeout_s=60)
        agent = next(int(path.name.split(".")[1].split("-")[0]) for path in tmp_path.glob("0.*-agent.pid"))
        os.kill(agent, signal.SIGKILL)
        code, _, err = job.finish(20)
        assert code == 137 and "the elastic agent" in err and job.survivors(within_s=2) == []
