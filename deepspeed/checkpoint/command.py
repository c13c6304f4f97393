# SPDX-License-Identifier: Apache-2.0
"""ds_checkpoint: what is inside a checkpoint, whether it is whole, what differs between two, and weights for other programs."""
import argparse
import os
import sys
import time

from deepspeed.checkpoint.location import is_tag_folder, open_checkpoint, tag_folder, tags
from deepspeed.checkpoint.source import CheckpointError


def main(arguments=None):
    """The console command; returns its exit status: 0, or 1 for damage, differences and errors."""
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.run(chosen)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, CheckpointError) as error:
        print(f"ds_checkpoint: {error}", file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(prog="ds_checkpoint", description="Looks into checkpoints: those of this library, of DeepSpeed (stages 0 to 3) and "
                                     "its universal format.")
    commands = parser.add_subparsers(required=True, metavar="ls|verify|diff|convert")

    def command(name, run, text, folders=("folder",)):
        sub = commands.add_parser(name, help=text, description=text)
        for folder in folders:
            sub.add_argument(folder, help="folder given to save_checkpoint, or of one tag")
        if folders == ("folder",):
            sub.add_argument("-t", "--tag", help="which checkpoint (default: what 'latest' says)")
        sub.set_defaults(run=run)
        return sub

    ls = command("ls", _ls, "Lists the checkpoints in a folder; with a tag, the tensors of one.")
    ls.add_argument("-k", "--kind", action="append", help="only tensors of this kind (fp32, weight, buffer, exp_avg, ...); may be repeated")
    verify = command("verify", _verify, "Reads everything and compares it with the checksums.")
    verify.add_argument("-a", "--all", action="store_true", help="every checkpoint in the folder")
    command("diff", _diff, "Compares two checkpoints tensor by tensor, whatever wrote them and with however many ranks.", ("first", "second"))
    convert = command("convert", _convert, "Writes the weights (or all state, in the universal format) for other programs.")
    convert.add_argument("output", help="folder to write to")
    convert.add_argument("--to", choices=("safetensors", "torch", "universal"), default="safetensors",
                         help="safetensors: what transformers' from_pretrained loads; torch: pytorch_model.bin; universal: DeepSpeed's universal checkpoint")
    convert.add_argument("--dtype", help="of floating-point weights: fp32, bf16, fp16 (default: as stored, masters in fp32)")
    convert.add_argument("--max-shard-size", "--max_shard_size", default="5GB", help="largest size of one file (default: 5GB)")
    convert.add_argument("--exclude-frozen", action="store_true", help="leave out weights that were not trained")
    return parser


# ---- ls

def _ls(chosen):
    if chosen.tag is None and not is_tag_folder(chosen.folder) and os.path.isdir(chosen.folder):
        return _list_tags(chosen.folder)
    source = open_checkpoint(chosen.folder, chosen.tag)
    print(f"{source.path}\n{describe(source)}\n")
    rows = [(name, kind, info.dtype, _shape(info.shape), size_text(info.nbytes), len(info.pieces))
            for (name, kind), info in source.tensors.items() if kind != "object" and (not chosen.kind or kind in chosen.kind)]
    print(table(("tensor", "kind", "dtype", "shape", "size", "pieces"), rows, right=(4, 5)))
    for alias, name in source.aliases.items():
        print(f"{alias} is tied to {name}")
    if getattr(source, "unnamed", None):
        print(f"\nnote: {source.unnamed}")
    return 0


def _list_tags(folder):
    latest = _latest(folder)
    rows = []
    for tag in tags(folder):
        path = os.path.join(folder, tag)
        try:
            text = describe(open_checkpoint(path))
        except CheckpointError as error:
            text = f"cannot be read: {error}"
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.stat(path).st_mtime))
        rows.append(("*" if tag == latest else "", tag, written, size_text(_folder_bytes(path)), text))
    if not rows:
        raise CheckpointError(f"{folder}: holds no checkpoint")
    print(table(("", "tag", "written", "size", "holds"), rows, right=(3,)))
    print("* is what 'latest' names" if latest in [row[1] for row in rows] else "'latest' names none of them")
    return 0


