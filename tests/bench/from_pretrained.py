# SPDX-License-Identifier: Apache-2.0
"""from_pretrained under HfDeepSpeedConfig at stage 3: a Llama of 1.1 B parameters in bf16 safetensors, this library and DeepSpeed 0.19.8 in
alternation. --python, --pythonpath and --peer-path are those of hf_trainer.py; --model is a folder, filled when it is empty (2.2 GB).

    python tests/bench/from_pretrained.py --python HF/bin/python --peer-path FOLDER --model FOLDER2 --out load.json
"""
import argparse
import json
import os
import sys
import time

import resident
import running

WIDTH, LAYERS, VOCABULARY = 2048, 22, 32000
ALLOWANCE_BYTES = 500_000_000   # beside half the model and its largest tensor, for everything that a process needs
GB = 1e9


def make(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=5632, num_hidden_layers=LAYERS,
                                 num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048)).save_pretrained(
                                     folder, max_shard_size="500MB")


def load(folder):
    """On a rank. Figures of the slower or larger rank, and a checksum of one weight."""
    import torch.distributed as dist
    import deepspeed
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig
    deepspeed.init_distributed("gloo")
    keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1})
    before = resident.rss()
    resident.reset_peak()
    dist.barrier()
    begin = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder)
    dist.barrier()
    seconds, peak = time.perf_counter() - begin, resident.peak_rss()
    del keep
    one, sizes = model.model.layers[3].mlp.down_proj.weight, [getattr(p, "ds_numel", p.numel()) for p in model.parameters()]
    with deepspeed.zero.GatheredParameters([one]):
        total = one.double().sum().item()
    mine = {"seconds": seconds, "peak_bytes": peak, "before_bytes": before, "added_bytes": peak - before,
            "files_bytes": resident.files()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {key: max(rank[key] for rank in everyone) for key in mine}
    bar = 2 * sum(sizes) / dist.get_world_size() + 2 * max(sizes) + ALLOWANCE_BYTES
    if dist.get_rank() == 0:
        print("RESULT", json.dumps({**found, "bar_bytes": bar, "sum": total, "load": os.getloadavg(), "deepspeed": deepspeed.__version__}), flush=True)


def rounds(args):
    from hf_trainer import environment
    results = {"contenders": {}, "failed": {}}
    argv = [args.python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks), os.path.abspath(__file__),
            "--model", args.model, "--rank"]
    for number in range(args.rounds):
        for contender in map(running.Contender.parse, args.contenders.split(",")):
            with running.locked(args.lock):
                found = running.execute(argv, environment(args, contender), args.timeout)
            known = [run["sum"] for runs in results["contenders"].values() for run in runs]
            if known and found["sum"] != known[0]:
                raise running.Failed(f"not timed: {contender.name} loaded other weights")
            if found["deepspeed"].startswith("0.19") != (contender.lib == "deepspeed"):
                raise running.Failed(f"{contender.name} ran with version {found['deepspeed']} of the package")
            results["contenders"].setdefault(contender.name, []).append(found)
            print(f"round {number + 1}/{args.rounds} {contender.name}: {found['seconds']:.2f} s, peak {found['peak_bytes'] / GB:.3f} GB, "
                  f"before {found['before_bytes'] / GB:.3f} GB, load {found['load'][0]:.1f}", flush=True)
    return results


def report(results):
    names = list(results["contenders"])
    fields = {"seconds": 1, "peak_bytes": GB, "before_bytes": GB, "added_bytes": GB, "files_bytes": GB}
    rows = [[name, *(f"{running.median_of(results, name, field) / unit:.3f}" for field, unit in fields.items())] for name in names]
    print(running.table(["", "s", "peak, GB", "before, GB", "added, GB", "code, GB"], rows))
    bar = results["contenders"]["ours:3"][0]["bar_bytes"]
    peak = running.median_of(results, "ours:3", "peak_bytes")
    lines = [["peak of a rank, GB", f"{bar / GB:.3f}", f"{peak / GB:.3f}", running.verdict(peak, bar)]]
    theirs = running.median_of(results, "deepspeed:3", "seconds")
    if theirs:
        ratio = running.median_of(results, "ours:3", "seconds") / theirs
        lines.append(["seconds, ours / DeepSpeed", "0.333", f"{ratio:.3f}", running.verdict(ratio, 1 / 3)])
    print(running.table(["", "bar", "measured", ""], lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, "ours:3,deepspeed:3")
    parser.add_argument("--peer-path", help="folder where the peer is installed")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return load(args.model)
    if args.make:
        return make(args.model)
    if not os.path.exists(os.path.join(args.model, "config.json")):
        import subprocess
        subprocess.run([args.python, os.path.abspath(__file__), "--make", "--model", args.model], check=True)
    if not args.peer_path:
        args.contenders = "ours:3"
    results = rounds(args)
    report(results)
    running.save(args, {**results, "machine": running.machine(), "arguments": vars(args)})


if __name__ == "__main__":
    sys.exit(main())
