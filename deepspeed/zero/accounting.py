# SPDX-License-Identifier: Apache-2.0
"""What an engine really holds, by the kinds that `deepspeed plan` foretells."""


def held_bytes(optimizer):
    """Bytes this rank holds now for the model that `optimizer` (what initialize() returned) steps, by kind:

    parameters (shards, or all of them where they are replicated), gradients (fp32 accumulators; none before the first backward),
    master_weights, optimizer_state (none before the first step), gathered_units (buffers of units in use, free ones included) and
    buckets (gradients on their way to the reduction). Activations are not in it.
    """
    managed = optimizer.managed
    held = dict(managed.store.bytes())
    held["gradients"] = managed.reducer.accumulator_bytes()
    held["buckets"] = managed.reducer.bucket_bytes()
    held["optimizer_state"] = optimizer.stepper.state_bytes()
    return held
