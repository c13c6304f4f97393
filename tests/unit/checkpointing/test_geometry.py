# SPDX-License-Identifier: Apache-2.0
"""A tensor that rests as a row comes back with its bits and its strides."""
import itertools

import pytest
import torch

from deepspeed.checkpointing.geometry import from_row, geometry_of, row_of

BASE = torch.arange(2 * 3 * 5 * 7, dtype=torch.float64).view(2, 3, 5, 7)
VIEWS = {
    "contiguous": BASE, "empty": BASE[:0], "scalar": BASE[1, 1, 1, 1], "one": BASE[:1, :1, :1, :1], "part": BASE[1, 1:],
    "transposed": BASE.transpose(1, 3), "columns": BASE[..., 2:5], "every other": BASE[:, :, ::2], "channels last": BASE.permute(0, 2, 3, 1),
    "expanded": BASE[:, :1].expand(2, 4, 5, 7), "expanded columns": BASE[:, :1, :, 1:3].expand(2, 3, 5, 2), "new axis": BASE[0, 0].expand(9, 5, 7),
    "all one": BASE[:1, :1, :1, :1].expand(3, 3, 3, 3), "bf16": BASE.bfloat16().mT, "complex": torch.complex(BASE, -BASE)[:, 1].mT,
}


@pytest.mark.parametrize("name", VIEWS)
def test_bits_and_strides_come_back(name):
    tensor = VIEWS[name]
    geometry = geometry_of(tensor)
    row = row_of(tensor, geometry)
    assert row.shape == (geometry.row_numel,) and row.is_contiguous()
    back = from_row(torch.cat([row, row[:3]]), geometry)  # a row may be longer, by its padding
    assert back.dtype == tensor.dtype and back.shape == tensor.shape and torch.equal(back, tensor)
    assert back.stride() == tensor.stride() and back.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_every_order_of_dimensions_is_dense():
    for order in itertools.permutations(range(4)):
        tensor = BASE.permute(order)
        geometry = geometry_of(tensor)
        row = row_of(tensor, geometry)
        assert geometry.dense and row.data_ptr() == BASE.data_ptr() and torch.equal(row, BASE.flatten())
        assert torch.equal(from_row(row.clone(), geometry), tensor)


def test_a_repeated_dimension_rests_once():
    assert geometry_of(VIEWS["expanded"]).row_numel == 2 * 5 * 7 and geometry_of(VIEWS["all one"]).row_numel == 1


def test_elements_that_overlap_otherwise_stay():
    assert geometry_of(BASE.flatten().unfold(0, 4, 2)) is None and geometry_of(BASE.flatten().as_strided((3, 3), (1, 1))) is None