def _latest(folder):
    try:
        return os.path.basename(tag_folder(folder))
    except CheckpointError:
        return None


def describe(source):
    """One line: who wrote it, at which step, how many parameters and optimizer states."""
    parameters, seen, states = 0, set(), set()
    for (name, kind), info in source.tensors.items():
        if kind in ("fp32", "weight") and name not in seen:
            seen.add(name)
            parameters += info.numel
        elif kind not in ("fp32", "weight", "buffer", "object"):
            states.add(kind)
    document = getattr(source, "document", None)
    # Of ours the manifest's own text will do: decoding the state may need torch.
    state = document.get("state", {}) if document is not None else source.state
    step = (state.get("counters") or {}).get("global_steps")
    writer = getattr(source, "origin", None) or f"this library's format, {source.world_size} rank{'s' * (source.world_size != 1)}"
    words = [writer] + ([f"step {step}"] if step is not None else [])
    words.append(f"{parameters:,} parameters")
    words.append("states: " + ", ".join(sorted(states)) if states else "no optimizer states")
    return "; ".join(words)


# ---- verify, diff, convert

def _verify(chosen):
    folders = [os.path.join(chosen.folder, tag) for tag in tags(chosen.folder)] if chosen.all else [tag_folder(chosen.folder, chosen.tag)]
    damaged = 0
    for folder in folders:
        try:
            source = open_checkpoint(folder)
            source.check()
            problems = source.verify()
        except CheckpointError as error:
            problems = [str(error)]
        for problem in problems:
            print(problem)
        print(f"{folder}: {'DAMAGED' if problems else 'good'}")
        damaged += bool(problems)
    return 1 if damaged else 0


def _diff(chosen):
    from deepspeed.checkpoint.compare import compared_bytes, differences
    from deepspeed.checkpoint.recover import progress_bar
    first, second = open_checkpoint(chosen.first), open_checkpoint(chosen.second)
    with progress_bar(compared_bytes(first, second), "compared") as advance:
        found = differences(first, second, advance)
    if found:
        print(table(("tensor", "kind", "difference"), found))
    else:
        print(f"{len([key for key in first.tensors if key[1] != 'object'])} tensors are the same, bit for bit or value for value")
    return 1 if found else 0


def _convert(chosen):
    from deepspeed.checkpoint.export.elements import dtype_named
    from deepspeed.checkpoint.export.stream import nbytes
    from deepspeed.checkpoint.recover import progress_bar
    source = open_checkpoint(chosen.folder, chosen.tag)
    if chosen.to == "universal":
        from deepspeed.checkpoint.export.universal import universal_bytes, write_universal
        if chosen.dtype or chosen.exclude_frozen:
            raise ValueError("--dtype and --exclude-frozen are for weights; the universal format holds everything in fp32")
        with progress_bar(universal_bytes(source), "universal") as advance:
            write_universal(source, chosen.output, advance)
        print(f"{chosen.output}: written; latest_universal beside it names it")
        return 0
    from deepspeed.checkpoint.export.shards import parse_size, write_weights
    from deepspeed.checkpoint.export.weights import Weights
    dtype, limit = dtype_named(chosen.dtype), parse_size(chosen.max_shard_size)
    weights = Weights(source, chosen.exclude_frozen)
    with progress_bar(sum(nbytes(tensor, dtype) for tensor in weights.tensors.values()), "weights") as advance:
        for path in write_weights(weights, chosen.output, dtype, limit, chosen.to == "safetensors", advance):
            print(f"{path}: {size_text(os.path.getsize(path))}")
    return 0


# ---- text

def table(head, rows, right=()):
    """Columns as wide as their longest entry."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row):
        return "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def size_text(count):
    """Bytes in words: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000


def _shape(shape):
    return "x".join(map(str, shape)) if shape else "scalar"


def _folder_bytes(folder):
    return sum(os.path.getsize(os.path.join(base, file)) for base, _, files in os.walk(folder) for file in files)


if __name__ == "__main__":
    sys.exit(main())
