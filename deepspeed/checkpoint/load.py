# SPDX-License-Identifier: Apache-2.0
"""Loading: what of a checkpoint goes where is worked out, and refused if it does not fit, before anything changes."""
import torch

from deepspeed.checkpoint.filling import Filling
from deepspeed.checkpoint.optimizer_load import OptimizerLoad
from deepspeed.checkpoint.pieces import Piece
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.telemetry import logger

_WEIGHTS = ("fp32", "weight")
_LISTED = 20


class Loading:
    """One load of `source` into the model of `holdings`. plan() changes nothing; apply() fills. Both the same on every rank."""

    def __init__(self, source, holdings, strict=True, optimizer_states=True):
        self.source, self.holdings, self.strict = source, holdings, strict
        self.wants_states = optimizer_states and holdings.optimizer is not None
        self.notes = []          # what was not taken over, for the log
        self.weights = {}        # name in the model -> TensorInfo
        self.buffers = {}
        self.optimizer = None

    # ---- plan

    def plan(self):
        """CheckpointError, listing everything that does not fit, when loading is strict."""
        problems = self._match_weights() + self._match_buffers() + self._unexpected()
        if problems and self.strict:
            shown = problems[:_LISTED] + ([f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else [])
            raise CheckpointError(f"{self.source.path} does not fit the model (load_module_strict=False loads what fits):\n  " +
                                  "\n  ".join(shown))
        self.notes += problems
        if self.wants_states:
            self.optimizer = OptimizerLoad(self.source, self.holdings, {name: info.name for name, info in self.weights.items()}, self.notes)
            self.optimizer.plan()
        self.source.check()

    def _find(self, name, kinds):
        """The tensor of this name, or of another name of the same parameter, in the first kind there is."""
        for spelling in self.holdings.names.all_names(name):
            listed = self.source.canonical(spelling)
            for kind in kinds:
                info = self.source.tensors.get((listed, kind))
                if info is not None:
                    return info
        return None

    def _match_weights(self):
        problems = []
        for name, (kind, shape, _) in self.holdings.described().items():
            info = self._find(name, _WEIGHTS if kind == "fp32" else _WEIGHTS[::-1])
            if info is None:
                left_out = name in self.source.state.get("frozen_excluded", ())
                problems.append(f"parameter '{name}' is not in the checkpoint" + (" (saved with exclude_frozen_parameters)" if left_out else ""))
            elif info.shape != shape:
                problems.append(f"parameter '{name}' has shape {shape}, in the checkpoint {info.shape}")
            else:
                self.weights[name] = info
        return problems

    def _match_buffers(self):
        problems = []
        for name, buffer in self.holdings.names.buffers.items():
            info = self._find(name, ("buffer",))
            if info is None:
                problems.append(f"buffer '{name}' is not in the checkpoint")
            elif info.shape != tuple(buffer.shape):
                problems.append(f"buffer '{name}' has shape {tuple(buffer.shape)}, in the checkpoint {info.shape}")
            else:
                self.buffers[name] = info
        return problems

    def _unexpected(self):
        names = self.holdings.names
        known = {*names.parameters, *names.buffers, *names.aliases}
        known |= {info.name for info in (*self.weights.values(), *self.buffers.values())}
        found = [(name, kind) for name, kind in self.source.tensors if kind in (*_WEIGHTS, "buffer") and name not in known]
        if names.scope:
            found = [key for key in found if key[0].startswith(names.scope)]
        # A tied parameter is listed under one of its names.
        found = [key for key in found if not any(alias in known for alias, name in self.source.aliases.items() if name == key[0])]
        return [f"{'buffer' if kind == 'buffer' else 'parameter'} '{name}' is in the checkpoint, but not in the model" for name, kind in found]

    # ---- apply

    @torch.no_grad()
    def apply(self):
        """Fills this rank's memory. take_over() is to follow, on all ranks."""
        managed = self.holdings.managed
        filling = Filling(self.source, managed.leave_files if managed is not None and managed.tiers.in_files else None)
        for piece in self.holdings.weight_targets(self.weights.keys()):
            filling.add(self.weights[piece.name], piece)
        for name, info in self.buffers.items():
            self._fill_buffer(filling, self.holdings.names.buffers[name], info)
        if self.optimizer is not None:
            self.optimizer.fill(filling)
        filling.run()

    @staticmethod
    def _fill_buffer(filling, buffer, info):
        if buffer.is_contiguous():
            filling.add(info, Piece(info.name, "buffer", info.shape, (), 0, buffer.detach().view(-1)))
        else:
            buffer.copy_(filling.source.read(info.name, info.kind))

    @torch.no_grad()
    def take_over(self):
        """Collective: parameters follow their masters; gradients collected so far are forgotten. settle() is to follow, on all ranks."""
        managed = self.holdings.managed
        if managed is not None and managed.reducer is not None:
            managed.reducer.zero()
        self.holdings.take_over_masters()

    @torch.no_grad()
    def settle(self):
        """Counts, hyperparameters, and what modules keep besides tensors. Not collective: the model's own code runs here, and may raise."""
        if self.optimizer is not None:
            self.optimizer.finish()
        for name, owner in self.holdings.names.extra.items():
            saved = self.source.state.get("extra_state", {})
            if name in saved:
                owner.set_extra_state(saved[name])

    def say(self):
        """What was not taken over, once for the job."""
        if self.notes:
            more = f"\n  ... and {len(self.notes) - _LISTED} more" if len(self.notes) > _LISTED else ""
            logger.warning(f"{self.source.path} was loaded, except:\n  " + "\n  ".join(self.notes[:_LISTED]) + more)
