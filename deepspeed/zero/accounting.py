# SPDX-License-Identifier: Apache-2.0
"""What an engine really holds, by the kinds that `deepspeed plan` foretells."""


def held_bytes(optimizer):
    """Bytes this rank holds now for the model that `optimizer` (what initialize() returned) steps, by kind:

    parameters (shards, or all of them where they are replicated), gradients (fp32 accumulators; none before the first backward),
    master_weights, optimizer_state (none before the first step), updates_ahead (what updates beside backward make of these), gathered_units
    (buffers of units in use, free ones included) and buckets (gradients on their way to the reduction). Activations are not in it.
    """
    managed = optimizer.managed
    held = dict(managed.store.bytes())
    del held["parameters_in_files"]   # of "parameters"; places() tells them apart
    held["gradients"] = managed.reducer.accumulator_bytes()
    held["buckets"] = managed.reducer.bucket_bytes()
    held["optimizer_state"] = optimizer.stepper.state_bytes()
    held["updates_ahead"] = _ahead_bytes(optimizer)
    return held


def _ahead_bytes(optimizer):
    """Masters and states once more, and the weights."""
    states = len(getattr(optimizer.stepper, "state_names", ()))
    return sum(4 * s.master.numel() * states + s.beside.nbytes + (0 if s.low is None else s.low.nbytes)
               for s in optimizer.slices if s.rests and optimizer.managed.tiers.speculates)


def _place(rest, device):
    return device if rest is None else getattr(rest, "folder", "the host's memory")


def places(optimizer):
    """[(what, bytes on this rank, where it rests)] of the state of training, present or still to come, for the model that `optimizer` steps."""
    managed, device = optimizer.managed, str(optimizer.managed.device)
    tiers, store = managed.tiers, managed.store.bytes()
    in_files, states = store["parameters_in_files"], len(getattr(optimizer.stepper, "state_names", ()))
    rows = [("parameters", store["parameters"] - in_files, device if tiers.parameter_rest is None else "the host's memory"),
            ("parameters", in_files, getattr(tiers.parameter_rest, "folder", tiers.parameter_folder)),
            ("gradients on their way", managed.reducer.bucket_bytes(), device)]
    for rests, place in ((False, device), (True, _place(tiers.rest, device))):
        slices = [s for s in optimizer.slices if s.rests == rests]
        trained = sum(s.master.numel() for s in slices)
        rows += [("master weights", sum(s.beside.nbytes for s in slices if s.low is not None), place),
                 ("optimizer states", 4 * trained * states, place), ("gradient slices", 4 * trained, place)]
        if rests:
            rows.append(("updates in advance", _ahead_bytes(optimizer), place))
    if managed.shards_params:
        units = sorted((sum(managed.store.full_bytes(flat) for flat in managed.store.unit_flats(unit)) for unit in range(managed.store.units)
                        if not managed.store.is_persistent(unit)), reverse=True)
        rows.append(("gathered units", sum(units[:2]), device))
    if hasattr(tiers.rest, "stream_bytes"):
        rows.append(("tiles of the step", min(tiers.rest.stream_bytes, 12 * trained), "the host's memory" if tiers.rest.apart else device))
    return [row for row in rows if row[1]]


def places_table(optimizer):
    """places() as lines of text, most bytes first within each place."""
    rows = places(optimizer)
    lines = []
    for where in dict.fromkeys(place for _, _, place in rows):
        here = sorted(((size, what) for what, size, place in rows if place == where), reverse=True)
        lines.append(f"  {sum(size for size, _ in here) / 2**20:12,.1f} MiB  {where}")
        lines += [f"    {size / 2**20:12,.1f}    {what}" for size, what in here]
    return lines
