# SPDX-License-Identifier: Apache-2.0
"""Saving and loading the state of Adam training (fp32 weights and two states, 12 bytes a parameter), beside torch.save, the peer's
save_checkpoint, and what dd reaches on the same disk, and bare system calls in memory, in the same run. What two ranks left is loaded by one, DeepSpeed's own
folder too, beside ds_to_universal and DeepSpeed's load of its result.

    python tests/bench/checkpoint.py --folder /data/scratch --tmpfs /dev/shm [--peer-python PYTHON] [--million 300] [--reshard-million 60]

Every time ends when the bytes are durable: all writers end with fsync. A loaded state is compared with the saved one before its time
counts. Figures are medians of --rounds; each contender runs in processes of its own, one after the other.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LAYERS = 12


# ------------------------------------------------------------------------------------------------- inside a contender


def model_of(million):
    import torch
    width = int((million * 1e6 / LAYERS)**0.5)
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)]), width


def sync_files(folder):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def timed(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def engine_of(lib, million, stage, background=False):
    import deepspeed
    import torch
    if lib == "deepspeed":
        deepspeed.init_distributed("gloo")
    model, width = model_of(million)
    cfg = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": 0,
           "zero_allow_untested_optimizer": True, "checkpoint": {"writer": {"decoupled": True}} if background else {}}
    engine = deepspeed.initialize(model=model, config=cfg, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4))[0]
    engine.backward(engine(torch.ones(1, width)).square().mean())
    engine.step()
    return engine


def values_of(engine):
    """A sum over the bits of every tensor of the state, the same for any layout."""
    import torch
    import torch.distributed as dist
    total = torch.zeros(1, dtype=torch.int64)
    for index, held in enumerate(engine.optimizer.slices):
        for value in (held.master, *engine.optimizer.stepper.native.states(index)):
            total += value.view(torch.int32).sum(dtype=torch.int64)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.item()


def weights_of(engine):
    """The same of whole weights, in either library."""
    import torch
    return sum(p.detach().view(torch.int32).sum(dtype=torch.int64).item() for p in engine.module.parameters())


def measure_ours(args):
    engine = engine_of("ours", args.million, 1)
    before, peak = values_of(engine), peak_mib()
    found = {"save_s": [], "load_s": []}
    for round_ in range(args.rounds):
        shutil.rmtree(args.folder, ignore_errors=True)
        found["save_s"].append(timed(lambda: engine.save_checkpoint(args.folder)))
        for index, held in enumerate(engine.optimizer.slices):
            for value in (held.master, *engine.optimizer.stepper.native.states(index)):
                value.zero_()
        found["load_s"].append(timed(lambda: engine.load_checkpoint(args.folder)))
        if values_of(engine) != before:
            raise SystemExit("not timed: another state came back than was saved")
    found["bytes"] = sum(p.stat().st_size for p in Path(args.folder).rglob("*") if p.is_file())
    found["memory_above_training_mib"] = peak_mib() - peak
    return found


def measure_background(args):
    import torch
    engine = engine_of("ours", args.million, 1, background=True)
    width = engine.module[0].in_features
    found = {"stall_s": [], "whole_s": []}
    for round_ in range(args.rounds):
        shutil.rmtree(args.folder, ignore_errors=True)
        begin = time.perf_counter()
        found["stall_s"].append(timed(lambda: engine.save_checkpoint(args.folder)))
        engine._finish_save()
        found["whole_s"].append(time.perf_counter() - begin)
    engine.backward(engine(torch.ones(1, width)).square().mean())
    engine.destroy()
    return found


def measure_torch(args):
    import torch
    model, _ = model_of(args.million)
    state = {name: p.detach() for name, p in model.named_parameters()}
    for kind in ("exp_avg", "exp_avg_sq"):
        state.update({f"{kind}.{name}": torch.rand_like(p) for name, p in model.named_parameters()})
    found = {"save_s": []}

    def save():
        with open(os.path.join(args.folder, "state.pt"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    for round_ in range(args.rounds):
        shutil.rmtree(args.folder, ignore_errors=True)
        os.makedirs(args.folder)
        found["save_s"].append(timed(save))
    return found


def measure_peer(args):
    engine = engine_of("deepspeed", args.million, 1)
    found = {"save_s": [], "load_s": []}
    for round_ in range(args.rounds):
        shutil.rmtree(args.folder, ignore_errors=True)

        def save():
            engine.save_checkpoint(args.folder)
            sync_files(args.folder)

        found["save_s"].append(timed(save))
        found["load_s"].append(timed(lambda: engine.load_checkpoint(args.folder)))
    return found


def leave_checkpoint(args):
    """On all ranks of a job: something to load on fewer."""
    engine = engine_of(args.lib, args.million, 2)
    engine.save_checkpoint(args.folder)
    return {"values": values_of(engine) if args.lib == "ours" else None, "weights": weights_of(engine)}


def load_on_one(args):
    engine = engine_of(args.lib, args.million, 2)
    import torch
    with torch.no_grad():  # whatever is not loaded shows
        for p in engine.module.parameters():
            p.zero_()
        for index, held in enumerate(engine.optimizer.slices):
            for value in (held.master, *engine.optimizer.stepper.native.states(index)):
                value.zero_()
    return {"load_s": [timed(lambda: engine.load_checkpoint(args.folder))], "values": values_of(engine), "weights": weights_of(engine)}


def load_universal(args):
    """In an engine that is told so; the conversion is timed by the caller."""
    import deepspeed
    import torch
    deepspeed.init_distributed("gloo")
    model, width = model_of(args.million)
    cfg = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
           "checkpoint": {"load_universal": True}}
    engine = deepspeed.initialize(model=model, config=cfg, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4))[0]
    return {"load_s": [timed(lambda: engine.load_checkpoint(args.folder, tag="universal"))], "weights": weights_of(engine)}


WORK = {"ours": measure_ours, "background": measure_background, "torch": measure_torch, "deepspeed": measure_peer, "leave": leave_checkpoint,
        "load": load_on_one, "load_universal": load_universal}


def worker(args):
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.work != "torch":
        import deepspeed
        deepspeed.init_distributed("gloo")
    result = WORK[args.work](args)
    if int(os.environ.get("RANK", 0)) == 0:
        print("RESULT " + json.dumps(result), flush=True)


# ------------------------------------------------------------------------------------------------------ the comparison


def start(args, work, lib, folder, million, ranks=1):
    python = args.peer_python if lib == "deepspeed" else sys.executable
    env = dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(args.threads))
    if lib == "deepspeed":
        env.pop("PYTHONPATH", None)
        env["PATH"] = f"{Path(args.peer_python).parent}{os.pathsep}{env['PATH']}"
    argv = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__, "--work", work, "--lib", lib,
            "--folder", str(folder), "--million", str(million), "--rounds", str(args.rounds)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=1200)
    for line in done.stdout.splitlines():
        if "RESULT {" in line:
            return json.loads(line[line.index("{"):])
    raise SystemExit(f"{work} of {lib} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")


def dd(folder, numbytes):
    """GB/s of dd past the page cache; None where the file system has no such thing (tmpfs)."""
    path = os.path.join(folder, "dd.out")
    argv = ["dd", "if=/dev/zero", f"of={path}", "bs=4M", f"count={numbytes >> 22}", "oflag=direct", "conv=fsync"]
    begin = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    took_s = time.perf_counter() - begin
    if os.path.exists(path):
        os.unlink(path)
    return (numbytes >> 22 << 22) / took_s / 1e9 if done.returncode == 0 else None


def bare(folder, numbytes, threads):
    """GB/s of write(2) alone from filled memory, each thread to a file of its own, in the calls that we make: what no writer can pass."""
    import torch
    window = 256 << 10
    each = numbytes // threads // window * window
    memory = memoryview(torch.ones(each * threads // 4).view(torch.uint8).numpy())
    paths = [os.path.join(folder, f"bare{n}.out") for n in range(threads)]

    def write(n):
        handle = os.open(paths[n], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for at in range(0, each, window):
            if os.pwrite(handle, memory[n * each + at:n * each + at + window], at) != window:
                raise SystemExit(f"{folder} is full")
        os.fsync(handle)
        os.close(handle)

    took_s = []
    for _ in range(3):
        workers = [threading.Thread(target=write, args=(n,)) for n in range(threads)]
        took_s.append(timed(lambda: [[w.start() for w in workers], [w.join() for w in workers]]))
        for path in paths:
            os.unlink(path)
    return each * threads / min(took_s) / 1e9


def copying(numbytes, threads):
    """GB/s of copying memory to filled memory."""
    import torch
    torch.set_num_threads(threads)
    source, target = torch.ones(numbytes // 4), torch.ones(numbytes // 4)
    took_s = [timed(lambda: target.copy_(source)) for _ in range(3)]
    return numbytes / min(took_s) / 1e9


def say(label, seconds, numbytes, beside=""):
    middle = statistics.median(seconds)
    print(f"  {label:<34} {middle:7.2f} s  {numbytes / middle / 1e9:6.2f} GB/s   (each: {', '.join(f'{s:.2f}' for s in seconds)}) {beside}", flush=True)
    return middle


def bare_ceiling(args, folder, size):
    """In a process of its own, whose memory is gone before others begin."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import checkpoint as c; " \
           f"print([c.bare({str(folder)!r}, {size}, n) for n in (1, {args.threads})] + [c.copying({size // 4}, n) for n in (1, {args.threads})])"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def compare_saving(args, place, folder):
    size = int(args.million * 12e6)
    print(f"{place}: {args.million:g} M parameters, {size / 1e9:.2f} GB")
    work = Path(folder) / "checkpoint_bench"
    in_memory = place == "memory"
    ceiling = bare_ceiling(args, folder, size) if in_memory else [dd(folder, size)]
    ours = start(args, "ours", "ours", work, args.million)
    if not in_memory:
        ceiling.append(dd(folder, size))
    save = say("ours, save", ours["save_s"], size)
    say("ours, load (checked)", ours["load_s"], size, f"memory above training {ours['memory_above_training_mib']:.0f} MiB")
    if in_memory:
        print(f"  write(2) alone: {ceiling[0]:.2f} GB/s from one thread, {ceiling[1]:.2f} from {args.threads}; ours is "
              f"{size / save / 1e9 / ceiling[1]:.2f} of that; copying memory: {ceiling[2]:.2f} and {ceiling[3]:.2f}")
    elif ceiling[0] is not None:
        best = max(ceiling)
        print(f"  dd with O_DIRECT before and after: {ceiling[0]:.2f}, {ceiling[1]:.2f} GB/s; ours is {size / save / 1e9 / best:.2f} of the faster")
    background = start(args, "background", "ours", work, args.million)
    stall = say("ours, in the background: the stall", background["stall_s"], size)
    plain = say("torch.save and fsync", start(args, "torch", "torch", work, args.million)["save_s"], size)
    print(f"  torch.save takes {plain / save:.1f} x ours")
    if args.peer_python:
        peer = start(args, "deepspeed", "deepspeed", work, args.million)
        whole = say("DeepSpeed, save and fsync", peer["save_s"], size)
        say("DeepSpeed, load", peer["load_s"], size)
        print(f"  DeepSpeed takes {whole / save:.1f} x ours; the stall in the background is {whole / stall:.1f} x shorter than its save")
    shutil.rmtree(work, ignore_errors=True)


