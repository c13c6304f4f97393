# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: whole weights today; checkpoints that resume training say that they are not built yet."""
import os

import torch

from deepspeed.zero.consolidate import full_state_dict

_NOT_YET = ("{}: checkpoints are not built yet in this version. To keep the weights use engine.save_16bit_model(folder), or "
            "engine.module.state_dict() inside `with deepspeed.zero.GatheredParameters(engine.module.parameters()):`")


class CheckpointMethods:

    def save_checkpoint(self, save_dir, tag=None, client_state={}, save_latest=True, exclude_frozen_parameters=False):
        raise NotImplementedError(_NOT_YET.format("save_checkpoint"))

    def load_checkpoint(self, load_dir, tag=None, load_module_strict=True, load_optimizer_states=True, load_lr_scheduler_states=True,
                        load_module_only=False, custom_load_fn=None):
        raise NotImplementedError(_NOT_YET.format("load_checkpoint"))

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
        gather_16bit_weights_on_model_save is off."""
        if self._layout.shard_params:
            if not self.zero_gather_16bit_weights_on_model_save():
                return False
            state = self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        else:
            state = full_state_dict(self.module, self.global_rank == 0, exclude_frozen_parameters)
        if self.global_rank == 0:
            os.makedirs(save_dir, exist_ok=True)
            target = os.path.join(save_dir, save_filename)
            torch.save(state, target + ".part")
            os.replace(target + ".part", target)
        return True

    save_fp16_model = save_16bit_model

    def module_state_dict(self, destination=None, prefix="", keep_vars=False, exclude_frozen_parameters=False):
        """module.state_dict(); refuses while parameters are sharded."""
        state = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    state.pop(prefix + name, None)
        return state

    def load_module_state_dict(self, checkpoint, strict=True, custom_load_fn=None, fetch_z3_params=False):
        """Loads weights into the module (and the fp32 masters). At stage 3 rank 0's file counts for all."""
        from deepspeed.zero import GatheredParameters
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
