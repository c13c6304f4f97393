# SPDX-License-Identifier: Apache-2.0
import pytest

from deepspeed.checkpoint import folders
from deepspeed.checkpoint.choosing import candidates, load_best
from deepspeed.checkpoint.range_source import RangeSource
from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.source import CheckpointError, DamageError
from tests.unit.checkpoint.by_hand import write_checkpoint


class TwoRanks(Ranks):
    """Rank 0, with what rank 1 says."""

    def __init__(self, other):
        self.rank, self.size, self.other = 0, 2, other

    def gather(self, value):
        return [value, self.other]


@pytest.mark.parametrize("mine, other, kind, text", [
    (DamageError("torn"), None, DamageError, "loading failed on rank 0: torn"),
    (None, ("torn", True), DamageError, "loading failed on rank 1: torn"),
    (DamageError("torn"), ("MemoryError: none", False), CheckpointError, "loading failed on rank 1: MemoryError: none"),
    (DamageError("torn"), ("torn", True), DamageError, "loading failed: torn"),
    (MemoryError("none"), None, CheckpointError, "loading failed on rank 0: MemoryError: none"),
])
def test_damage_stays_damage_when_nothing_else_is_wrong(mine, other, kind, text):
    with pytest.raises(CheckpointError) as error:
        TwoRanks(other).agree(mine, "loading")
    assert type(error.value) is kind and str(error.value) == text


def test_nothing_is_wrong():
    TwoRanks(None).agree(None, "loading")


def test_what_is_no_damage_ends_the_search():
    tried = []

    def attempt(folder):
        tried.append(folder)
        raise (DamageError if folder == "a" else CheckpointError)(f"{folder} is bad")

    with pytest.raises(CheckpointError, match="(?s)a is bad.*b is bad"):
        load_best(["a", "b", "c"], False, attempt)
    assert tried == ["a", "b"]


@pytest.mark.parametrize("tag", ["step2", "runs/step2"])
def test_a_tag_whose_writer_was_killed_between_two_renames(tag, tmp_path):
    """The new folder and the old one both have temporary names; the newer counts. Another tag's, and a living writer's, do not."""
    target = tmp_path / tag
    asides = {digit: target.parent / f".{target.name}.part-{digit * 16}" for digit in "abc"}
    other = target.parent / f".x{target.name}.part-{'d' * 16}"
    for saved_at, folder in enumerate([asides["a"], asides["b"], other, asides["c"]]):
        write_checkpoint(RangeSource("nothing", {}, {}), folder, 1, saved_at=saved_at, save_latest=True)
    alive = folders.Lock(f"{asides['c']}.lock")
    try:
        assert candidates(str(tmp_path), tag) == [str(asides["b"])]
        (tmp_path / "latest").write_text(tag)
        assert candidates(str(tmp_path))[0] == str(asides["b"])
        target.mkdir()
        assert candidates(str(tmp_path), tag) == [str(target)]
    finally:
        alive.release()
    assert candidates(str(tmp_path), "none") == [str(tmp_path / "none")]
