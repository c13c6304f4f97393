# SPDX-License-Identifier: Apache-2.0
"""Which ranks a command line gives, on machines that are only described."""

import dataclasses

import pytest

from deepspeed.launcher import devices, exports, launch
from deepspeed.launcher.launch import LaunchError, rank_specs
from deepspeed.launcher.options import parse_args
from deepspeed.launcher.placement import plan_job, starts_hosts
from deepspeed.launcher.say import Voice


@pytest.fixture
def machine(monkeypatch):
    """Sets the machine: number of GPUs, cores, and the user's CUDA_VISIBLE_DEVICES."""

    def set_machine(gpus=0, cores=4, visible=None):
        monkeypatch.setattr(devices, "gpu_count", lambda: gpus)
        monkeypatch.setattr(devices, "usable_cores", lambda: cores)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    set_machine()
    return set_machine


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


def plan(*flags, script="train.py", args=()):
    return plan_job(parse_args(["-H", "/nonexistent", *flags, script, *args]), Voice("critical"))


def slots(*flags):
    return plan(*flags).slots


def test_without_gpu_the_user_says_how_many(machine, capsys):
    assert slots("--num_gpus", "3") == [0, 1, 2]
    assert slots() == [0]
    plan_job(parse_args(["-H", "/nonexistent", "x.py"]), Voice())
    assert "no GPU found: starting 1 process on the CPU (--num_gpus N starts N)" in capsys.readouterr().err
    assert slots("--include", "localhost:1,3") == [1, 3]
    assert slots("--exclude", "localhost:0") == [1, 2, 3]
    assert not plan().use_gpus


def test_with_gpus(machine):
    machine(gpus=4)
    assert slots() == [0, 1, 2, 3] and plan().use_gpus
    assert slots("--num_gpus", "2") == [0, 1]
    assert slots("--include", "localhost:1,3") == [1, 3]
    assert slots("--exclude", "localhost:1") == [0, 2, 3]
    with pytest.raises(LaunchError, match="--num_gpus 5: this host has 4 usable GPUs"):
        slots("--num_gpus", "5")


def test_cuda_visible_devices_is_the_pool(machine):
    machine(gpus=4, visible="3,1")
    assert slots() == [3, 1] and slots("--num_gpus", "1") == [3]
    assert slots("--include", "localhost:0") == [0]  # the filter wins
    machine(gpus=4, visible="GPU-5f,MIG-7a")
    assert slots() == ["GPU-5f", "MIG-7a"]
    machine(gpus=4, visible="")
    assert slots() == [0] and not plan().use_gpus


