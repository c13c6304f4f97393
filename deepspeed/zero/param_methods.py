# SPDX-License-Identifier: Apache-2.0
"""The methods callers find on a sharded parameter."""
from deepspeed.zero.managed import home_of


def _all_gather(parameter, param_list=None, async_op=False):
    """Gathers the parameters (default: this one) and holds them until partition(); collective where the carrier needs it."""
    for p in param_list or [parameter]:
        home = home_of(p)
        if home is not None:
            home.owner.refuse_while_away("all_gather", "lp_params")
            home.owner.store.gather(home.unit, "gather_explicit")
            home.owner.store.pin(home.unit)


def _partition(parameter, param_list=None, has_been_updated=False):
    """Frees what all_gather() holds; with has_been_updated each rank first takes its slice from the full values."""
    for p in param_list or [parameter]:
        home = home_of(p)
        if home is None:
            continue
        store = home.owner.store
        if has_been_updated:
            store.write_back(home.unit)
        if store.pins(home.unit):
            store.unpin(home.unit)
        store.release(home.unit)


def _summary(parameter):
    home = parameter.ds_home
    return {"id": parameter.ds_id, "name": home.name, "status": parameter.ds_status.name, "numel": parameter.ds_numel,
            "ds_numel": parameter.ds_numel, "shape": tuple(parameter.ds_shape), "ds_shape": tuple(parameter.ds_shape),
            "requires_grad": parameter.requires_grad, "persist": parameter.ds_persist, "unit": home.unit,
            "ds_tensor.shape": tuple(parameter.ds_tensor.shape)}


def _partition_numel(parameter):
    return parameter.ds_tensor.numel()


class _Method:
    """A bound method that does not hold its parameter, which holds it."""

    __slots__ = ("function", "home")

    def __init__(self, function, home):
        self.function, self.home = function, home

    def __call__(self, *args, **kwargs):
        return self.function(self.home.owner.params[self.home.index], *args, **kwargs)


def bind(parameter):
    home = parameter.ds_home
    for name, function in (("all_gather", _all_gather), ("partition", _partition), ("ds_summary", _summary),
                           ("partition_numel", _partition_numel)):
        setattr(parameter, name, _Method(function, home))
