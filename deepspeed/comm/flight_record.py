# SPDX-License-Identifier: Apache-2.0
"""`python -m deepspeed.comm.flight_record FOLDER`: reads every rank's flight record and says which collective diverged.

Exit code: 0 when the ranks agree, 1 when they do not, 2 when there is nothing to read. Needs no torch and no process group.
"""
import argparse
import json
import re
import sys
import time
from pathlib import Path

from deepspeed.comm import stacks, verdict


class BadRecord(ValueError):
    """A file is not a flight record."""


def load(folder):
    """{rank: record} of the folder's rank*.json, and the ranks of that job that left none."""
    records = {}
    for path in sorted(Path(folder).glob("rank*.json")):
        if not re.fullmatch(r"rank\d+\.json", path.name):
            continue
        try:
            record = json.loads(path.read_text())
            records[int(record["rank"])] = record
            record["groups"], record["waits"], record["stacks"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadRecord(f"{path}: not a flight record ({type(error).__name__}: {error})") from None
    if not records:
        return {}, []
    newest = max(record["time_s"] for record in records.values())
    size = max(records.values(), key=lambda record: record["time_s"])["world_size"]
    # What an earlier job has left in the folder would only confuse.
    records = {r: record for r, record in records.items() if record["world_size"] == size and newest - record["time_s"] < 600}
    return records, sorted(set(range(size)) - set(records))


def report(records, missing, last=0):
    """(text, whether the ranks diverged)."""
    verdict.note_missing(records)
    any_record = next(iter(records.values()))
    lines = [f"{len(records)} of {any_record['world_size']} ranks left a record"
             + (f"; none of {verdict.ranks_text(missing)}" if missing else "")]
    for rank, record in sorted(records.items()):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time_s"]))
        lines.append(f"  rank {rank} ({record['host']}, process {record['pid']}, {when}, step {record['step']}): {record['reason']}; "
                     f"at {stacks.own_line(record['stacks'])}")
        lines += [f"    waits in {verdict.name_of(wait)}, {wait['label']}{verdict._missing_text(wait)}" for wait in record["waits"]]
    found = verdict.divergences(records)
    lines.append("")
    if found:
        lines.append("first collective on which the ranks differ:")
        lines += ["  " + verdict.divergence_text(label, order, here) for label, _, order, here in found]
    else:
        lines.append("the ranks agree on every collective that all their records hold")
    if last:
        for rank, record in sorted(records.items()):
            lines += ["", f"rank {rank}, last {last} collectives of each group:"]
            for group in record["groups"]:
                lines += [f"  {group['label']}: {verdict.name_of(r)} {r['state']}"
                          + (f" in {(r['end_s'] - r['start_s']) * 1e3:.1f} ms" if r["end_s"] else "") for r in group["records"][-last:]]
    return "\n".join(lines), bool(found)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="deepspeed.comm.flight_record", description="Which collective did the ranks diverge on?")
    parser.add_argument("folder", help="what hang_detection.flight_record or DS_FLIGHT_RECORD named; the message of the hang says it")
    parser.add_argument("--last", type=int, default=0, metavar="N", help="also list each rank's last N collectives")
    args = parser.parse_args(argv)
    try:
        records, missing = load(args.folder)
    except BadRecord as error:
        print(error, file=sys.stderr)
        return 2
    if not records:
        print(f"no rank*.json in {args.folder}", file=sys.stderr)
        return 2
    text, diverged = report(records, missing, args.last)
    print(text)
    return 1 if diverged else 0


if __name__ == "__main__":
    sys.exit(main())
