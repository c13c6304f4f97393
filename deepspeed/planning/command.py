# SPDX-License-Identifier: Apache-2.0
"""`deepspeed plan CONFIG --params 7e9 --gpus 64`."""
import argparse
import importlib
import json
import os
import sys

from deepspeed.planning.quantities import count, size_bytes


def _parser():
    def kind(function):
        def read(text):
            try:
                return function(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return read

    parser = argparse.ArgumentParser(prog="deepspeed plan", description="Memory by kind and traffic of every ZeRO stage and offload, "
                                     "before anything is allocated. Imports no torch unless --model is given.")
    add = parser.add_argument
    add("config", help="the JSON configuration of the run")
    add("--params", type=kind(count), metavar="N", help="parameters of a decoder-only transformer, e.g. 7e9, 7B, 350M")
    add("--model", metavar="MODULE:FACTORY", help="instead: a callable that builds the model; it is built on the meta device")
    add("--layers", type=int, metavar="L", help="its layers (default: the usual proportion)")
    add("--hidden", type=int, metavar="H", help="its hidden size (default: the usual proportion)")
    add("--gpus", "--num_gpus", type=int, default=1, metavar="N", help="GPUs of all nodes together (default: %(default)s)")
    add("--nodes", "--num_nodes", type=int, metavar="N", help="nodes they are in (default: 8 GPUs each)")
    add("--gpu_memory", type=kind(size_bytes), metavar="SIZE", help="memory of one GPU, e.g. 80GB: says what fits")
    add("--host_memory", type=kind(size_bytes), metavar="SIZE", help="memory of one node, for offload; with --device cpu all there is")
    add("--disk", type=kind(size_bytes), metavar="SIZE", help="free on the disk of one node, for offload to nvme")
    add("--here", action="store_true", help="nodes are like this machine: its GPUs' memory, its available memory, free space of nvme_path")
    add("--reserved", type=kind(size_bytes), metavar="SIZE", help="kept free in each GPU (default: 1.5GB)")
    add("--activations", type=kind(size_bytes), metavar="SIZE", help="of one micro-batch on one GPU")
    add("--seq_length", type=int, metavar="S", help="tokens a sequence: estimates the activations")
    add("--micro_batch", type=int, metavar="B", help="sequences (default: the configuration's)")
    add("--recompute", action="store_true", help="estimate them with activation checkpointing")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: ranks of one host without GPUs (default: %(default)s)")
    add("--picture", metavar="FILE", help="also draw it, e.g. plan.png (needs matplotlib)")
    add("--json", action="store_true", help="print everything as JSON, in bytes")
    return parser


def _load_model(text):
    """The model of MODULE:FACTORY, built on the meta device. Like a script's, the current folder is searched first."""
    module_name, colon, factory = text.partition(":")
    if not colon or not module_name or not factory:
        raise ValueError(f"--model {text}: expected MODULE:FACTORY, e.g. mypackage.models:build")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
        for part in factory.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise ValueError(f"--model {text}: {error}") from None
    except AttributeError:
        raise ValueError(f"--model {text}: module {module_name} has no {factory}") from None
    import torch
    with torch.device("meta"):
        model = found() if callable(found) else found
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"--model {text}: gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _positive(parser, arguments):
    for name in ("layers", "hidden", "gpus", "nodes", "seq_length", "micro_batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")


def _room(arguments, made):
    """What the command line says there is; the rest from this machine with --here."""
    from deepspeed.planning.machine import room_here
    from deepspeed.planning.plan import RESERVED_BYTES, Room
    given = Room(arguments.gpu_memory, RESERVED_BYTES if arguments.device == "cuda" else 0, arguments.host_memory, arguments.disk)
    if arguments.device == "cpu" and arguments.host_memory:
        mine = arguments.host_memory * made.nodes // made.gpus
        given = given._replace(device_bytes=min(mine, arguments.gpu_memory or mine), host_bytes=None)
    if arguments.here:
        if arguments.gpu_memory and arguments.device == "cuda" and arguments.host_memory and arguments.disk:
            return given
        found = room_here(made)
        given = Room(*(mine if mine is not None else here for mine, here in zip(given, found)))
    return given._replace(reserved_bytes=arguments.reserved) if arguments.reserved is not None else given


def run(argv):
    parser = _parser()
    arguments = parser.parse_args(argv)
    _positive(parser, arguments)
    if (arguments.params is None) == (arguments.model is None):
        parser.error("give either --params N or --model MODULE:FACTORY")
    from deepspeed.planning import table
    from deepspeed.planning.plan import plan
    made = plan(arguments.config, arguments.params, model=_load_model(arguments.model) if arguments.model else None, gpus=arguments.gpus,
                nodes=arguments.nodes, layers=arguments.layers, hidden=arguments.hidden, activations=arguments.activations,
                seq_length=arguments.seq_length, recompute=arguments.recompute, micro_batch=arguments.micro_batch, device=arguments.device)
    room = _room(arguments, made)
    if arguments.json:
        lines = [json.dumps(table.as_json(made, room), indent=1)]
    else:
        lines = [*table.heading(made), "", *table.table(made, room), "", *table.advice(made, room), *table.legend(made, room)]
    if arguments.picture:
        from deepspeed.planning.picture import draw
        draw(made, arguments.picture, room.device_bytes, table.heading(made)[0])
        if not arguments.json:
            lines.append(f"Drawn to {arguments.picture}.")
    sys.stdout.write("\n".join(lines) + "\n")


def main(argv=None):
    """Entry point; ends with 0, 1 when the configuration or the request is wrong, 2 for a wrong command line."""
    if os.path.isfile("plan"):
        sys.stderr.write("deepspeed plan: this is the planning command; the script ./plan is started by `deepspeed ./plan`\n")
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"deepspeed plan: {error}\n")
        sys.exit(1)
    sys.exit(0)
