# SPDX-License-Identifier: Apache-2.0
"""The plan: every stage and offload for one model on one cluster, by the C++ that lays out the engine (csrc/plan)."""
import math
from typing import NamedTuple

from deepspeed._native import core
from deepspeed.config import load_config
from deepspeed.engine.layout import divided_at, persistent_numel
from deepspeed.planning.activations import activation_bytes
from deepspeed.planning.quantities import GIB, gib
from deepspeed.planning.shape import decoder, of_model
from deepspeed.zero.tiers import block_bytes, speculates

KINDS = ("parameters", "gradients", "master_weights", "optimizer_state", "updates_ahead", "gathered_units", "buckets", "staging")
# What a process takes besides on a GPU: its CUDA context, NCCL's buffers, libraries, rounding of torch's allocator.
RESERVED_BYTES = 3 << 29
GPUS_PER_NODE = 8
_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# fp32 values of state an element.
_STATES = {"adam": 2, "adamw": 2, "lamb": 2, "lion": 1, "adagrad": 1, "sgd": 1, "muon": 1}
# Their update goes element by element: state may rest elsewhere.
_RESTING = ("adam", "adamw", "lion", "adagrad", "sgd")


class Room(NamedTuple):
    """What there is. None: not known, not checked."""
    device_bytes: int = None      # of one GPU, or of a CPU rank's share of its host
    reserved_bytes: int = 0       # of it, kept free
    host_bytes: int = None        # of one node, for offload from GPUs
    disk_bytes: int = None        # of one node, free in the folders for files


class Choice(NamedTuple):
    """One stage with one offload. `device`, `host`, `file`: {kind: bytes} of one rank; traffic: [(phase, collectives, bytes, bytes sent)] of
    one step; tiers: {direction: bytes} of one rank in a step, see csrc/plan/memory.h TierTraffic."""
    stage: int
    offload_optimizer: str
    offload_param: str
    configured: bool          # this is what the configuration says
    device: dict
    host: dict
    file: dict
    activation_bytes: int     # 0 when they are not known
    traffic: list
    tiers: dict
    ranks_per_node: int
    extra: dict               # {section: {key: value}} of zero_optimization that the configuration has beside `device`
    refused: str              # why it cannot be trained like that; "" when it can

    @property
    def name(self):
        where = {"cpu": "host", "nvme": "disk"}
        if self.offload_optimizer == self.offload_param != "none":
            return f"stage {self.stage}, optimizer and parameters on {where[self.offload_param]}"
        places = (("optimizer", self.offload_optimizer), ("parameters", self.offload_param))
        return f"stage {self.stage}" + "".join(f", {what} on {where[place]}" for what, place in places if place != "none")

    @property
    def device_bytes(self):
        return sum(self.device.values()) + self.activation_bytes

    @property
    def host_bytes(self):
        """Of one node."""
        return sum(self.host.values()) * self.ranks_per_node

    @property
    def disk_bytes(self):
        """Of one node."""
        return sum(self.file.values()) * self.ranks_per_node

    @property
    def sent_bytes(self):
        return sum(sent for _, _, _, sent in self.traffic)

    @property
    def host_link_bytes(self):
        """Of one rank in a step, between its device and the host, both ways."""
        return self.tiers["to_host"] + self.tiers["from_host"]

    @property
    def streamed_bytes(self):
        """Of one rank in a step, read from and written to files past the page cache."""
        return self.tiers["file_read"] + self.tiers["file_written"]

    @property
    def mapped_bytes(self):
        """Of one rank in a step, read and written through mappings of files: as much of it reaches the disk as memory has no room for."""
        return self.tiers["mapped_read"] + self.tiers["mapped_written"]

    def settings(self):
        """The zero_optimization section that makes this choice."""
        section = {"stage": self.stage}
        for key, place in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_param)):
            if place != "none":
                section[key] = {"device": place, **({"nvme_path": "/local_nvme"} if place == "nvme" else {}), **self.extra.get(key, {})}
        return section

    def misfit(self, room):
        """Why it does not fit; "" when it does, as far as `room` is known."""
        if self.refused:
            return self.refused
        if room.device_bytes is not None:
            over = self.device_bytes + room.reserved_bytes - room.device_bytes
            if over > 0:
                return f"{over / GIB:.1f} GiB too much"
        if room.host_bytes is not None and self.host_bytes > room.host_bytes:
            return f"host lacks {gib(self.host_bytes - room.host_bytes)} GiB"
        if room.disk_bytes is not None and self.disk_bytes > room.disk_bytes:
            return f"disk lacks {gib(self.disk_bytes - room.disk_bytes)} GiB"
        return ""


