# SPDX-License-Identifier: Apache-2.0
"""The command `ds_nvme_tune`: tries settings of the section `aio` on a folder and prints the best."""
import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys

from deepspeed.nvme import show, work
from deepspeed.nvme.ds_io import check_folder, count, need_gpu, refuse_gds, size_argument

GRID = {"block_size": ["256K", "1M", "8M"], "queue_depth": [8, 32, 128], "single_submit": [False], "overlap_events": [True], "io_parallel": [1]}
_NEARLY_BEST = 0.97   # of the best speed; of such settings the one that has the fewest bytes under way is chosen
_RESULTS = "results.json"


def _parser():
    parser = argparse.ArgumentParser(prog="ds_nvme_tune", description="Finds the settings of the configuration's section \"aio\" for a folder.")
    add = parser.add_argument
    add("--nvme_dir", nargs="+", required=True, metavar="DIR", help="folders on the drives; several are used at the same time, a process for each")
    add("--sweep_config", default=None, metavar="FILE", help=f"JSON file with the values to try; otherwise {json.dumps(GRID)}")
    add("--no_read", action="store_true", help="do not measure reading")
    add("--no_write", action="store_true", help="do not measure writing")
    add("--io_size", type=size_argument, default=400 * 2**20, help="bytes of a file (400M)")
    add("--gpu", action="store_true", help="from and to GPU memory")
    add("--gds", action="store_true", help="with GPUDirect storage")
    add("--flush_page_cache", action="store_true", help="empty the page cache before each measurement (needs root; files go past it anyway)")
    add("--log_dir", default="_aio_bench_logs", help="where results.json and aio.json go (_aio_bench_logs)")
    add("--loops", type=count(1), default=1, help="how often each setting is measured (1)")
    add("--verbose", action="store_true", help="print each measurement when it is made")
    return parser


def parse_sweep_arguments(arguments=None):
    """The options of ds_nvme_tune, checked; `grid` is added: {key: values}."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for folder in options.nvme_dir:
        check_folder(parser, "--nvme_dir", folder)
    if options.no_read and options.no_write:
        parser.error("--no_read and --no_write leave nothing to measure")
    if options.gds:
        refuse_gds(parser, "--gds")
    if options.gpu:
        need_gpu(parser, "--gpu")
    try:
        options.grid = _read_grid(options.sweep_config)
    except (OSError, ValueError) as error:
        parser.error(f"--sweep_config: {error}")
    return options


def _read_grid(path):
    """Checked values for each key, those of GRID where the file does not name one."""
    given = {}
    if path is not None:
        with open(path) as file:
            given = json.load(file)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: must hold an object, {{key: [values]}}")
    if "sequential_requests" in given:
        given["overlap_events"] = [not value for value in given.pop("sequential_requests")]
    if "intra_op_parallelism" in given:
        given["io_parallel"] = given.pop("intra_op_parallelism")
    unknown = sorted(set(given) - set(GRID))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(GRID)}, sequential_requests, intra_op_parallelism")
    grid = {}
    for key, default in GRID.items():
        values = given.get(key, default)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: {key} must be a list of values, got {values!r}")
        grid[key] = [_value(key, value) for value in values]
    return grid


def _value(key, value):
    if key == "block_size":
        return show.parse_size(value)
    if key in ("single_submit", "overlap_events"):
        if not isinstance(value, bool):
            raise ValueError(f"{key}: must be true or false, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}: must be an int of at least 1, got {value!r}")
    return value


def _flush_page_cache():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("1")


def _sweep(options):
    """[{"aio": settings, "read": GB/s, "write": GB/s}]"""
    jobs = [work.Job(io_size=options.io_size, block_size=block, queue_depth=depth, single_submit=single, overlap_events=overlap,
                     intra_op_parallelism=parallel, loops=options.loops, warmup_loops=0, gpu=options.gpu)
            for block, depth, single, overlap, parallel in itertools.product(*options.grid.values())]
    directions = [name for name, left_out in (("write", options.no_write), ("read", options.no_read)) if not left_out]
    places = [(folder, f"cuda:{i}" if options.gpu else None) for i, folder in enumerate(options.nvme_dir)]
    rows = []
    with show.bar(len(jobs) * len(directions) * options.loops, "ds_nvme_tune") as step:
        for job in jobs:
            row = {"aio": job.aio()}
            for direction in directions:
                if options.flush_page_cache:
                    _flush_page_cache()
                times = work.run(dataclasses.replace(job, read=direction == "read"), places, step)
                row[direction] = len(places) * job.io_size / statistics.median(times) / 1e9
            rows.append(row)
            if options.verbose:
                sys.stderr.write(json.dumps(row) + "\n")
    return rows


def speed(row):
    """One number for both directions: the harmonic mean, as for a file that is written and read."""
    speeds = [row[direction] for direction in ("read", "write") if direction in row]
    return statistics.harmonic_mean(speeds)


def best(rows):
    """Of the settings that are as fast as any, but for what measurements vary by, the one with the fewest bytes under way."""
    enough = _NEARLY_BEST * max(speed(row) for row in rows)
    return min((row for row in rows if speed(row) >= enough),
               key=lambda row: (row["aio"]["block_size"] * row["aio"]["queue_depth"] * row["aio"]["intra_op_parallelism"], -speed(row)))


def _show(rows, chosen):
    head = ["block", "depth", "single", "overlap", "parallel", "write GB/s", "read GB/s", ""]
    lines = []
    for row in sorted(rows, key=speed, reverse=True):
        s = row["aio"]
        lines.append([show.size(s["block_size"]), s["queue_depth"], s["single_submit"], s["overlap_events"], s["intra_op_parallelism"],
                      *[f"{row[d]:.2f}" if d in row else "-" for d in ("write", "read")], "<" if row is chosen else ""])
    return show.table(head, lines)


def run(arguments):
    options = parse_sweep_arguments(arguments)
    try:
        os.makedirs(options.log_dir, exist_ok=True)
        rows = _sweep(options)
        chosen = best(rows)
        for name, content in ((_RESULTS, rows), ("aio.json", {"aio": chosen["aio"]})):
            with open(os.path.join(options.log_dir, name), "w") as file:
                json.dump(content, file, indent=1)
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"ds_nvme_tune: {error}\n")
        return 1
    sys.stdout.write(_show(rows, chosen) + "\n\n" + json.dumps({"aio": chosen["aio"]}, indent=1) + "\n")
    return 0


def generate_main(log_dir="_aio_bench_logs"):
    """Prints the best of the measurements that ds_nvme_tune left in `log_dir`, as the section `aio`."""
    with open(os.path.join(log_dir, _RESULTS)) as file:
        rows = json.load(file)
    sys.stdout.write(json.dumps({"aio": best(rows)["aio"]}, indent=1) + "\n")


def main():
    """Entry point of the command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
