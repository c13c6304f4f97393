# SPDX-License-Identifier: Apache-2.0
"""The command `ds_io`: how fast files of one size are written or read with one setting."""
import argparse
import json
import os
import statistics
import sys

from deepspeed.nvme import show, work


def size_argument(text):
    try:
        return show.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(least):
    def parse(text):
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an int of at least {least}, got {text!r}")
        return int(text)
    return parse


def _parser():
    parser = argparse.ArgumentParser(prog="ds_io", description="Measures how fast files are written (or read) past the page cache.")
    add = parser.add_argument
    add("--folder", default=None, help="where the files go (they are removed afterwards)")
    add("--folder_to_device_mapping", nargs="+", default=None, metavar="FOLDER:DEVICE", help="instead of --folder: a process for each, with this GPU if --gpu")
    add("--io_size", type=size_argument, required=True, help="bytes of a file; K, M and G stand for powers of 1024")
    add("--fast_io_size", type=size_argument, default=64 * 2**20, help="bytes of the buffers of torch_fastio (64M)")
    add("--read", action="store_true", help="read; otherwise write")
    add("--multi_process", type=count(1), default=1, help="processes, each with a file of its own (1)")
    add("--block_size", type=size_argument, default=2**20, help="bytes of one transfer (1M)")
    add("--queue_depth", type=count(1), default=32, help="transfers under way (32)")
    add("--single_submit", action="store_true", help="a system call for each transfer")
    add("--sequential_requests", action="store_true", help="begin transfers when all of a queue have ended, not when any has")
    add("--validate", action="store_true", help="compare the file with memory, within the time")
    add("--engine", choices=work.ENGINES, default="aio_handle", help="what moves the bytes (aio_handle)")
    add("--loops", type=count(1), default=3, help="how often (3)")
    add("--io_parallel", type=count(1), default=1, help="intra_op_parallelism: queues for one file (1)")
    add("--gpu", action="store_true", help="from and to GPU memory")
    add("--use_gds", action="store_true", help="GPUDirect storage")
    add("--slow_bounce_buffer", action="store_true", help="with --gpu: allocate and lock the host memory within the time")
    add("--torch_legacy_save", action="store_true", help="torch.save in its format before 1.6")
    add("--use_accelerator_pin_memory", action="store_true", help="host memory that torch has pinned")
    add("--warmup_loops", type=count(0), default=1, help="loops before the ones that count (1)")
    add("--include_warmup_time", action="store_true", help="let them count, too")
    add("--different_file_each_iteration", action="store_true", help="a new file for each loop")
    add("--json", action="store_true", help="print the result as JSON; its part \"aio\" fits into a configuration")
    return parser


def need_gpu(parser, flag):
    import torch
    if not torch.cuda.is_available():
        parser.error(f"{flag}: torch finds no GPU on this machine")


def refuse_gds(parser, flag):
    parser.error(f"{flag}: GPUDirect storage is not part of this build; without the flag, --gpu goes through host memory")


def check_folder(parser, flag, folder):
    if not os.path.isdir(folder):
        parser.error(f"{flag}: no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        parser.error(f"{flag}: not writable: {folder}")


def _places(parser, options):
    """(folder, device) for each process."""
    if (options.folder is None) == (options.folder_to_device_mapping is None):
        parser.error("one of --folder and --folder_to_device_mapping is needed")
    if options.folder is not None:
        check_folder(parser, "--folder", options.folder)
        return [(options.folder, f"cuda:{i}" if options.gpu else None) for i in range(options.multi_process)]
    places = []
    for text in options.folder_to_device_mapping:
        folder, colon, device = text.rpartition(":")
        if not colon or not device.isdigit():
            parser.error(f"--folder_to_device_mapping: must be FOLDER:DEVICE, got {text!r}")
        check_folder(parser, "--folder_to_device_mapping", folder)
        places.append((folder, f"cuda:{device}" if options.gpu else None))
    if options.multi_process not in (1, len(places)):
        parser.error(f"--multi_process {options.multi_process}, but --folder_to_device_mapping names {len(places)}")
    return places


def parse_arguments(arguments):
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.use_gds:
        refuse_gds(parser, "--use_gds")
    if options.slow_bounce_buffer and not options.gpu:
        parser.error("--slow_bounce_buffer: only with --gpu")
    for flag in ("gpu", "use_accelerator_pin_memory"):
        if getattr(options, flag):
            need_gpu(parser, "--" + flag)
    job = work.Job(
        io_size=options.io_size, read=options.read, engine=options.engine, block_size=options.block_size, queue_depth=options.queue_depth,
        single_submit=options.single_submit, overlap_events=not options.sequential_requests, intra_op_parallelism=options.io_parallel,
        validate=options.validate, loops=options.loops, warmup_loops=options.warmup_loops, different_files=options.different_file_each_iteration,
        fast_io_size=options.fast_io_size, gpu=options.gpu, slow_bounce_buffer=options.slow_bounce_buffer,
        torch_pinned=options.use_accelerator_pin_memory, torch_legacy_save=options.torch_legacy_save)
    return options, job, _places(parser, options)


def run(arguments):
    options, job, places = parse_arguments(arguments)
    what = "read" if job.read else "write"
    try:
        with show.bar(job.warmup_loops + job.loops, f"ds_io {what}") as step:
            times = work.run(job, places, step)
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"ds_io: {error}\n")
        return 1
    counted = times if options.include_warmup_time else times[job.warmup_loops:]
    bytes_each = job.io_size * len(places)
    speeds = [bytes_each / seconds / 1e9 for seconds in counted]
    if options.json:
        result = {"operation": what, "engine": job.engine, "bytes": bytes_each, "processes": len(places), "seconds": counted,
                  "gigabytes_per_second": {"median": statistics.median(speeds), "least": min(speeds), "most": max(speeds)}, "aio": job.aio()}
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return 0
    row = [what, job.engine, show.size(job.io_size), len(places), show.size(job.block_size), job.queue_depth, job.intra_op_parallelism, len(counted),
           *[f"{v:.2f}" for v in (statistics.median(speeds), min(speeds), max(speeds))]]
    head = ["", "engine", "size", "processes", "block", "depth", "parallel", "loops", "GB/s median", "least", "most"]
    sys.stdout.write(show.table(head, [row]) + "\n")
    return 0


def main():
    """Entry point of the command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
