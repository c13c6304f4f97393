# SPDX-License-Identifier: Apache-2.0
"""A curriculum that stops and goes on: texts are measured once, short ones are trained on first.

    deepspeed --num_gpus 2 examples/data.py
"""
import argparse
import shutil
import tempfile

import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed.data import DistributedDataAnalyzer


class Texts(torch.utils.data.Dataset):
    """2,000 lists of numbers, 1 to 64 long."""

    def __len__(self):
        return 2000

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (int(torch.randint(1, 65, (), generator=generator)), ), generator=generator)


def length(batch):
    return torch.tensor([len(text) for text in batch])


def padded(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True)


class Model(nn.Module):

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 32), nn.Linear(32, 1)

    def forward(self, texts):
        return self.head(self.embed(texts).mean(1)).square().mean()


def configuration(folder):
    metric = {
        "index_to_sample_path": f"{folder}/length/length_index_to_sample", "index_to_metric_path":
        f"{folder}/length/length_index_to_metric", "difficulty_type": "value", "clustering_type": "schedule_based", "min_difficulty": 16,
        "max_difficulty": 64, "schedule_type": "fixed_linear", "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 8}
    }
    return {
        "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params":
                                                           {"lr": 1e-3}}, "zero_optimization": {"stage": 3}, "data_efficiency":
        {"data_sampling": {"num_epochs": 10, "curriculum_learning": {"enabled": True, "curriculum_metrics": {"length": metric}}}}
    }


def train(folder, steps, state=None):
    """A few steps of a fresh job; what it saved is where its data were."""
    engine, _, loader, _ = deepspeed.initialize(model=Model(), training_data=Texts(), collate_fn=padded, config=configuration(folder))
    if state is not None:
        engine.load_data_state_dict(state)
    told = {}
    engine.set_data_post_process_func(lambda batch, position: told.update(position["current_difficulties"]) or batch)
    for _, batch in zip(range(steps), loader):
        engine.backward(engine(batch))
        engine.step()
        longest = [None] * dist.get_world_size()
        dist.all_gather_object(longest, batch.shape[1])
        if dist.get_rank() == 0:
            print(f"up to {told['length']} allowed, longest text of each rank: {longest}, samples so far: "
                  f"{engine.data_state_dict()['data_sampler']['consumed_samples']}")
    return engine.data_state_dict()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed()
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    DistributedDataAnalyzer(Texts(), batch_size=64, collate_fn=list, metric_names=["length"], metric_functions=[length],
                            metric_types=["single_value_per_sample"], save_path=folder[0]).run_map_reduce()
    state = train(folder[0], 4)
    if dist.get_rank() == 0:
        print("--- another job goes on")
    train(folder[0], 4, state)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


if __name__ == "__main__":
    main()
