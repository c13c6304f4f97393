# SPDX-License-Identifier: Apache-2.0
"""What the engine is fed with: data loaders, curricula, and layers that drop tokens."""
import torch.distributed as dist
from torch.utils.data import IterableDataset

from deepspeed.telemetry import logger


class DataSchedules:
    """What changes in the data path from step to step; the engine holds one only if something does."""

    def __init__(self, curriculum, passes_length, token_drop):
        self.curriculum, self.passes_length, self.token_drop = curriculum, passes_length, token_drop
        self.dropping_layers = 0
        self._warned = False

    def before_forward(self, step, keywords):
        """Moves to step (counted from 0) and adds what the model is told."""
        if self.curriculum is not None:
            difficulty = self.curriculum.update_difficulty(step + 1)
            if self.passes_length:
                keywords["curriculum_seqlen"] = difficulty
        if self.token_drop is not None:
            self.token_drop.update_seq(step)
            if not self.dropping_layers and not self._warned:
                self._warned = True
                logger.warning("data_efficiency.data_routing.random_ltd is on, but no layer drops tokens: call "
                               "deepspeed.data.convert_to_random_ltd(engine, LayerClass)")


class DataMethods:

    # ---- construction

    def _make_data_schedules(self):
        """None, unless a curriculum of the old form or token dropping is on."""
        from deepspeed.data import CurriculumScheduler, RandomLTDScheduler
        old, drop = self._config.curriculum_learning, self.random_ltd_config()
        curriculum = CurriculumScheduler(old) if old.enabled else None
        token_drop = RandomLTDScheduler({**drop.to_dict(), "global_batch_size": self.train_batch_size()}) if drop.enabled else None
        if curriculum is None and token_drop is None:
            return None
        return DataSchedules(curriculum, old.curriculum_type == "seqlen", token_drop)

    def deepspeed_io(self, dataset, batch_size=None, route="train", pin_memory=True, data_sampler=None, collate_fn=None,
                     num_local_io_workers=None):
        """A data loader over this rank's share of the dataset, in micro-batches.

        With data_efficiency's curriculum, the loader of route "train" follows it, with that section's workers and pinning.
        """
        from deepspeed.data import DeepSpeedDataLoader
        rank = dist.get_rank(self.data_parallel_group)
        batch_size = batch_size or self.train_micro_batch_size_per_gpu()
        if route == "train" and data_sampler is None and self.curriculum_learning_enabled():
            from deepspeed.data import DeepSpeedDataSampler
            if isinstance(dataset, IterableDataset):
                raise ValueError("data_efficiency.data_sampling.curriculum_learning chooses samples by number; a stream "
                                 f"({type(dataset).__name__}) has none: use a map-style data set, or the section curriculum_learning")
            sampling = self.data_sampling_config()
            data_sampler = DeepSpeedDataSampler(self._config.data_efficiency, len(dataset), batch_size, rank, self.dp_world_size,
                                                self.data_parallel_group, self.gradient_accumulation_steps(), self.global_rank,
                                                drop_last=self._config.dataloader_drop_last)
            pin_memory = sampling.pin_memory
            num_local_io_workers = sampling.num_workers if num_local_io_workers is None else num_local_io_workers
        loader = DeepSpeedDataLoader(dataset, batch_size, pin_memory=pin_memory, local_rank=self.local_rank,
                                     tput_timer=self.tput_timer if route == "train" else None,
                                     collate_fn=collate_fn or self.collate_fn, num_local_io_workers=num_local_io_workers,
                                     data_sampler=data_sampler, data_parallel_world_size=self.dp_world_size, data_parallel_rank=rank,
                                     dataloader_drop_last=self._config.dataloader_drop_last)
        loader.post_process_func = self._data_post_process
        return loader

    # ---- what callers set

    def set_data_post_process_func(self, function):
        """function(batch, state of the data loader's position) -> batch, for every batch of the training loader. Under data_efficiency's
        curriculum the state has "current_difficulties", by name of the measure."""
        self._data_post_process = function
        if self.training_dataloader is not None:
            self.training_dataloader.post_process_func = function

    def set_custom_curriculum_learning_schedule(self, schedule_func_dict):
        """Functions step -> difficulty (steps count from 1) by name of the measure; for the old section one function will do."""
        if self.curriculum_learning_enabled():
            sampler = getattr(self.training_dataloader, "data_sampler", None)
            if not hasattr(sampler, "set_custom_curriculum_learning_schedule"):
                raise AssertionError(
                    "set_custom_curriculum_learning_schedule: the engine has no data loader of its own; pass training_data to "
                    "initialize(), or call the method of that name on your DeepSpeedDataSampler")
            sampler.set_custom_curriculum_learning_schedule(schedule_func_dict)
        elif self.curriculum_scheduler is not None:
            if isinstance(schedule_func_dict, dict):
                schedule_func_dict = schedule_func_dict[self._config.curriculum_learning.curriculum_type]
            self.curriculum_scheduler.set_custom_get_difficulty(schedule_func_dict)
        else:
            raise AssertionError("set_custom_curriculum_learning_schedule: no curriculum is enabled in the configuration")

    # ---- schedules

    @property
    def curriculum_scheduler(self):
        """Of the section curriculum_learning; None when it is off."""
        return self._data_schedules.curriculum if self._data_schedules is not None else None

    curriculum_scheduler_legacy = curriculum_scheduler

    @property
    def random_ltd_scheduler(self):
        """Says how many tokens layers keep; None when random_ltd is off."""
        return self._data_schedules.token_drop if self._data_schedules is not None else None

    def random_ltd_layer_ids(self, layers):
        """Which of the model's `layers` layers drop tokens."""
        section = self.random_ltd_config()
        if not section.enabled:
            raise ValueError("convert_to_random_ltd: data_efficiency.data_routing.random_ltd.enabled is false")
        if layers != section.total_layer_num:
            raise ValueError(f"convert_to_random_ltd: the model has {layers} layers of this class, "
                             f"data_efficiency.data_routing.random_ltd.total_layer_num is {section.total_layer_num}")
        return list(section.random_ltd_layer_id)

    def random_ltd_initialize(self):
        """Starts token dropping in the layers that convert_to_random_ltd has wrapped."""
        from deepspeed.data.token_drop import configure_token_drop
        if self.random_ltd_scheduler is not None:
            self._data_schedules.dropping_layers = configure_token_drop(self.module, self.random_ltd_config(), self.random_ltd_scheduler)
            self.param_names = {parameter: name for name, parameter in self.module.named_parameters()}

    # ---- state

    def data_state_dict(self):
        """Where the data are, for a checkpoint: the same on every rank, independent of their number. Keys are there only for what is
        in use: "data_sampler" (the training loader), "curriculum", "random_ltd"."""
        parts = {"data_sampler": self.training_dataloader, "curriculum": self.curriculum_scheduler, "random_ltd": self.random_ltd_scheduler}
        return {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}

    def load_data_state_dict(self, state_dict):
        """Continues at the sample and the difficulty where the state was taken."""
        parts = {"data_sampler": self.training_dataloader, "curriculum": self.curriculum_scheduler, "random_ltd": self.random_ltd_scheduler}
        for name, part in parts.items():
            if hasattr(part, "load_state_dict") and state_dict.get(name) is not None:
                part.load_state_dict(state_dict[name])

    # ---- configuration

    def data_efficiency_enabled(self):
        return self._config.data_efficiency.enabled

    def data_efficiency_config(self):
        return self._config.data_efficiency

    def data_sampling_enabled(self):
        return self.data_sampling_config().enabled

    def data_sampling_config(self):
        return self._config.data_efficiency.data_sampling

    def curriculum_learning_config(self):
        return self.data_sampling_config().curriculum_learning

    def curriculum_learning_enabled(self):
        """Whether data_efficiency's curriculum chooses the samples."""
        return self.curriculum_learning_config().enabled

    def random_ltd_config(self):
        return self._config.data_efficiency.data_routing.random_ltd

    def random_ltd_enabled(self):
        return self.random_ltd_config().enabled

    def curriculum_enabled_legacy(self):
        """Whether the section curriculum_learning is on."""
        return self._config.curriculum_learning.enabled

    def curriculum_params_legacy(self):
        return self._config.curriculum_learning.to_dict()
