# SPDX-License-Identifier: Apache-2.0
"""What the engine is fed with: each rank's share of a data set, in a known order, resumable at the exact sample; easy samples first
(curriculum); fewer tokens in middle layers (random layer-token dropping); and the files that go with them."""

from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.data.loader", "DeepSpeedDataLoader", "RepeatingLoader"),
    **names("deepspeed.data.sampler", "ResumableDistributedSampler"),
    **names("deepspeed.data.curriculum", "CurriculumScheduler"),
    **names("deepspeed.data.curriculum_sampler", "DeepSpeedDataSampler"),
    **names("deepspeed.data.analyzer", "DataAnalyzer", "DistributedDataAnalyzer"),
    **names("deepspeed.data.indexed_dataset", "MMapIndexedDataset", "MMapIndexedDatasetBuilder", "make_builder", "make_dataset"),
    **names("deepspeed.data.token_drop", "RandomLayerTokenDrop", "convert_to_random_ltd", "save_without_random_ltd"),
    **names("deepspeed.data.token_drop_schedule", "RandomLTDScheduler"),
})