class Plan(NamedTuple):
    choices: list
    shape: object
    units: int
    largest_unit_numel: int
    gpus: int
    nodes: int
    precision: str
    optimizer: str
    state_values: int
    micro_batch: int
    accumulation: int
    device: str
    remarks: list

    def best(self, room):
        """The cheapest choice that fits: least to and from files, then between device and host, then sent, then held. None when nothing fits."""
        fitting = [c for c in self.choices if not c.misfit(room)]
        return min(fitting, key=lambda c: (c.streamed_bytes + c.mapped_bytes, c.host_link_bytes, c.sent_bytes, c.device_bytes), default=None)


def _nodes(gpus, nodes):
    if nodes is None:
        nodes = math.ceil(gpus / GPUS_PER_NODE)
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise ValueError(f"{gpus} GPUs cannot be shared equally by {nodes} nodes: give --gpus (of all nodes together) and --nodes that "
                         "divide it")
    return nodes


def _states(config, remarks):
    name = config.optimizer.type
    if name is None:
        remarks.append("the configuration names no optimizer: Adam's two fp32 values of state a parameter are counted")
        return "Adam", 2
    if name.lower() == "muon":
        remarks.append("Muon: one value of state a parameter is counted; embeddings, norms and heads, which Adam steps, have two")
    if name.lower() not in _STATES:
        remarks.append(f"optimizer {name}: two fp32 values of state a parameter are assumed, as Adam has")
    return name, _STATES.get(name.lower(), 2)


def _offloads(config, device):
    """[(stage, optimizer place, parameter place)] worth looking at; the configured one among them. On a CPU the host is the device."""
    zero = config.zero_optimization
    configured = (int(zero.stage), zero.offload_optimizer.device if zero.stage else "none",
                  zero.offload_param.device if zero.stage == 3 else "none")
    rows = [(stage, "none", "none") for stage in range(4)]
    if device != "cpu":
        rows += [(2, "cpu", "none"), (3, "cpu", "none"), (3, "cpu", "cpu"), (3, "nvme", "cpu")]
    rows += [(2, "nvme", "none"), (3, "nvme", "none"), (3, "nvme", "nvme")]
    if configured not in rows:
        rows.append(configured)
    return rows, configured


def _given(config):
    """What the configuration says of offload beside the device, as far as it has an effect."""
    zero = config.zero_optimization
    found = {}
    for name, keys in (("offload_optimizer", ("nvme_path", "ratio", "buffer_count", "super_offload")), ("offload_param", ("nvme_path", "max_in_cpu"))):
        section = getattr(zero, name)
        found[name] = {key: getattr(section, key) for key in keys if config.is_set(f"zero_optimization.{name}.{key}")}
    return found


def _extra(given, row, configured):
    """Of what is given, what a row has: the configured one all, others the folder and the number of buffers."""
    kept = {}
    for name, place in (("offload_optimizer", row[1]), ("offload_param", row[2])):
        wanted = given[name] if row == configured else {k: v for k, v in given[name].items() if k in ("nvme_path", "buffer_count")}
        kept[name] = {k: v for k, v in wanted.items() if place == "nvme" or (place == "cpu" and k in ("ratio", "super_offload"))}
    folder = next((section["nvme_path"] for section in given.values() if section.get("nvme_path")), None)
    for name, place in (("offload_optimizer", row[1]), ("offload_param", row[2])):
        if place == "nvme" and folder:
            kept[name].setdefault("nvme_path", folder)
    if row[2] == "nvme" and row != configured:
        kept["offload_param"]["max_in_cpu"] = 0
    return kept


