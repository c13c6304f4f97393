# SPDX-License-Identifier: Apache-2.0
import json
import logging

import pytest

from deepspeed.telemetry import logs
from deepspeed.utils import log_dist, log_dist_once, logger


@pytest.fixture
def lines(monkeypatch):
    caught = []

    class Catch(logging.Handler):
        def emit(self, record):
            caught.append(record)

    handler = Catch()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(logger, "_said", set())
    yield caught
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_logger_is_known_by_name_and_quiet():
    assert logger.name == "DeepSpeed" and logging.getLogger("DeepSpeed") is logger and not logger.propagate
    assert logger.level == logging.WARNING
    assert type(logging.getLogger("some other one")) is logging.Logger


def test_said_once(lines):
    for _ in range(2):
        logger.warning_once("first")
        logger.warning_once("value %d", 1)
        logger.warning_once("value %d", 2)
        log_dist_once("third")
    assert [record.getMessage() for record in lines] == ["first", "value 1", "value 2", "third"]
    assert {record.funcName for record in lines} == {"test_said_once"}


@pytest.mark.parametrize("rank,ranks,speaks", [(None, None, True), (None, [3], True), (0, None, True), (1, None, False), (1, [], False),
                                               (1, [-1], True), (1, [0, 1], True), (2, [0, 1], False)])
def test_who_speaks(lines, monkeypatch, rank, ranks, speaks):
    monkeypatch.setattr(logs, "current_rank", lambda: rank)
    log_dist("hello", ranks=ranks)
    assert bool(lines) == speaks


def test_rank_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    record = logging.LogRecord("DeepSpeed", logging.WARNING, "f.py", 1, "x", (), None)
    logs._RankFilter().filter(record)
    assert record.rank == 3
    monkeypatch.delenv("RANK")
    logs._RankFilter().filter(record)
    assert record.rank == "-"


@pytest.mark.parametrize("rank,level,passes", [(0, "WARNING", True), (1, "WARNING", False), (1, "REPORT", False), (1, "ERROR", True),
                                               (1, "CRITICAL", True)])
def test_other_ranks_are_heard_only_when_it_is_an_error(monkeypatch, rank, level, passes):
    monkeypatch.setenv("RANK", str(rank))
    record = logging.LogRecord("DeepSpeed", logging.getLevelName(level), "f.py", 1, "x", (), None)
    assert bool(logs._RankFilter().filter(record)) == passes
    record.rank_chosen = True
    assert logs._RankFilter().filter(record)


def test_other_ranks_are_heard_at_level_debug(lines, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    logger.setLevel(logging.DEBUG)
    assert logs._RankFilter().filter(logging.LogRecord("DeepSpeed", logging.INFO, "f.py", 1, "x", (), None))


def test_what_was_asked_for_is_said_at_the_default_level(lines, monkeypatch):
    logger.setLevel(logging.WARNING)
    logs.report("progress")
    logger.setLevel(logging.ERROR)
    logs.report("not this")
    assert [(record.getMessage(), record.levelname) for record in lines] == [("progress", "REPORT")]


def test_levels(lines):
    logs.set_log_level_from_string("ERROR")
    assert logs.get_current_level() == logging.ERROR and not logs.should_log_le("info") and logs.should_log_le("critical")
    with pytest.raises(ValueError, match="'loud' is unknown"):
        logs.set_log_level_from_string("loud")
    other = logging.getLogger("other")
    logs.set_log_level_from_string("debug", other)
    assert other.level == logging.DEBUG and logger.level == logging.ERROR


def test_json_and_print(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs, "current_rank", lambda: 1)
    logs.print_json_dist({"a": 1}, ranks=[1], path=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": 1, "rank": 1}
    logs.print_json_dist({"a": 1}, ranks=[0], path=tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
    logs.print_dist("seen", ranks=[1])
    logs.print_dist("unseen", ranks=[0])
    assert capsys.readouterr().out == "seen\n"


def test_caller_name():
    def helper():
        return logs.get_caller_func(2)

    assert helper() == "test_caller_name"
