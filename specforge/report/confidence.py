"""Panel of how far a draft's confidence can be trusted: reliability diagrams, and the numbers of them in a table."""

import math
from collections.abc import Sequence
from typing import Any

from specforge import files
from specforge.errors import CheckpointError
from specforge.report.acceptance import EVALUATE
from specforge.report.chart import Chart
from specforge.report.markup import Markup, join
from specforge.report.panel import missing, panel, table, tabs
from specforge.report.run import Run

VERSIONS = {"raw": "as it is", "platt": "Platt", "temperature": "temperature"}
METRICS = ("auc", "pcoc", "ece", "brier")


def confidence_panels(runs: Sequence[Run]) -> list[Markup]:
    title = "Reliability of the confidence"
    if not any(run.record and run.record.groups for run in runs):
        return [missing(title, "No evaluation was kept.", EVALUATE)]
    shown = [(word, version) for version, word in VERSIONS.items() if any(_groups(run, version) for run in runs)]
    meaning = (
        "Each point is one fifteenth of all drafted prefixes 1..k: the chance the draft gave them against how many were accepted, with the "
        "95 % interval of so many draws. On the diagonal a confidence is a probability; above it the draft is too modest."
    )
    content = tabs("reliability", [(word, join(_diagram(runs, version), _numbers(runs, version))) for word, version in shown])
    return [panel(title, content, meaning)]


def _diagram(runs: Sequence[Run], version: str) -> Markup:
    chart = Chart("Reliability", "probability that the draft gave", "share accepted", (0.0, 1.0), (0.0, 1.0), height=300.0)
    chart.line([(0.0, 0.0), (1.0, 1.0)], "ngram dashed")
    said = []
    for number, run in enumerate(runs):
        points = _groups(run, version)
        for x, y, count in points:
            spread = 1.96 * math.sqrt(y * (1 - y) / count)
            chart.stroke((x, max(y - spread, 0.0)), (x, min(y + spread, 1.0)), f"r{number} thin")
        chart.line([(x, y) for x, y, _ in points], f"r{number}", run.name)
        chart.dots([(x, y) for x, y, _ in points], f"r{number}", radius=2.6)
        said.append(f"{run.name}: {len(points)} groups")
    return chart.svg("; ".join(said))


def _groups(run: Run, version: str) -> list[tuple[float, float, float]]:
    """(mean probability, share right, events) of the groups of the survival that have events.

    Raises:
        CheckpointError: the record holds something else.
    """
    stored: Any = run.record.groups.get(version, []) if run.record else []
    try:
        groups = [tuple(map(float, group)) for group in stored[-1]] if stored else []
        points = [(probability / count, right / count, count) for count, right, probability in groups if count > 0]
        if all(0 <= value <= 1 + 1e-9 for point in points for value in point[:2]):
            return [(min(x, 1.0), min(y, 1.0), count) for x, y, count in points]
    except (TypeError, ValueError, KeyError):
        pass
    raise CheckpointError(
        f"{run.folder}: groups.{version}={files.shown(stored)} of evaluation {run.checkpoint} must be lists of counts; "
        f"make it again with `{EVALUATE}`."
    )


def _numbers(runs: Sequence[Run], version: str) -> Markup:
    """A row a run for the survival, and one a position for the drafts."""
    rows, classes = list[list[str]](), list[str]()
    for number, run in enumerate(runs):
        of_survival = [run.number(f"eval/calibration/{version}/{metric}") for metric in METRICS]
        of_draft = [run.values(f"eval/calibration/{version}/per_position_{metric}") for metric in METRICS]
        rows.append([f"{run.name}, prefixes", *map(_cell, of_survival)])
        rows += [[f"{run.name}, draft {k}", *map(_cell, values)] for k, values in enumerate(zip(*of_draft, strict=False), 1)]
        classes += [f"r{number} strong"] + [f"r{number}"] * (len(rows) - len(classes) - 1)
    return table(["", *(metric.upper() for metric in METRICS)], rows, classes, "Reliability numbers")


def _cell(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"
