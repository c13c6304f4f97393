# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: checkpoints that training continues from, and whole weights."""
import os

import torch

from deepspeed.checkpoint.choosing import candidates, load_best, open_source
from deepspeed.checkpoint.export.stream import whole_file
from deepspeed.checkpoint.load import Loading
from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.save import FrozenFile, SaveRequest, save
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.comm import flight
from deepspeed.engine import checkpoint_state
from deepspeed.telemetry import logger
from deepspeed.zero.consolidate import full_state_dict

_HALF_LOADED = ("The engine holds values from before and after: it does not train, evaluate or save until a load_checkpoint() of another "
                "checkpoint succeeds, or it is built anew.")


class CheckpointMethods:

    # ---- checkpoints

    def save_checkpoint(self, save_dir, tag=None, client_state={}, save_latest=True, exclude_frozen_parameters=False):
        """Writes everything that training continues from into save_dir/<tag> (default tag: global_step<N>). Collective; True.

        The checkpoint is whole or absent: it appears under its name when all ranks' files are durable. save_latest: it becomes what
        load_checkpoint() without a tag loads. client_state: values of the caller's own, rank 0's count; load_checkpoint() returns them.
        CheckpointError, on all ranks alike and naming the rank and the file, when it could not be written; what was there before stays.

        With checkpoint.writer.decoupled the call returns as soon as the values are copied, and they are written while training goes on;
        what goes wrong then is raised by the first step, save or load after it, or by destroy(); what nobody has met by the end of the process is
        logged there, and the exit status is 1.
        """
        self._refuse_half_loaded()
        self._refuse_without_states("save_checkpoint")
        checkpoint_state.warn_of_unfinished(self)
        ranks, cfg = Ranks(), self._config.checkpoint
        holdings = checkpoint_state.holdings_of(self)
        pieces, excluded = holdings.owned(), []
        if exclude_frozen_parameters:
            excluded = [name for name, parameter in holdings.names.parameters.items() if not parameter.requires_grad]
            left_out = set(excluded)
            pieces = [p for p in pieces if p.kind == "buffer" or p.name not in left_out]
        aliases = {alias: name for alias, name in holdings.names.aliases.items() if name not in excluded}
        request = SaveRequest(
            save_dir=os.fspath(save_dir), tag=f"global_step{self.global_steps}" if tag is None else str(tag), pieces=pieces,
            state=checkpoint_state.state_of(self, holdings, client_state, excluded),
            rank_state=checkpoint_state.rank_state_of(self, holdings), aliases=aliases, save_latest=save_latest,
            tag_validation=cfg.tag_validation, node_local=cfg.use_node_local_storage, keep_last=cfg.keep_last,
            leave=self._managed.leave_files if self._managed is not None and self._managed.tiers.in_files else None,
            say_speed=cfg.writer is not None and cfg.writer.show_statistics, writers=self._writers())
        if self._frozen_file is None:
            self._frozen_file = FrozenFile()
        if self._background_saver is not None:
            self._background_saver.start(request, ranks, self._frozen_file)
        else:
            save(request, ranks, self._frozen_file)
            if self._managed is not None:
                self._managed.leave_files()
        return True

    def _writers(self):
        """Threads to write with; None: by the cores. In the background it is one, since training has the cores."""
        if self._background_saver is not None:
            return 1
        return self._config.checkpoint.writer.io_multiplier if self._config.is_set("checkpoint.writer.io_multiplier") else None

    def _prepare_saving(self):
        """At the end of construction: memory for the copies of background saves."""
        if self._config.is_set("checkpoint.writer") and self._config.checkpoint.writer.decoupled:
            if self._managed is not None and self._managed.tiers.in_files:
                logger.warning("checkpoint.writer.decoupled has no effect: state rests in files, and the copy in memory that a save in the "
                               "background writes from would undo that. save_checkpoint() returns when all is written")
                return
            from deepspeed.checkpoint.background import BackgroundSaver
            self._background_saver = BackgroundSaver()
            holdings = checkpoint_state.holdings_of(self)
            self._background_saver.snapshot.make_ready(holdings.bytes_expected())

    def _collect_save(self):
        """After an update: an error of a save in the background is raised, on all ranks at the same step."""
        if self._background_saver is not None and self._background_saver.current is not None:
            self._background_saver.collect(Ranks())

    def _finish_save(self):
        if self._background_saver is not None:
            self._background_saver.finish(Ranks())

    def load_checkpoint(self, load_dir, tag=None, load_module_strict=True, load_optimizer_states=True, load_lr_scheduler_states=True,
                        load_module_only=False, custom_load_fn=None):
        """Continues from a checkpoint, whatever ZeRO stage, number of ranks and precision it was saved with. Collective.

        Returns (the checkpoint's folder, client_state), or (None, None) when load_dir holds nothing to continue from. tag None: what the
        file `latest` names; a checkpoint that is torn or damaged is then skipped, with its reason in the log, for the newest good one.
        When none is whole, or reading fails for want of rights, memory or files, CheckpointError names the file; where values had been changed by
        then, the error says so and the engine refuses to go on until a load succeeds.
        load_module_strict: CheckpointError, listing all of them, when parameters are missing, unknown or of another shape; otherwise
        what fits is loaded and the rest is reported. load_module_only: weights and buffers, nothing else.
        custom_load_fn(src=state dict, dst=module) puts the weights into the module.
        """
        self._refuse_without_states("load_checkpoint")
        self._finish_save()
        ranks, load_dir = Ranks(), os.fspath(load_dir)
        found = ranks.attempt(lambda: self._load_candidates(load_dir, tag) if ranks.rank == 0 else None, f"loading from {load_dir}")
        found = ranks.from_first(found)
        if not found:
            logger.warning(f"load_checkpoint: {load_dir} has no checkpoint to continue from" if os.path.isdir(load_dir) else
                           f"load_checkpoint: there is no folder {load_dir}")
            return None, None
        with_states = load_optimizer_states and not load_module_only

        def check(source):
            if not load_module_only:
                checkpoint_state.check(self, source, load_lr_scheduler_states)

        try:
            source = load_best(found, tag is not None,
                               lambda folder: self._load_from(folder, ranks, load_module_strict, with_states, custom_load_fn, check))
            if not load_module_only:
                ranks.attempt(lambda: checkpoint_state.continue_from(self, source, load_optimizer_states, load_lr_scheduler_states),
                              f"continuing from {source.path}")
                flight.state.step = self.global_steps
        except CheckpointError as error:
            if self._half_loaded is not None:
                raise type(error)(f"{error}\n{_HALF_LOADED}") from error
            raise
        self._half_loaded = None
        if self._managed is not None:
            self._managed.leave_files()
        return source.path, checkpoint_state.client_state_of(source)

    def _load_candidates(self, load_dir, tag):
        names = ("latest_universal", "latest") if self._config.checkpoint.load_universal else ("latest", "latest_universal")
        return candidates(load_dir, tag, names)

    def _load_from(self, folder, ranks, strict, with_states, custom_load_fn, check):
        what = f"loading {folder}"

        def plan():
            holdings = checkpoint_state.holdings_of(self)
            source = open_source(folder, holdings.group_names())
            loading = Loading(source, holdings, strict and custom_load_fn is None, with_states)
            loading.plan()
            source.state   # whether it can be read shows now
            check(source)
            return loading

        loading = ranks.attempt(plan, what)
        self._half_loaded = what   # until all is done
        ranks.together(loading.apply, what)
        loading.take_over()
        ranks.attempt(loading.settle, what)
        if custom_load_fn is not None:
            self._load_by(custom_load_fn, loading)
        if ranks.rank == 0:
            loading.say()
        return loading.source

    def _refuse_half_loaded(self):
        if self._half_loaded is not None:
            raise RuntimeError(f"{self._half_loaded} has failed midway. {_HALF_LOADED}")

    def _load_by(self, custom_load_fn, loading):
        """The caller's function puts the weights in; where it leaves what was loaded, the masters keep their further digits."""
        from deepspeed.checkpoint.custom_load import load_by
        load_by(custom_load_fn, loading)

    # ---- whole weights

    def zero_gather_16bit_weights_on_model_save(self):
        return self._config.zero_optimization.gather_16bit_weights_on_model_save

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters=False):
        """The whole model on rank 0's CPU, None elsewhere. Collective; holds one unit at a time besides the result."""
        if not self._layout.shard_params:
            raise ValueError("this engine does not shard parameters: use engine.module.state_dict()")
        return full_state_dict(self.module, self.global_rank == 0, exclude_frozen_parameters)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters=False):
        return self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)

    def save_16bit_model(self, save_dir, save_filename="pytorch_model.bin", exclude_frozen_parameters=False):
        """The model's weights in one file, written by rank 0. False, with nothing written, when parameters are sharded and
        gather_16bit_weights_on_model_save is off. Collective when parameters are sharded: what goes wrong is then raised as CheckpointError
        on all ranks; otherwise only rank 0 has work, and raises what stops it."""
        self._refuse_half_loaded()
        self._refuse_without_states("save_16bit_model", "lp_params")
        if self._layout.shard_params:
            if not self.zero_gather_16bit_weights_on_model_save():
                return False
            state = self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        else:
            state = full_state_dict(self.module, self.global_rank == 0, exclude_frozen_parameters)

        def write():
            if self.global_rank == 0:
                os.makedirs(save_dir, exist_ok=True)
                with whole_file(os.path.join(save_dir, save_filename)) as file:
                    torch.save(state, file)

        if self._layout.shard_params:
            Ranks().together(write, f"saving to {os.path.join(save_dir, save_filename)}")
        else:
            write()
        return True

    save_fp16_model = save_16bit_model

    def module_state_dict(self, destination=None, prefix="", keep_vars=False, exclude_frozen_parameters=False):
        """module.state_dict(); refuses while parameters are sharded."""
        self._refuse_without_states("module_state_dict", "lp_params")
        self._refuse_half_loaded()
        state = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    state.pop(prefix + name, None)
        return state

    def load_module_state_dict(self, checkpoint, strict=True, custom_load_fn=None, fetch_z3_params=False):
        """Loads weights into the module (and the fp32 masters). At stage 3 rank 0's file counts for all."""
        from deepspeed.zero import GatheredParameters
        self._refuse_without_states("load_module_state_dict", "lp_params", "hp_params")
        state = checkpoint.get("module", checkpoint) if isinstance(checkpoint, dict) else checkpoint
        modifier = 0 if self._layout.shard_params else None
        with GatheredParameters(list(self.module.parameters()), modifier_rank=modifier):
            if custom_load_fn is not None:
                custom_load_fn(src=state, dst=self.module)
            else:
                self.module.load_state_dict(state, strict=strict)
        if self._managed is not None and not self._layout.shard_params:
            for unit in range(self._managed.store.units):
                self._managed.store.write_back(unit)
