# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and occupancy of every CUDA kernel, as the assembler reports them. Needs nvcc and c++filt, no GPU.

    python tests/gpu/registers.py [--out docs/benchmarks/registers.md] [--jobs 2] [--logs build/registers]

Exit code 1 if a kernel spills. Logs that are newer than their sources are read again instead of compiled again.
"""
import argparse
import concurrent.futures
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
ARCHITECTURES = ("80", "90")
FLAGS = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler=-fPIC", "-Xptxas=-v", "-c", "-o", "/dev/null",
         *(f"--generate-code=arch=compute_{a},code=[sm_{a}]" for a in ARCHITECTURES)]
REGISTERS, MOST_WARPS = 65536, 64  # of a multiprocessor of either architecture


class Kernel(NamedTuple):
    file: str
    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    threads: int

    @property
    def occupancy(self):
        """Share of a multiprocessor's warps that its registers allow; a warp gets them by 256."""
        of_warp = -(-self.registers * 32 // 256) * 256
        warps = self.threads // 32
        blocks = min(REGISTERS // of_warp // warps, MOST_WARPS // warps)
        return blocks * warps / MOST_WARPS


def compile_log(source, folder):
    """What the assembler says of a source file."""
    log = folder / (source.relative_to(KERNELS).as_posix().replace("/", "_") + ".log")
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*h"))
    if not log.exists() or log.stat().st_mtime < max(newest, source.stat().st_mtime):
        done = subprocess.run(["nvcc", *FLAGS, str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{source}: {done.stderr}")
        log.write_text(done.stdout + done.stderr)
    return log.read_text()


def demangled(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def kernels_of(file, log):
    """The report's kernels, in its order."""
    found, entry, frame = [], None, (0, 0, 0)
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", line):
            entry = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame = tuple(map(int, match.groups()))
        elif (match := re.search(r"Used (\d+) registers", line)) and entry:
            found.append((*entry, int(match.group(1)), frame[0], frame[1] + frame[2]))
            entry = None
    for mangled, (_, architecture, registers, stack, spilled) in zip(demangled([f[0] for f in found]), found):
        name = re.sub(r"ds::kernels::|\(anonymous namespace\)::|cuda::|quant::", "", mangled)
        name = re.sub(r"^void ", "", name)
        threads = 512 if re.search(r"walk_kernel<Walk<\w+, \(Norm\)\d, 512,", name) else 256
        yield Kernel(file, name, architecture, registers, stack, spilled, threads)


def family(kernel):
    """A template's name, with that of the body it runs."""
    name = kernel.name.split("(")[0] if "<" not in kernel.name else kernel.name
    match = re.match(r"(\w+)(?:<(\w+))?", name)
    return f"{match.group(1)}<{match.group(2)}>" if match.group(1) == "tile_kernel" else match.group(1)


def span(values, show):
    low, high = min(values), max(values)
    return show(low) if low == high else f"{show(low)}–{show(high)}"


def table(kernels):
    groups = defaultdict(list)
    for k in kernels:
        groups[k.file, family(k), k.architecture].append(k)
    lines = ["| file | kernel | sm | forms | registers | spilled bytes | stack bytes | occupancy by registers |", "|---|---|---|---|---|---|---|---|"]
    for (file, name, architecture), group in sorted(groups.items()):
        lines.append(f"| {file} | `{name}` | {architecture} | {len(group)} | {span([k.registers for k in group], str)} | {max(k.spilled for k in group)} "
                     f"| {max(k.stack for k in group)} | {span([k.occupancy for k in group], lambda x: f'{x:.0%}')} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "registers.md")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "registers")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    sources = sorted(KERNELS.rglob("*.cu"))
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        logs = list(pool.map(lambda s: compile_log(s, args.logs), sources))
    kernels = [k for source, log in zip(sources, logs) for k in kernels_of(source.relative_to(KERNELS).as_posix(), log)]
    spilling = [k for k in kernels if k.spilled]
    release = re.search(r"release (\S+),", subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout).group(1)
    args.out.write_text(f"""# Registers of the CUDA kernels

Made by `python tests/gpu/registers.py` (nvcc {release}, -O3); nobody edits it by hand. {len(kernels)} kernels, at most
{max(k.registers for k in kernels)} registers, {len(spilling)} that spill. A row is a template with all its forms (dtypes, vectors, teams).

Occupancy is what registers allow of a multiprocessor's 64 warps. A kernel that is limited by memory needs some 32 KiB on their way per multiprocessor:
256 threads with four 16-byte loads each are 16 KiB, so two such blocks (25 %) are enough where a thread asks for four vectors or more before it uses
one, as the rows, tiles and walks here do.

{table(kernels)}
""")
    print(args.out.read_text())
    sys.exit(1 if spilling else 0)


if __name__ == "__main__":
    main()