def compare_resharding(args, folder):
    million = args.reshard_million
    print(f"2 ranks -> 1: {million:g} M parameters")
    work = Path(folder) / "reshard_bench"
    size = int(million * 12e6)
    saved = start(args, "leave", "ours", work / "ours", million, ranks=2)
    loaded = start(args, "load", "ours", work / "ours", million)
    if (saved["values"], saved["weights"]) != (loaded["values"], loaded["weights"]):
        raise SystemExit("not timed: another state came back than was saved")
    mine = say("ours: load", loaded["load_s"], size)
    if args.peer_python:
        saved = start(args, "leave", "deepspeed", work / "peer", million, ranks=2)
        foreign = start(args, "load", "ours", work / "peer", million)
        if foreign["weights"] != saved["weights"]:
            raise SystemExit("not timed: other weights came back from DeepSpeed's folder than it saved")
        mine_foreign = say("ours: load of DeepSpeed's folder", foreign["load_s"], size)
        tag = (work / "peer" / "latest").read_text()
        argv = [args.peer_python, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(work / "peer" / tag), "--output_folder",
                str(work / "peer" / "universal"), "--num_extract_workers", "2", "--num_merge_workers", "2", "--inject_missing_state"]
        env = dict(os.environ, DS_ACCELERATOR="cpu")
        env.pop("PYTHONPATH", None)
        convert = timed(lambda: subprocess.run(argv, env=env, cwd=work, check=True, capture_output=True))   # not here, where -m would find ours
        load = start(args, "load_universal", "deepspeed", work / "peer", million)["load_s"][0]
        theirs = say("DeepSpeed: ds_to_universal + load", [convert + load], size, f"({convert:.1f} s + {load:.1f} s)")
        print(f"  {theirs / mine:.1f} x ours from our folder, {theirs / mine_foreign:.1f} x ours from DeepSpeed's own folder")
    shutil.rmtree(work, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a disk")
    parser.add_argument("--tmpfs", help="a folder in memory, measured too")
    parser.add_argument("--peer-python", help="interpreter that has DeepSpeed 0.19.8")
    parser.add_argument("--million", type=float, default=300)
    parser.add_argument("--reshard-million", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["saving", "resharding"])
    parser.add_argument("--work", choices=sorted(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--lib", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        worker(args)
        return
    for place, folder in (("memory", args.tmpfs), ("disk", args.folder)) if args.only != "resharding" else ():
        if folder:
            compare_saving(args, place, folder)
    if args.only != "saving":
        compare_resharding(args, args.folder)


if __name__ == "__main__":
    main()
