# SPDX-License-Identifier: Apache-2.0
"""What of an engine goes into a checkpoint besides tensors, and comes back."""
from deepspeed import _version
from deepspeed.checkpoint import random_state
from deepspeed.checkpoint.pieces import Holdings
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.telemetry import logger
from deepspeed.zero.optimizer import ShardedOptimizer

import torch.distributed as dist


def holdings_of(engine):
    """The model and its states as this rank holds them."""
    group = engine.data_parallel_group
    optimizer = engine.optimizer if isinstance(engine.optimizer, ShardedOptimizer) else None
    scope = f"mp_rank_{engine.get_model_parallel_rank():02d}:" if engine.mp_world_size > 1 else ""
    if engine._managed is not None:
        (optimizer or engine._managed.store).adopt_written()
    return Holdings(engine.module, engine._managed, optimizer, dist.get_rank(group), dist.get_world_size(group), scope)


def _optimizer_state(engine, holdings):
    optimizer = holdings.optimizer
    if optimizer is None:
        return None
    basic, stepper = optimizer.optimizer, optimizer.stepper
    groups = [{"params": names, "values": {k: v for k, v in group.items() if k != "params"}}
              for names, group in zip(holdings.group_names(), basic.param_groups)]
    return {"class": type(basic).__name__, "fused": hasattr(stepper, "native"), "steps": stepper.steps, "skipped_bad": optimizer.skipped_bad,
            "groups": groups}


def _missed(holdings):
    """{name: updates that passed it over} of the parameters whose first element this rank writes: only who steps a parameter counts it."""
    if holdings.optimizer is None:
        return {}
    missed = holdings.optimizer.stepper.missed_steps
    found = {}
    for name, _, segment, _ in holdings.segments():
        begin, numel = holdings.share_of(holdings.names.parameters[name])
        if begin == 0 and numel and missed.get(segment.param):
            found[name] = missed[segment.param]
    return found


def _parts(holdings, whole_here):
    """State of a client's optimizer that is no slice: [(name, begin, numel, {key: value})] of this rank."""
    found = []
    if holdings.optimizer is None or not (whole_here or holdings.optimizer.options.partial_slices):
        return found
    for name, _, segment, first in holdings.segments():
        values = holdings.optimizer.stepper.parts_of(segment)
        if values:
            found.append([name, first, segment.numel, values])
    return found


def state_of(engine, holdings, client_state, frozen_excluded):
    """The same on every rank; rank 0's is written."""
    scheduler = engine.lr_scheduler
    return {
        "counters": {"global_steps": engine.global_steps, "global_samples": engine.global_samples, "micro_steps": engine.micro_steps,
                     "skipped_steps": engine.skipped_steps, "gradient_accumulation_steps": engine.gradient_accumulation_steps()},
        "optimizer": _optimizer_state(engine, holdings),
        "loss_scaler": engine.optimizer.loss_scaler.state_dict() if holdings.optimizer is not None else None,
        "lr_scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
        "data": engine.data_state_dict(),
        "extra_state": {name: owner.get_extra_state() for name, owner in holdings.names.extra.items()},
        "frozen_excluded": frozen_excluded,
        "bookkeeping": {"ds_version": _version.__version__, "ds_config": engine.config if isinstance(engine.config, dict) else None,
                        "dp_world_size": engine.dp_world_size, "mp_world_size": engine.mp_world_size,
                        "zero_stage": engine.zero_optimization_stage()},
        "client_state": dict(client_state) if client_state else {},
    }


def rank_state_of(engine, holdings):
    """This rank's own: random generators, and what belongs to its slices alone."""
    return {"random": random_state.capture(), "parts": _parts(holdings, engine.global_rank == 0), "missed": _missed(holdings),
            "scope": _scope(holdings)}


def _scope(holdings):
    """What state_of() says of names, by the first rank of every scope: rank 0 does not know the others' (model parallelism of the caller's)."""
    if not holdings.names.scope or holdings.group_rank:
        return {}
    return {"extra_state": {name: owner.get_extra_state() for name, owner in holdings.names.extra.items()}, "groups": holdings.group_names() or []}


def client_state_of(source):
    """What load_checkpoint returns: the caller's own keys and what callers read beside them."""
    state = source.state
    kept = {key: value for key, value in state.get("bookkeeping", {}).items() if key in ("ds_version", "ds_config")}
    if "global_samples" in state.get("counters", {}):
        kept["global_samples"] = state["counters"]["global_samples"]
    return {**kept, **(state.get("client_state") or {})}


def check(engine, source, scheduler_states):
    """CheckpointError, before anything has changed, when continue_from() could not take over what was saved."""
    saved, scheduler = source.state.get("lr_scheduler"), engine.lr_scheduler
    if scheduler_states and saved and hasattr(scheduler, "load_state_dict") and hasattr(scheduler, "state_dict"):
        own = scheduler.state_dict()
        if own and not set(own) & set(saved):
            raise CheckpointError(f"{source.path}: its schedule's state ({', '.join(sorted(map(str, saved)))}) is not one of {type(scheduler).__name__}: "
                                  "load_lr_scheduler_states=False loads the rest")
    if source.world_size == engine.world_size:
        source.random_of(engine.global_rank)   # whether it can be read shows now


def continue_from(engine, source, optimizer_states, scheduler_states):
    """Counters, loss scale, schedule, data and random generators as they were saved."""
    state = source.state
    _continue_counters(engine, state.get("counters", {}))
    if optimizer_states and isinstance(engine.optimizer, ShardedOptimizer):
        optimizer, saved = engine.optimizer, state.get("loss_scaler")
        if optimizer.dynamic_loss_scale and saved and "cur_iter" in saved:   # a constant scale is the configuration's
            optimizer.loss_scaler.load_state_dict(saved)
        optimizer.skipped_bad = int((state.get("optimizer") or {}).get("skipped_bad", 0))
        optimizer.overflow = False
    saved = state.get("lr_scheduler")
    if scheduler_states and saved is not None and hasattr(engine.lr_scheduler, "load_state_dict"):
        engine.lr_scheduler.load_state_dict(saved)
    if state.get("data"):
        engine.load_data_state_dict(state["data"])
    if source.world_size == engine.world_size:   # otherwise no rank's draws would be those it made before
        drawn = source.random_of(engine.global_rank)
        if drawn is not None:
            random_state.restore(drawn)


def _continue_counters(engine, counters):
    for name in ("global_steps", "global_samples", "skipped_steps"):
        if name in counters:
            setattr(engine, name, int(counters[name]))
    # The gradients of an update under way are not saved: it begins anew.
    micro, gas = int(counters.get("micro_steps", 0)), engine.gradient_accumulation_steps()
    if counters.get("gradient_accumulation_steps", gas) == gas:
        engine.micro_steps = micro - micro % gas
    else:
        engine.micro_steps = engine.global_steps * gas
    engine._backwards = 0
    engine._step_applied = False
    if engine._managed is not None:
        engine._managed.store.set_step(engine.global_steps)


def warn_of_unfinished(engine):
    """A save between two updates."""
    managed = engine._managed
    if managed is not None and managed.reducer is not None and engine.micro_steps % engine.gradient_accumulation_steps():
        logger.warning(f"save_checkpoint: after micro-batch {engine.micro_steps % engine.gradient_accumulation_steps()} of "
                       f"{engine.gradient_accumulation_steps()}: gradients of an update under way are not saved, training will continue at "
                       "its first micro-batch")
