# SPDX-License-Identifier: Apache-2.0
"""What a save leaves on disk when something stands in its way."""
import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from deepspeed.checkpoint import Checkpoint, CheckpointError, folders, save
from deepspeed.checkpoint.pieces import Piece
from deepspeed.checkpoint.ranks import Ranks
from tests.parity.launch import on_ranks

_SCRIPTS = ["zero_to_fp32.py", "zero_to_torch.py"]


def put(folder, tag, value=0.0, frozen=None, **options):
    """A checkpoint of two small tensors, one of them frozen."""
    rank = Ranks().rank
    pieces = [Piece(f"w{rank}", "fp32", (4,), (), 0, torch.full((4,), value)),
              Piece(f"still{rank}", "weight", (3,), (), 0, torch.arange(3.0))]
    request = save.SaveRequest(str(folder), tag, pieces, {}, None, {}, **options)
    return save.save(request, Ranks(), frozen or save.FrozenFile())


def value_of(folder):
    found = Checkpoint(folder)
    assert found.verify() == []
    return found.read("w0", "fp32")[0].item()


def frozen_of(folder):
    return folder / "frozen_00000_of_00001.safetensors"


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if p.name not in (*_SCRIPTS, "latest"))


# ---- locks


def test_a_process_knows_its_part_by_any_path(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    part = folders.PartFolder(str(real / "t"), folders.nonce())
    part.open()
    name = os.path.basename(part.path)
    monkeypatch.chdir(real)
    for path in (".", str(link), str(real)):
        assert not folders._is_dead(os.path.join(path, name))
        folders.remove_dead_parts(path)
    assert os.path.isdir(part.path)
    ask = ("import fcntl, sys\ntry:\n    fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept OSError:\n    print('held')")
    assert subprocess.run([sys.executable, "-c", ask, part.path + ".lock"], capture_output=True, text=True).stdout == "held\n"
    part._lock.release()
    assert folders._is_dead(os.path.join(link, name))
    folders.remove_dead_parts(link)
    assert visible(real) == []


def test_a_lock_that_was_taken_for_a_dead_one_is_made_again(tmp_path, monkeypatch):
    path, known, calls = str(tmp_path / "l.lock"), fcntl.lockf, []

    def removed_first(file, mode):
        calls.append(mode)
        if len(calls) == 1:
            os.unlink(path)
        if len(calls) == 2:
            raise BlockingIOError(errno.EAGAIN, "looked at")
        return known(file, mode)

    monkeypatch.setattr(folders.fcntl, "lockf", removed_first)
    lock = folders.Lock(path)
    assert len(calls) == 3 and os.path.samestat(os.stat(path), os.fstat(lock._file))
    lock.release()
    assert not os.path.exists(path) and not folders._ours


# ---- killed between two renames

_KILLED = '''
import os, sys
from deepspeed.checkpoint import folders
from tests.unit.checkpoint.test_folders import put
put(sys.argv[1], "same", 1.0)

class NoExchange:
    exchange_paths = staticmethod(lambda left, right: False)

renames, known = [], os.rename
def rename(source, target):
    renames.append(target)
    if len(renames) == {last}:
        os._exit(9)
    known(source, target)

folders.core, os.rename = NoExchange, rename
put(sys.argv[1], "same", 2.0)
'''


@pytest.mark.parametrize("last, kept", [(1, 1.0), (2, 2.0)])
def test_killed_between_the_renames_without_exchange(tmp_path, last, kept):
    done = subprocess.run([sys.executable, "-c", _KILLED.format(last=last), tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    assert (tmp_path / "same").exists() == (last == 1)
    put(tmp_path, "next", 3.0)
    assert visible(tmp_path) == ["next", "same"]
    assert value_of(tmp_path / "same") == kept and value_of(tmp_path / "next") == 3.0


def test_a_torn_part_gets_no_name(tmp_path):
    os.rename(put(tmp_path, "t"), tmp_path / ".t.part-0123456789abcdef")
    os.truncate(tmp_path / ".t.part-0123456789abcdef" / "state_00000_of_00001.safetensors", 10)
    folders.remove_dead_parts(tmp_path)
    assert visible(tmp_path) == []


# ---- the file of frozen weights


def test_frozen_weights_are_linked_to_the_last_checkpoint_only(tmp_path, monkeypatch):
    frozen = save.FrozenFile()
    a = tmp_path / "a"
    put(tmp_path, "a", frozen=frozen)
    put(tmp_path, "b", frozen=frozen)
    assert os.path.samefile(frozen_of(a), frozen_of(tmp_path / "b"))

    other = [Piece("w0", "fp32", (4,), (), 0, torch.zeros(4)), Piece("still0", "weight", (3,), (), 0, torch.full((3,), 7.0))]

    def no_manifest(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save.manifest, "manifest_text", no_manifest)
        with pytest.raises(CheckpointError, match="No space left"):
            save.save(save.SaveRequest(str(tmp_path), "failed", other, {}, None, {}), Ranks(), frozen)
    save.save(save.SaveRequest(str(tmp_path), "c", other, {}, None, {}), Ranks(), frozen)
    assert Checkpoint(tmp_path / "c").verify() == [] and Checkpoint(tmp_path / "c").read("still0", "weight").tolist() == [7.0] * 3

    put(tmp_path, "d", frozen=frozen)
    known = frozen_of(tmp_path / "d").read_bytes()
    frozen_of(tmp_path / "d").unlink()
    frozen_of(tmp_path / "d").write_bytes(bytes(len(known)))   # somebody else's
    put(tmp_path, "e", frozen=frozen)
    assert frozen_of(tmp_path / "e").read_bytes() == known and Checkpoint(tmp_path / "e").verify() == []


# ---- a save_dir that is not shared


def _elsewhere(path, pieces, leave, known=save.stream):
    found = known(path, pieces)
    os.unlink(path)
    return found


def test_a_file_that_is_not_in_the_folder_fails_the_save(tmp_path, monkeypatch):
    put(tmp_path, "good")
    monkeypatch.setattr(save, "stream", _elsewhere)
    with pytest.raises(CheckpointError, match="_00000_of_00001.safetensors: No such file.*all nodes share"):
        put(tmp_path, "bad")
    assert visible(tmp_path) == ["good"] and folders.read_latest(tmp_path) == "good"


@on_ranks(2)
def test_nodes_that_do_not_share_the_folder(tmp_path, monkeypatch):
    rank = dist.get_rank()
    own = tmp_path / str(rank)
    own.mkdir()
    with pytest.raises(CheckpointError, match="on rank 1: .*is not there for rank 1: .*all nodes share"):
        put(own, "t")
    assert visible(own) == []
    put(tmp_path / "shared", "one", node_local=True)
    monkeypatch.setattr(socket, "gethostname", lambda: f"node{rank}")
    with pytest.raises(CheckpointError, match="use_node_local_storage.*all nodes share"):
        put(tmp_path / "shared", "two", node_local=True)
    put(tmp_path / "shared", "three")
    dist.barrier()
    assert visible(tmp_path / "shared") == ["one", "three"]


# ---- after the rename


def test_what_follows_a_save_does_not_fail_it(tmp_path, monkeypatch):
    known = folders.replace_file

    def refuse(path, data, mode=0o666):
        if os.path.basename(path) in refused:
            raise OSError(errno.EACCES, "Permission denied", path)
        known(path, data, mode)

    monkeypatch.setattr(folders, "replace_file", refuse)
    refused = _SCRIPTS
    put(tmp_path, "a", 1.0)
    assert value_of(tmp_path / "a") == 1.0 and folders.read_latest(tmp_path) == "a"
    refused = ["latest"]
    with pytest.raises(CheckpointError, match="the checkpoint is whole, but `latest` does not name it.*Permission denied"):
        put(tmp_path, "b", 2.0)
    assert value_of(tmp_path / "b") == 2.0 and folders.read_latest(tmp_path) == "a" and not folders._ours


def test_keep_last_counts_whole_checkpoints(tmp_path):
    for number, tag in enumerate("abcd"):
        put(tmp_path, tag, float(number), keep_last=3)
    assert visible(tmp_path) == ["b", "c", "d"]
    os.truncate(tmp_path / "d" / "state_00000_of_00001.safetensors", 10)
    put(tmp_path, "e", 4.0, keep_last=2)
    assert visible(tmp_path) == ["c", "d", "e"]   # d is torn: c and e are the two


def test_a_disk_error_is_no_missing_feature(tmp_path, monkeypatch):
    for code, passes in ((errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)):
        def fail(handle, code=code):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(folders.os, "fsync", fail)
        if passes:
            folders.sync_folder(tmp_path)
        else:
            with pytest.raises(OSError, match="Input/output error"):
                folders.sync_folder(tmp_path)
