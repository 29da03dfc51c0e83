"""Where the numbers come from: what differs between the runs, what happened to them, and every setting."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from specforge.eval.record import EvaluationRecord
from specforge.report.markup import Markup, element, join
from specforge.report.panel import table
from specforge.report.run import Run


def provenance_panels(runs: Sequence[Run]) -> list[Markup]:
    return [
        _card("Origin", table("Where the numbers come from", ["what", *(run.name for run in runs)], _origin(runs)), "origin"),
        *([_card("Settings that differ", _differences(runs), "differences")] if len(runs) > 1 else []),
        *(_run(run, number) for number, run in enumerate(runs)),
    ]


def _card(title: str, content: Markup, classes: str) -> Markup:
    return element("figure", element("h3", title), content, class_=classes)


def _origin(runs: Sequence[Run]) -> list[list[str]]:
    facts = [_facts(run) for run in runs]
    return [[name, *(fact[name] for fact in facts)] for name in facts[0]]


def _facts(run: Run) -> dict[str, str]:
    made_with = run.record.made_with if run.record else {}
    times = [line["time"] for line in [*run.lines, *run.events] if isinstance(line.get("time"), int | float)]
    return {
        "folder": str(run.folder),
        "method": run.method,
        "target": run.target or "-",
        "target's fingerprint": run.fingerprint or "-",
        "forked from": (run.branch.parent if run.branch else "") or "-",
        "ranks of the training": str(run.state.get("world_size", "-")),
        "first and last line (UTC)": f"{_moment(min(times))} to {_moment(max(times))}" if times else "-",
        "checkpoint of the evaluation": run.checkpoint or "-",
        "held-out rows": run.record.data if run.record else str(run.config.get("data", {}).get("eval_path") or "-"),
        "on other rows": "; ".join(_elsewhere(record) for record in run.elsewhere) or "-",
        "evaluated (UTC)": _moment(run.record.time) if run.record else "while training",
        "evaluated with": ", ".join(f"{name} {value}" for name, value in made_with.items()) or "-",
    }


def _elsewhere(record: EvaluationRecord) -> str:
    walk = record.numbers.get("eval/walk_acc_len")
    measured = "no walk" if walk is None else f"walk {walk:.3f}"
    return f"{record.checkpoint}, {record.data}: {measured} on {record.numbers.get('eval/samples', '?')} samples"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _differences(runs: Sequence[Run]) -> Markup:
    flat = [flattened(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    rows = [[key, *(settings.get(key, "–") for settings in flat)] for key in keys if len({settings.get(key) for settings in flat}) > 1]
    return table("One column a run", ["setting", *(run.name for run in runs)], rows) if rows else element("p", "None.")


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`section.key` -> its value as text."""
    flat = dict[str, str]()
    for key, value in settings.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def _run(run: Run, number: int) -> Markup:
    events = [
        element(
            "li", f"{event['event']}: " + ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("event", "time"))
        )
        for event in run.events
    ]
    settings = "\n".join(f"{key}={value}" for key, value in flattened(run.config).items())
    told = join(
        element("p", f"Checkpoints: {', '.join(run.checkpoints) or 'none'}."),
        element("ul", *events) if events else element("p", "It was never resumed, forked or interrupted."),
        element("details", element("summary", "every setting"), element("pre", settings or "The folder has no config.yaml.")),
    )
    return element("figure", element("h3", run.name), told, class_=f"r{number} of-run")
