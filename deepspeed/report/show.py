# SPDX-License-Identifier: Apache-2.0
"""A report as text and as JSON."""
_MARK = {True: "yes", False: "no", None: ""}
_WIDTH = 34
_DEMAND = {"raised": "this is a fault of the report: please send it in", "crashed": "a library it loads is broken; see the message",
           "timeout": "something it asks does not answer: a driver, a network folder"}


def as_text(outcomes, hide_advice=False):
    lines = []
    for title, outcome in outcomes.items():
        lines.append(title)
        for fact in outcome.facts:
            mark = _MARK[fact.ok]
            lines.append(f"  {fact.name + ' ':.<{_WIDTH}} {mark:3}  {fact.value}".rstrip())
            if fact.advice and not hide_advice:
                lines.append(" " * (_WIDTH + 8) + "-> " + fact.advice)
        if outcome.status != "ok":
            lines.append(f"  this probe {'said' if outcome.status == 'raised' else 'found'} nothing: {outcome.message}")
            if not hide_advice:
                lines.append(" " * (_WIDTH + 8) + "-> " + _DEMAND[outcome.status])
    return "\n".join(lines) + "\n"


def as_json(outcomes):
    return {
        title: {"status": outcome.status, "seconds": round(outcome.seconds, 3), "message": outcome.message,
                "facts": [fact._asdict() for fact in outcome.facts]}
        for title, outcome in outcomes.items()
    }
