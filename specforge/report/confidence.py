"""Panel of how far a draft's confidence can be trusted: reliability diagrams, and the numbers of them in a table."""

import math
from collections.abc import Sequence
from typing import Any

from specforge import files
from specforge.errors import CheckpointError
from specforge.report.chart import Chart
from specforge.report.markup import Markup, join
from specforge.report.panel import EVALUATE, cell, missing, panel, table, tabs
from specforge.report.run import Run

VERSIONS = {"raw": "as it is", "platt": "scaled by Platt", "temperature": "scaled by temperature"}
METRICS = {"auc": "AUC", "pcoc": "PCOC", "ece": "ECE", "brier": "Brier"}


def confidence_panels(runs: Sequence[Run]) -> list[Markup]:
    title = "Reliability of the confidence"
    if not any(run.record and run.record.groups for run in runs):
        return [missing(title, "No evaluation was kept.", EVALUATE)]
    shown = [(word, version) for version, word in VERSIONS.items() if any(_groups(run, version) for run in runs)]
    meaning = (
        "Each point is one fifteenth of all drafted prefixes 1..k: the chance the draft gave them against how many were right, with the "
        "95 % interval of so many independent draws. On the diagonal a confidence is a probability; above it the draft is too modest. "
        "Measured on the half of the answers on which nothing was fitted. AUC: how well it ranks, at best 1; PCOC: predicted over right, "
        "at best 1; ECE and Brier: errors, at best 0."
    )
    content = tabs(
        "reliability",
        "Version of the confidence",
        [(word, join(_diagram(runs, version), _numbers(runs, version))) for word, version in shown],
    )
    return [panel(title, content, meaning)]


def _diagram(runs: Sequence[Run], version: str) -> Markup:
    chart = Chart("Reliability", "probability that the draft gave", "share right", (0.0, 1.0), (0.0, 1.0), height=300.0)
    chart.line([(0.0, 0.0), (1.0, 1.0)], "ngram dashed")
    said = []
    for number, run in enumerate(runs):
        points = _groups(run, version)
        for x, y, count in points:
            low, high = wilson(y, count)
            chart.stroke((x, low), (x, high), f"r{number} thin")
        chart.line([(x, y) for x, y, _ in points], f"r{number}", run.name)
        chart.dots([(x, y) for x, y, _ in points], number, radius=2.6)
        said.append(f"{run.name}: " + ", ".join(f"given {x:.2f}, right {y:.2f}" for x, y, _ in points))
    return chart.svg("; ".join(said))


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of so many independent draws (Wilson 1927), which has a width at 0 and 1 too."""
    squared = 1.96**2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    spread = math.sqrt(share * (1 - share) * squared / count + (squared / (2 * count)) ** 2) / (1 + squared / count)
    return centre - spread, centre + spread


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
        rows.append([f"{run.name}, prefixes", *map(cell, of_survival)])
        rows += [[f"{run.name}, draft {k}", *map(cell, values)] for k, values in enumerate(zip(*of_draft, strict=False), 1)]
        classes += [f"r{number} strong"] + [f"r{number}"] * (len(rows) - len(classes) - 1)
    return table(f"Of the confidence, {VERSIONS[version]}", ["drafts", *METRICS.values()], rows, classes)
