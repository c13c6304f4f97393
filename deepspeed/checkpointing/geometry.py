# SPDX-License-Identifier: Apache-2.0
"""How a tensor lies in memory, so that it can rest as one row of elements and come back with the strides it had.

Strides choose kernels, and kernels choose the order of sums: a transposed input that came back contiguous could give other bits.
"""
from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """Of a strided tensor of which no two elements share memory, except along `repeated` dimensions (stride 0, as expand() makes)."""
    shape: tuple
    stride: tuple
    dtype: torch.dtype
    device: torch.device
    dense: bool  # without holes: its memory, read in order, is the row

    @property
    def repeated(self):
        return tuple(dim for dim, (size, stride) in enumerate(zip(self.shape, self.stride)) if stride == 0 and size > 1)

    @property
    def once(self):
        """The shape with every repeated dimension of size 1."""
        return tuple(1 if dim in self.repeated else size for dim, size in enumerate(self.shape))

    @property
    def row_numel(self):
        return torch.Size(self.once).numel()


def geometry_of(tensor):
    """None for a tensor whose elements overlap in another way than by expand()."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    found = Geometry(shape, stride, tensor.dtype, tensor.device, False)
    reach = 1
    for step, size in sorted((step, size) for step, size in zip(stride, found.once) if size > 1):
        if step < reach:
            return None
        reach = step * (size - 1) + reach
    return found._replace(dense=reach == found.row_numel)


def row_of(tensor, geometry):
    """[row_numel] elements: a view where the tensor has no holes, else a copy."""
    tensor = tensor.detach()
    for dim in geometry.repeated:
        tensor = tensor.narrow(dim, 0, 1)
    if geometry.dense:
        return tensor.as_strided((geometry.row_numel,), (1,))
    return tensor.reshape(-1)


def from_row(row, geometry):
    """The tensor as it was; `row` [at least row_numel] becomes its memory where it has no holes."""
    once = geometry.once
    if geometry.dense:
        whole = row.as_strided(once, geometry.stride)
    else:
        whole = torch.empty_strided(once, geometry.stride, dtype=geometry.dtype, device=geometry.device)
        whole.copy_(row[:geometry.row_numel].view(once))
    return whole.expand(geometry.shape) if geometry.repeated else whole
