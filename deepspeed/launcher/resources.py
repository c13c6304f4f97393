# SPDX-License-Identifier: Apache-2.0
"""Hosts and their slots: the hostfile, the include/exclude filters, and how a choice is handed to each host."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping

_HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def parse_hostfile(lines: Iterable[str]) -> dict[str, int]:
    """``host slots=N`` lines to {host: N}, in their order. ``ValueError`` names the line that is wrong."""
    pool: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        match = _HOST_LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"hostfile line {number}: expected 'host slots=N', found {text!r}")
        host, slots = match.group(1), int(match.group(2))
        if host in pool:
            raise ValueError(f"hostfile line {number}: host {host} is there twice")
        if slots < 1:
            raise ValueError(f"hostfile line {number}: host {host} has no slots")
        pool[host] = slots
    if not pool:
        raise ValueError("hostfile: no hosts in it")
    return pool


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """The hosts of a hostfile, or None when there is no such file (then the job is a local one). ``ValueError``: it is not one."""
    try:
        with open(hostfile_path, encoding="utf-8") as file:
            return parse_hostfile(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"--hostfile {hostfile_path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{hostfile_path}: {error}") from None


def _as_slots(pool: Mapping) -> dict[str, list]:
    return {host: list(range(slots)) if isinstance(slots, int) else list(slots) for host, slots in pool.items()}


def _parse_filter(text: str, pool: Mapping[str, list]) -> dict[str, list]:
    """``HOST[:SLOT,...][@HOST...]`` to {host: slots}; a host without slots means all of its slots."""
    chosen: dict[str, list] = {}
    for node in text.split("@"):
        host, colon, slots = (part.strip() for part in node.strip().partition(":"))
        if host not in pool:
            raise ValueError(f"host {host!r} in {text!r} is unknown (there is: {', '.join(pool)})")
        wanted = list(pool[host])
        if colon:
            if not re.fullmatch(r"\d+(\s*,\s*\d+)*", slots):
                raise ValueError(f"{node!r}: expected HOST or HOST:SLOT,SLOT,...")
            wanted = [int(slot) for slot in slots.split(",")]
            unknown = [slot for slot in wanted if slot not in pool[host]]
            if unknown:
                raise ValueError(f"slot {unknown[0]} of host {host} is unknown (there is: {_list(pool[host])})")
        chosen.setdefault(host, []).extend(slot for slot in wanted if slot not in chosen.get(host, []))
    return {host: sorted(set(slots)) for host, slots in chosen.items()}


def _list(slots: list) -> str:
    return ", ".join(map(str, slots)) or "none"


def parse_resource_filter(host_info: Mapping, include_str: str = "", exclude_str: str = "") -> dict[str, list]:
    """Apply one filter to a pool {host: count or list of slots}; hosts keep their order, hosts left empty go."""
    if include_str and exclude_str:
        raise ValueError("--include and --exclude exclude each other; give one of them")
    pool = _as_slots(host_info)
    if include_str:
        chosen = _parse_filter(include_str, pool)
        return {host: chosen[host] for host in pool if host in chosen}
    if exclude_str:
        removed = _parse_filter(exclude_str, pool)
        pool = {host: [slot for slot in slots if slot not in removed.get(host, ())] for host, slots in pool.items()}
    return {host: slots for host, slots in pool.items() if slots}


def parse_inclusion_exclusion(resource_pool: Mapping, inclusion: str, exclusion: str) -> dict[str, list]:
    """The same with positional filters."""
    return parse_resource_filter(resource_pool, include_str=inclusion, exclude_str=exclusion)


def encode_world_info(world_info: Mapping[str, list]) -> str:
    """{host: slots} as text that survives every shell."""
    return base64.urlsafe_b64encode(json.dumps(world_info).encode()).decode()


def decode_world_info(text: str) -> dict[str, list]:
    try:
        world_info = json.loads(base64.urlsafe_b64decode(text))
    except ValueError as error:
        raise ValueError(f"--world_info: not the text of encode_world_info ({error})") from None
    if not isinstance(world_info, dict) or not world_info or not all(isinstance(v, list) for v in world_info.values()):
        raise ValueError(f"--world_info: expected {{host: [slots]}}, found {world_info!r}")
    return world_info
