# SPDX-License-Identifier: Apache-2.0

import pytest

from deepspeed.launcher import runner
from deepspeed.launcher.resources import (decode_world_info, encode_world_info, fetch_hostfile, parse_hostfile,
                                          parse_inclusion_exclusion, parse_resource_filter)

POOL = {"a": 2, "b": 4}


def test_hostfile():
    assert parse_hostfile(["# all of it\n", "b slots=4\n", "\n", "a  slots=2 # old\n"]) == {"b": 4, "a": 2}
    assert list(parse_hostfile(["b slots=4", "a slots=2"])) == ["b", "a"]


@pytest.mark.parametrize("lines,message", [
    (["a slots=2", "a slots=1"], "line 2: host a is there twice"),
    (["a"], "line 1: expected 'host slots=N', found 'a'"),
    (["a slots=x"], "found 'a slots=x'"),
    (["a slots=2 b slots=3"], "line 1"),
    (["a slots=0"], "host a has no slots"),
    ([], "no hosts"),
    (["# nothing"], "no hosts"),
])  # yapf: disable
def test_bad_hostfiles(lines, message):
    with pytest.raises(ValueError, match=message):
        parse_hostfile(lines)


def test_fetch_hostfile(tmp_path):
    assert fetch_hostfile(str(tmp_path / "none")) is None
    path = tmp_path / "hosts"
    path.write_text("a slots=2\n")
    assert fetch_hostfile(str(path)) == {"a": 2}
    path.write_text("")
    with pytest.raises(ValueError, match=f"{path}: hostfile: no hosts"):
        fetch_hostfile(str(path))


@pytest.mark.parametrize("include,exclude,expected", [
    ("", "", {"a": [0, 1], "b": [0, 1, 2, 3]}),
    ("a", "", {"a": [0, 1]}),
    ("b:1,2@a:0", "", {"a": [0], "b": [1, 2]}),
    ("b:3@b:1", "", {"b": [1, 3]}),
    (" a : 1 @ b ", "", {"a": [1], "b": [0, 1, 2, 3]}),
    ("", "b:0", {"a": [0, 1], "b": [1, 2, 3]}),
    ("", "a", {"b": [0, 1, 2, 3]}),
    ("", "a:0,1@b:1", {"b": [0, 2, 3]}),
    ("", "a@b", {}),
])  # yapf: disable
def test_filters(include, exclude, expected):
    result = parse_resource_filter(POOL, include, exclude)
    assert result == expected and list(result) == list(expected)
    assert parse_inclusion_exclusion(POOL, include, exclude) == expected


@pytest.mark.parametrize("include,exclude,message", [
    ("c", "", "host 'c' in 'c' is unknown"),
    ("a:7", "", "slot 7 of host a is unknown"),
    ("a", "b", "exclude each other"),
    ("a:0:1", "", "'a:0:1': expected HOST"),
    ("a:", "", "expected HOST"),
    ("", "x", "host 'x'"),
])  # yapf: disable
def test_bad_filters(include, exclude, message):
    with pytest.raises(ValueError, match=message):
        parse_resource_filter(POOL, include, exclude)


def test_filter_over_named_slots():
    assert parse_resource_filter({"localhost": [2, 5]}, "localhost:5") == {"localhost": [5]}


def test_world_info_survives_the_command_line():
    world = {"host-1": [0, 1], "host-2": ["GPU-5f", 3]}
    text = encode_world_info(world)
    assert decode_world_info(text) == world and not set(text) & set(" '\"$/+")
    for bad in ("%%%", encode_world_info([]), encode_world_info({"a": 2})):
        with pytest.raises(ValueError, match="--world_info"):
            decode_world_info(bad)


def test_names_that_other_launchers_import(monkeypatch):
    for name in ("DEEPSPEED_ENVIRONMENT_NAME", "encode_world_info", "fetch_hostfile", "parse_resource_filter",
                 "parse_args", "main"):
        assert hasattr(runner, name)
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"
