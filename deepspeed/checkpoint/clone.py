# SPDX-License-Identifier: Apache-2.0
"""Copies of tensors that carry only their own bytes."""
import torch


def clone_tensors_for_torch_save(item, device=torch.device("cpu")):
    """`item` with every tensor of its nested dicts, lists and tuples replaced by a detached copy on `device`.

    torch.save writes the whole storage behind a view; a copy has no storage but its own. Other values are the same objects.
    """
    if torch.is_tensor(item):
        # `to` copies when the device differs; otherwise we must, or the storage stays shared.
        moved = item.detach().to(device)
        return moved.clone() if moved.untyped_storage().data_ptr() == item.untyped_storage().data_ptr() else moved
    if isinstance(item, (list, tuple)):
        copies = [clone_tensors_for_torch_save(value, device) for value in item]
        return type(item)(*copies) if hasattr(item, "_fields") else type(item)(copies)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(value, device) for key, value in item.items()})
    return item