def test_environment_of_the_ranks(machine, script, monkeypatch):
    machine(gpus=2, cores=8)
    specs = rank_specs(plan("--num_gpus", "2", "--master_port", "1234", script=script, args=("--lr", "1")))
    assert [spec.rank for spec in specs] == [0, 1]
    expected = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_SIZE="2", CROSS_RANK="0", CROSS_SIZE="1",
                    MASTER_ADDR="127.0.0.1", MASTER_PORT="1234", CUDA_VISIBLE_DEVICES="0,1", OMP_NUM_THREADS="4")
    assert expected.items() <= specs[1].env.items()
    assert specs[1].argv[1:] == ["-u", script, "--local_rank=1", "--lr", "1"]
    machine(gpus=0, cores=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    env = rank_specs(plan("--num_gpus", "2", script=script))[0].env
    assert env["OMP_NUM_THREADS"] == "7" and "CUDA_VISIBLE_DEVICES" not in env


def test_more_ranks_than_cores_have_one_thread(machine, script):
    machine(cores=2)
    assert {spec.env["OMP_NUM_THREADS"] for spec in rank_specs(plan("--num_gpus", "5", script=script))} == {"1"}


@pytest.mark.parametrize("flags,expected", [
    (("--no_local_rank", ), ["python", "-u", "{script}", "a"]),
    (("--module", ), ["python", "-u", "-m", "{script}", "--local_rank=0", "a"]),
    (("--no_python", ), ["{script}", "--local_rank=0", "a"]),
    (("--no_python", "--no_local_rank"), ["{script}", "a"]),
])  # yapf: disable
def test_commands(machine, script, flags, expected):
    argv = rank_specs(plan(*flags, script=script, args=("a", )))[0].argv
    argv = [item.rsplit("/", 1)[-1] if i == 0 and "--no_python" not in flags else item for i, item in enumerate(argv)]
    argv[0] = "python" if argv[0].startswith("python") else argv[0]
    assert argv == [item.format(script=script) for item in expected]


@pytest.mark.parametrize("flags,message", [
    (("--autotuning", "run"), "--autotuning: the autotuner is not built yet"),
    (("--min_elastic_nodes", "1"), "only with --elastic_training"),
    (("--elastic_training", "--min_elastic_nodes", "2"), "the job begins with 1 host, which must lie between"),
    (("--force_multi", "--no_ssh"), "--force_multi: starts the hosts over the network"),
    (("--num_gpus", "2", "--include", "localhost"), "--num_gpus: not together"),
    (("--include", "localhost", "--exclude", "localhost:0"), "exclude each other"),
    (("--include", "elsewhere"), "host 'elsewhere'"),
    (("--exclude", "localhost"), "no slots are left"),
    (("--num_nodes", "2"), "there is no hostfile"),
    (("--node_rank", "1"), "--node_rank 1: only with --no_ssh"),
])  # yapf: disable
def test_what_is_refused(machine, flags, message):
    with pytest.raises((LaunchError, ValueError), match=message):
        plan(*flags)


def test_the_number_of_the_only_host_may_be_said(machine, tmp_path):
    assert plan("--node_rank", "0").node_rank == 0
    with pytest.raises(LaunchError, match="--node_rank 0: only with --no_ssh"):
        plan_job(parse_args([*hostfile(tmp_path, "one slots=2\ntwo slots=3\n"), "--node_rank", "0", "x.py"]), Voice("critical"))


def test_a_hostfile_that_was_asked_for_and_is_not_there(machine, capsys, monkeypatch):
    plan_job(parse_args(["-H", "/no/hosts", "x.py"]), Voice("warning"))
    assert "--hostfile /no/hosts: no such file; the job runs on this host alone" in capsys.readouterr().err
    monkeypatch.setattr("deepspeed.launcher.placement.DEFAULT_HOSTFILE", "/no/job/hostfile")
    plan_job(parse_args(["-H", "/no/job/hostfile", "x.py"]), Voice("warning"))
    assert capsys.readouterr().err == ""


def test_paths_that_cannot_be_used_are_named_with_their_flag(machine, script, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"--hostfile {tmp_path}: cannot be read: Is a directory"):
        plan_job(parse_args(["-H", str(tmp_path), "x.py"]), Voice("critical"))
    with pytest.raises(LaunchError, match="--enable_each_rank_log /proc/x: cannot be written to"):
        rank_specs(plan("--enable_each_rank_log", "/proc/x", script=script))
    (tmp_path / ".deepspeed_env").write_text("A=b\n")
    monkeypatch.setattr(exports, "DEEPSPEED_ENVIRONMENT_PATHS", [str(tmp_path)])
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(exports, "read_environment_file", refuse)
    with pytest.raises(ValueError, match=r"\.deepspeed_env: cannot be read: Permission denied"):
        exports.environment_files()


def test_only_the_script_is_required(capsys):
    with pytest.raises(SystemExit):
        parse_args([])
    assert capsys.readouterr().err.rstrip().endswith("the following arguments are required: user_script")
    assert parse_args(["x.py"]).user_args == [] and parse_args(["x.py", "-a", "b"]).user_args == ["-a", "b"]


def test_missing_files_are_named(machine, script, tmp_path):
    with pytest.raises(LaunchError, match="missing.py: no such file"):
        rank_specs(plan(script="missing.py"))
    with pytest.raises(LaunchError, match="--venv_script"):
        rank_specs(plan("--venv_script", "/no/activate", script=script))


@pytest.mark.parametrize("flags", [("--num_gpus", "0"), ("--launcher", "foo"), ("--master_port", "70000"),
                                   ("--module", "--no_python"), ("--num_nodes", "-5")])
def test_wrong_usage_exits_with_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args([*flags, "x.py"])
    assert error.value.code == 2 and flags[0] in capsys.readouterr().err


def hostfile(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    return ["-H", str(path)]


def test_hostfile_with_one_host_is_local(machine, tmp_path):
    machine(gpus=8)
    job = plan_job(parse_args([*hostfile(tmp_path, "worker-0 slots=4\n"), "--num_gpus", "2", "x.py"]), Voice("error"))
    assert job.world_info == {"worker-0": [0, 1]} and job.master_addr == "127.0.0.1"


def test_several_hosts(machine, tmp_path, script):
    hosts = hostfile(tmp_path, "one slots=2\ntwo slots=3\n")
    args = parse_args([*hosts, "x.py"])
    job = plan_job(args, Voice("error"))
    # The address is agreed on when the hosts have called back.
    assert starts_hosts(args, job.world_info) and job.world_info == {"one": [0, 1], "two": [0, 1, 2]} and job.master_addr == ""
    forced = parse_args([*hosts, "--force_multi", "--include", "two", "x.py"])
    assert starts_hosts(forced, plan_job(forced, Voice("error")).world_info)
    assert plan_job(parse_args([*hosts, "--num_nodes", "1", "x.py"]), Voice("error")).slots == [0, 1]
    assert plan_job(parse_args([*hosts, "--include", "two:1", "x.py"]), Voice("error")).slots == [1]

    by_hand = [*hosts, "--no_ssh", "--node_rank", "1", script]
    specs = rank_specs(plan_job(parse_args(by_hand), Voice("error")))
    assert [spec.rank for spec in specs] == [2, 3, 4]
    expected = dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="5", LOCAL_SIZE="3", CROSS_RANK="1", CROSS_SIZE="2",
                    MASTER_ADDR="one")
    assert expected.items() <= specs[1].env.items()
    with pytest.raises(LaunchError, match="--node_rank"):
        plan_job(parse_args([*hosts, "--no_ssh", script]), Voice("error"))
    with pytest.raises(LaunchError, match="--num_gpus 3: host one has 2"):
        plan_job(parse_args([*hosts, "--num_gpus", "3", script]), Voice("error"))


def test_a_host_reads_the_job_that_was_planned(machine, tmp_path):
    flags = ["--module", "--no_local_rank", "--bind_core_list", "1,3", "--venv_script", "/v/activate", "--enable_each_rank_log", "logs",
             "--elastic_training", "--max_restarts", "3", "--master_port", "0"]
    planned = plan_job(parse_args([*hostfile(tmp_path, "a slots=1\nb slots=2\n"), *flags, "x", "--flag", "a b"]), Voice("error"))
    args = launch.parse_args(["--node_rank=1", *launch.arguments_of(planned, "contact", "debug")])
    assert (args.node_rank, args.head, args.log_level, args.elastic) == (1, "contact", "debug", "1:2:3")
    read = launch.job_from_args(args, world_info=launch.decode_world_info(args.world_info), script=args.training_script,
                                script_args=args.training_script_args, master_addr="", elastic=planned.elastic)
    assert read.first_rank == 1 and read.world_size == 3
    assert dataclasses.replace(read, node_rank=0) == planned


def test_an_elastic_host_runs_one_agent(machine, script, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    spec, = rank_specs(plan("--elastic_training", "--num_gpus", "3", "--max_restarts", "5", script=script))
    assert spec.argv[2:5] == ["-m", "deepspeed.launcher.elastic", "--ranks=3"] and "--max_restarts=5" in spec.argv
    assert spec.argv[-2:] == [script, "--local_rank=${local_rank}"] and "RANK" not in spec.env
    with pytest.raises(LaunchError, match="--bind_cores_to_rank: not with --elastic_training"):
        rank_specs(plan("--elastic_training", "--bind_cores_to_rank", script=script))
