# SPDX-License-Identifier: Apache-2.0
"""An ordinary Hugging Face Trainer script (hf_script.py) on two ranks: this library, DeepSpeed 0.19.8 and DDP, in alternation.

    python tests/bench/hf_trainer.py --python HF/bin/python --peer-path FOLDER --dtype bf16 --out trainer.json

HF/bin/python has transformers and accelerate; --pythonpath DIR names this library where it is not installed there. FOLDER holds the peer
(`pip install --no-deps --target FOLDER deepspeed==0.19.8 hjson msgpack einops py-cpuinfo ninja`) and takes this library's place.
Refused when losses differ from DDP's: by more than 1e-5 of them in fp32, 1 % in bf16, which DDP computes under autocast.
"""
import argparse
import json
import os
import statistics
import tempfile
import time

import running

CONTENDERS = "ddp,ours:2,deepspeed:2,ours:3,deepspeed:3"
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
MIB = 2**20
AUTO = {key: "auto" for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")}
FIELDS = {"median_s": "step, ms", "train_s": "train(), s", "total_s": "launch to end, s", "peak_bytes": "peak, MiB",
          "peak_over_imports_bytes": "peak over imports, MiB"}


def configuration(stage):
    zero = {"stage": stage, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero.update(stage3_prefetch_bucket_size="auto", stage3_param_persistence_threshold="auto")
    return {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **AUTO}


def environment(args, contender):
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
               TRANSFORMERS_VERBOSITY="error", BENCH_LAUNCHED_AT=str(time.time()))
    path = {"ours": args.pythonpath, "deepspeed": args.peer_path}.get(contender.lib, "")
    env.pop("PYTHONPATH", None)
    if path:
        env["PYTHONPATH"] = os.path.abspath(path)
    if contender.lib == "deepspeed":  # builds an operator at first use with its own ninja
        env["PATH"] = os.pathsep.join([os.path.join(os.path.abspath(path), "bin"), os.path.dirname(args.python), env["PATH"]])
    return env


def one_run(args, contender):
    with tempfile.TemporaryDirectory() as folder, running.locked(args.lock):
        argv = [args.python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks),
                str(running.HERE / "hf_script.py"), "--use_cpu", "--output_dir", folder, "--max_steps", str(args.steps), "--logging_steps", "1",
                "--per_device_train_batch_size", str(args.batch), "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True",
                "--bf16", str(args.dtype == "bf16")]
        if contender.staged:
            path = os.path.join(folder, "ds_config.json")
            with open(path, "w") as file:
                json.dump(configuration(contender.stage), file)
            argv += ["--deepspeed", path]
        result = running.execute(argv, environment(args, contender), args.timeout)
    if contender.staged and (result["deepspeed"] or "").startswith("0.19") != (contender.lib == "deepspeed"):
        raise running.Failed(f"{contender.name} ran with version {result['deepspeed']} of the package")
    return result


def refuse(args, result, wanted):
    """Nothing is compared that trained something else."""
    off = max(abs(a - b) / abs(b) for a, b in zip(result["losses"], wanted, strict=True))
    if off > TOLERANCE[args.dtype]:
        raise running.Failed(f"not timed: losses are off by {off:.1e} of DDP's")


def rounds(args, contenders):
    results = {"contenders": {c.name: [] for c in contenders}, "failed": {}}
    wanted = None
    for number in range(args.rounds):
        for contender in (c for c in contenders if c.name not in results["failed"]):
            try:
                found = one_run(args, contender)
                wanted = wanted or found["losses"]
                refuse(args, found, wanted)
            except running.Failed as problem:
                results["failed"][contender.name] = str(problem)
                print(f"{contender.name} failed: {problem}", flush=True)
                continue
            results["contenders"][contender.name].append(found)
            print(f"round {number + 1}/{args.rounds} {contender.name}: {1e3 * found['median_s']:.1f} ms a step, train {found['train_s']:.2f} s, "
                  f"peak {found['peak_bytes'] / MIB:.0f} MiB, load {found['load'][0]:.1f}", flush=True)
    results["contenders"] = {name: runs for name, runs in results["contenders"].items() if runs}
    return results


def rows(results):
    for name, runs in results["contenders"].items():
        row = [name]
        for field in FIELDS:
            value = statistics.median(run[field] for run in runs)
            row.append(f"{value / MIB:.0f}" if field.endswith("bytes") else f"{1e3 * value:.1f}" if field == "median_s" else f"{value:.2f}")
        yield row + [f"{min(run['train_s'] for run in runs):.2f} to {max(run['train_s'] for run in runs):.2f}"]


def bars(results):
    """Faster, and less memory, than the peer at the same stage."""
    lines = []
    for stage in (2, 3):
        for field in ("train_s", "total_s", "peak_bytes", "peak_over_imports_bytes"):
            ours, theirs = (running.median_of(results, f"{lib}:{stage}", field) for lib in ("ours", "deepspeed"))
            ratio = ours / theirs if ours and theirs else None
            lines.append([f"stage {stage}, {FIELDS[field]}, ours / DeepSpeed", "< 1", "-" if ratio is None else f"{ratio:.2f}",
                          running.verdict(ratio, 1.0)])
    return running.table(["ratio of medians", "bar", "measured", ""], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, CONTENDERS)
    parser.add_argument("--peer-path", help="folder where the peer is installed")
    parser.add_argument("--dtype", choices=TOLERANCE, default="fp32")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2, help="samples of 128 tokens a rank")
    args = parser.parse_args()
    contenders = [c for c in map(running.Contender.parse, args.contenders.split(",")) if c.lib != "deepspeed" or args.peer_path]
    results = rounds(args, contenders)
    print(f"\n### Trainer, Llama d256 L8, {args.dtype}, {args.batch} × 128 tokens a rank, {args.steps} steps, {args.ranks} ranks\n")
    print(running.table(["", *FIELDS.values(), "train() of the rounds, s"], rows(results)) + "\n\n" + bars(results) + running.failures(results))
    running.save(args, {"machine": running.machine(), "dtype": args.dtype, **results})


if __name__ == "__main__":
    main()
