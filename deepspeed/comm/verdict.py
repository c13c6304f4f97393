# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom, from what the ranks say about themselves. Pure functions over dicts; no torch, no process group.

A report is `deepspeed.comm.flight.snapshot`: who the rank is, what it waits in, its collectives by group, its Python stacks.
"""
from deepspeed.comm import stacks as stack_text

# What must be equal on all ranks for the same `order` of the same group.
_SAME = ("kind", "step", "phase", "unit", "bytes")


def ranks_text(ranks):
    """[0, 1, 2, 5] -> "ranks 0-2, 5"; [3] -> "rank 3"."""
    ranks, parts = sorted(ranks), []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in parts)
    return ("rank " if len(ranks) == 1 else "ranks ") + text


def name_of(record):
    """"reduce_scatter #12 (step 3, phase reduce, unit 7, 4096 bytes)"."""
    details = [f"step {record['step']}"] if record.get("step", -1) >= 0 else []
    details += [f"phase {record['phase']}"] if record.get("phase") else []
    details += [f"unit {record['unit']}"] if record.get("unit", -1) >= 0 else []
    details += [f"{record['bytes']} bytes"]
    return f"{record['kind']} #{record.get('order') or record['seq']} ({', '.join(details)})"


def identity_of(record):
    return tuple(record[key] for key in _SAME)


# ------------------------------------------------------------------------------------------------------- who diverged
def divergences(reports):
    """For each group the first collective on which its ranks differ: [(label, ranks, order, {rank: record or None})].

    None: the rank has not come that far. A group whose ranks agree is left out, as is one where nobody waits for the late.
    """
    groups = {}
    for rank, report in reports.items():
        for group in report["groups"]:
            entry = groups.setdefault(group["group"], (group["label"], group["ranks"], {}))
            entry[2][rank] = {r["order"]: r for r in group["records"] if r["order"]}
    found = []
    for label, ranks, by_rank in groups.values():
        difference = _first_difference(by_rank)
        if difference is not None:
            found.append((label, ranks, *difference))
    return found


def _first_difference(by_rank):
    known = [orders for orders in by_rank.values() if orders]
    if len(by_rank) < 2 or not known:
        return None
    first = max(min(orders) for orders in known)  # older ones are no longer in everybody's record
    for order in range(first, max(max(orders) for orders in known) + 1):
        here = {rank: orders.get(order) for rank, orders in by_rank.items()}
        kinds = {identity_of(record) for record in here.values() if record is not None}
        late = [rank for rank, record in here.items() if record is None]
        waited_for = any(record is not None and record["state"] != "done" for record in here.values())
        if len(kinds) > 1 or (late and waited_for):
            return order, here
    return None


def divergence_text(label, order, here):
    """One line: who is in what."""
    sides = {}
    for rank, record in sorted(here.items()):
        sides.setdefault(None if record is None else identity_of(record), []).append(rank)
    samples = {None if r is None else identity_of(r): r for r in here.values()}
    texts = []
    for key, ranks in sides.items():
        if key is not None:
            texts.append(f"{ranks_text(ranks)} {'is' if len(ranks) == 1 else 'are'} in {name_of(samples[key])}")
    late = sides.get(None)
    if late:
        texts.append(f"{ranks_text(late)} {'has' if len(late) == 1 else 'have'} not entered it")
    if len([key for key in sides if key is not None]) > 1:
        return f"{label}: the ranks disagree about collective #{order}: " + "; ".join(texts)
    return f"{label}: " + "; ".join(texts)


# ---------------------------------------------------------------------------------------------------------- the hang
def headline(reports, silent, silence_s):
    """The first cause in one sentence."""
    if silent:
        return "; ".join(f"rank {rank} does not answer: {why}" for rank, why in sorted(silent.items()))
    failed = {rank: report["error"] for rank, report in reports.items() if report.get("error")}
    if failed:
        return "; ".join(f"rank {rank} failed: {error}" for rank, error in sorted(failed.items()))
    disagreements = [d for d in divergences(reports) if len({identity_of(r) for r in d[3].values() if r is not None}) > 1]
    if disagreements:
        label, _, order, here = disagreements[0]
        return divergence_text(label, order, here)
    absent = _absent(reports)
    if absent:
        return "; ".join(f"rank {rank} is not in a collective, it is at {stack_text.own_line(reports[rank]['stacks'])}, while "
                         f"{waiting}" for rank, waiting in sorted(absent.items()))
    crossed = _crossed(reports)
    return "; ".join(crossed) if crossed else f"collectives have made no progress for {silence_s:g} s"


def _crossed(reports):
    """Everybody waits, for ranks that wait in something else: who for whom."""
    found = {}
    for rank, report in sorted(reports.items()):
        for wait in report["waits"]:
            if wait.get("missing"):
                found.setdefault((name_of(wait), tuple(wait["missing"])), []).append(rank)
    return [f"{ranks_text(ranks)} wait{'s' if len(ranks) == 1 else ''} in {name} for {ranks_text(missing)}"
            for (name, missing), ranks in found.items()]


def _absent(reports):
    """{rank that waits for nobody: what the others wait in}."""
    found = {}
    for rank, report in reports.items():
        for wait in report["waits"]:
            for other in wait["ranks"]:
                if other in reports and not reports[other]["waits"]:
                    found.setdefault(other, {}).setdefault(name_of(wait), []).append(rank)
    return {rank: "; ".join(f"{ranks_text(ranks)} wait{'s' if len(ranks) == 1 else ''} in {name}" for name, ranks in names.items())
            for rank, names in found.items()}


def _state_text(report, now_s):
    if report["waits"]:
        return "; ".join(f"waits in {name_of(w)}, {w['label']}{_missing_text(w)}" for w in report["waits"])
    last = [r for group in report["groups"] for r in group["records"]]
    if not last:
        return "has not been in a collective yet"
    last = max(last, key=lambda record: record["start_s"])
    done = f", {last['state']} {max(0.0, now_s - last['end_s']):.1f} s ago" if last["end_s"] else ""
    return f"is not in a collective; its last was {name_of(last)}{done}"


def _missing_text(wait):
    return f"; missing: {ranks_text(wait['missing'])}" if wait.get("missing") else ""


def note_missing(reports):
    """Writes into every wait which ranks of its group are not in the same collective."""
    for report in reports.values():
        for wait in report["waits"]:
            if wait["order"] == 0:
                continue
            here = {rank for rank, other in reports.items() for group in other["groups"] if group["group"] == wait["group"]
                    for record in group["records"] if record["order"] == wait["order"] and identity_of(record) == identity_of(wait)}
            here |= {rank for rank, other in reports.items() if any(w["group"] == wait["group"] and w["order"] == wait["order"]
                                                                    and identity_of(w) == identity_of(wait) for w in other["waits"])}
            wait["missing"] = sorted(set(wait["ranks"]) - here)


def _grouped(items):
    """{text: [ranks]} in order of the lowest rank."""
    groups = {}
    for rank, text in sorted(items.items()):
        groups.setdefault(text, []).append(rank)
    return groups


def compose(reports, silent, silence_s, now_s, folder=""):
    """The whole diagnosis as text. reports: {rank: report}; silent: {rank: why it does not answer}."""
    note_missing(reports)
    lines = [f"hang: no progress for {silence_s:g} s (hang_detection.silence_s). {headline(reports, silent, silence_s)}", "",
             "  who waits for whom:"]
    states = {rank: _state_text(report, now_s) for rank, report in reports.items()}
    states.update({rank: f"does not answer: {why}" for rank, why in silent.items()})
    for text, ranks in _grouped(states).items():
        lines.append(f"    {ranks_text(ranks)}: {text}")
    lines += ["", "  where each rank is in its Python code (innermost call last):"]
    stacks = {rank: _stacks_text(report["stacks"]) for rank, report in reports.items()}
    for text, ranks in _grouped(stacks).items():
        where = ", ".join(sorted({f"{reports[rank]['host']}, process {reports[rank]['pid']}" for rank in ranks})) if len(ranks) < 4 else ""
        lines += [f"    {ranks_text(ranks)}{f' ({where})' if where else ''}:", text]
    if folder:
        lines += ["", f"  the last collectives of every rank: python -m deepspeed.comm.flight_record {folder}"]
    lines += ["  the job ends now. If such a wait is meant (a debugger, a long checkpoint, a first compilation), raise",
              "  hang_detection.silence_s or DS_HANG_SILENCE_S; 0 in the variable, or hang_detection.enabled false, lets ranks wait."]
    return "\n".join(lines)


def _stacks_text(stacks):
    texts = []
    for stack in stacks:
        if stack["main"]:
            texts.append(stack_text.as_text(stack["frames"], "      "))
        else:
            texts.append(f"      thread {stack['thread']}:\n" + stack_text.as_text(stack["frames"], "        ", most=2))
    return "\n".join(texts)
