# SPDX-License-Identifier: Apache-2.0
import io
from collections import OrderedDict, namedtuple

import torch

from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.utils import ensure_directory_exists

Pair = namedtuple("Pair", "x y")


def saved_bytes(item):
    out = io.BytesIO()
    torch.save(item, out)
    return out.tell()


def test_only_the_tensors_own_bytes_are_saved():
    buffer = torch.zeros(1 << 20)
    state = OrderedDict(a=buffer[:10], b=[buffer[10:20].view(2, 5), 3], c=({"d": buffer[0]}, "text"), e=Pair(buffer[1:2], None))
    copy = clone_tensors_for_torch_save(state)
    assert saved_bytes(state) > 4 << 20 and saved_bytes(copy) < 20_000
    assert type(copy) is OrderedDict and type(copy["c"]) is tuple and type(copy["e"]) is Pair
    assert copy["b"][0].shape == (2, 5) and copy["b"][1] == 3 and copy["c"][1] == "text"


def test_a_copy_is_detached_and_separate():
    weight = torch.nn.Parameter(torch.ones(2))
    copy = clone_tensors_for_torch_save({"w": weight})["w"]
    assert not copy.requires_grad and copy.data_ptr() != weight.data_ptr() and torch.equal(copy, weight)
    assert clone_tensors_for_torch_save(weight, device="meta").is_meta


def test_directories(tmp_path):
    ensure_directory_exists(str(tmp_path / "a" / "b" / "file"))
    ensure_directory_exists(str(tmp_path / "a" / "b" / "file"))
    assert (tmp_path / "a" / "b").is_dir() and not (tmp_path / "a" / "b" / "file").exists()
    ensure_directory_exists("just_a_name")