def _offload(row, config, is_configured):
    offload, tiers, zero = core().Offload(), core().Tier, config.zero_optimization
    offload.states, offload.params = getattr(tiers, row[1]), getattr(tiers, row[2])
    offload.tiles = core().step_tiles(int(zero.offload_optimizer.buffer_count), block_bytes(config.aio))
    # Another choice than the configured one is shown with all of its state elsewhere.
    offload.states_share = float(zero.offload_optimizer.ratio) if is_configured else 1.0
    offload.ahead = is_configured and speculates(zero)
    offload.params_in_memory = int(zero.offload_param.max_in_cpu) if is_configured else 0
    return offload


def _refused(row, optimizer, device):
    moves = row[1] == "nvme" or (row[1] == "cpu" or row[2] != "none") and device != "cpu"
    if moves and optimizer.lower() not in _RESTING:
        return f"{optimizer}'s state cannot rest elsewhere"
    return ""


def _partition(config, gpus, device, states, stage):
    zero = config.zero_optimization
    p = core().Partition()
    p.shard_params, p.partial_step = divided_at(stage)
    ranks = int(zero.zero_hpz_partition_size or 1) if stage == 3 else 1
    p.ranks = ranks if 1 < ranks < gpus else gpus
    p.replicas = gpus // p.ranks
    p.persistent_numel = min(persistent_numel(zero), 2**62)
    comm = config.communication_data_type
    p.reduce_bytes = _ELEMENT_BYTES[comm.lower()] if comm else 0
    p.states = states
    p.split_master = bool(config.bf16.split_master)
    p.accumulation = int(config.gradient_accumulation_steps or 1)
    p.on_host = device == "cpu"
    p.prefetch = device != "cpu"   # ranks on one CPU host read each other's memory when they need it
    return p


def plan(config, params=None, *, model=None, gpus=1, nodes=None, layers=None, hidden=None, activations=None, seq_length=None,
         recompute=False, micro_batch=None, device="cuda"):
    """Bytes a rank by kind and traffic a step, for every stage and offload.

    config: what initialize() takes. params: number of parameters, of a decoder-only transformer with `layers` and `hidden` (usual
    proportions when not given); or model: a torch module, on the meta device if it is large. gpus: of all nodes together. activations:
    bytes of one micro-batch on one rank; or seq_length, to estimate them (recompute: with activation checkpointing). device: "cuda", or
    "cpu" for ranks of one host that share its memory. Raises ValueError, or DeepSpeedConfigError for a configuration that is wrong.
    """
    if (params is None) == (model is None):
        raise ValueError("give either the number of parameters (--params 7e9) or a model (--model module:factory)")
    gpus, remarks = int(gpus), []
    nodes = _nodes(gpus, nodes)
    config = load_config(config, world_size=gpus, device=device, batch_required=False, accept_unbuilt=True)
    zero = config.zero_optimization
    shape = decoder(int(params), layers, hidden) if model is None else of_model(model, tuple(zero.leaf_module.classes), layers, hidden)
    if shape.numel == 0:
        raise ValueError("the model has no parameters")
    precision = "bf16" if config.bf16.enabled else "fp16" if config.fp16.enabled else "fp32"
    compute_bytes = 0 if precision == "fp32" else _ELEMENT_BYTES[precision]
    optimizer, states = _states(config, remarks)
    micro_batch = int(micro_batch or config.train_micro_batch_size_per_gpu or 1)
    if activations is None and seq_length:
        activations = activation_bytes(shape, seq_length, micro_batch, compute_bytes or 4, recompute)
    budget = core().default_budget(shape.numel, zero.reduce_bucket_size, zero.prefetch_bucket_size)
    sizes = [[p.planned(compute_bytes) for p in own] for own in shape.params]
    rows, configured = _offloads(config, device)
    given = _given(config)
    choices = []
    for row in rows:
        stage, states_place, params_place = row
        partition = _partition(config, gpus, device, states, stage)
        partition.offload = _offload(row, config, row == configured)
        found = core().estimate(shape.nodes, sizes, budget, partition)
        choices.append(Choice(stage, states_place, params_place, row == configured, found["device"], found["host"], found["file"],
                              int(activations or 0), found["traffic"], found["tiers"], gpus // nodes, _extra(given, row, configured),
                              _refused(row, optimizer, device)))
    return Plan(choices, shape, found["units"], found["largest_unit_numel"], gpus, nodes, precision, optimizer, states, micro_batch,
                int(config.gradient_accumulation_steps or 1), device, remarks)
