"""Panels of what `metrics.jsonl` says: loss, acceptance, speed and memory over the steps."""

from collections.abc import Sequence

from specforge.report.chart import Chart, around
from specforge.report.markup import Markup
from specforge.report.panel import missing, panel
from specforge.report.run import Points, Run

MOST_POINTS = 400
"""Longer lines are thinned: a screen has no more columns."""
MOST_MARKS = 60


def training_panels(runs: Sequence[Run]) -> list[Markup]:
    return [
        _walk(runs),
        _curve(
            runs, "Loss", "nats a token",
            [("train/loss", None, "thin", "training"), ("eval/avg_loss", None, "points", "held out")],
            "Falls while the draft learns; training faint, held-out rows with dots. Only runs of one method and one loss compare.",
        ),
        _curve(
            runs, "First draft right", "share of drafts",
            [("train/accuracy", 0, "thin", "training"), ("eval/per_position_acc", 0, "points", "held out")],
            "How often the first drafted token is the target's own; a gap between training and held-out rows is overfitting.", top=1.0,
        ),
    ]  # fmt: skip


def speed_panels(runs: Sequence[Run]) -> list[Markup]:
    return [
        _curve(
            runs, "Throughput", "tokens a second", [("perf/tokens_per_s", None, "", "all ranks")],
            "Tokens of all ranks together; evaluations are not counted, saving is.", digits=0,
        ),
        _curve(
            runs, "Time of a step", "seconds",
            [("perf/step_time_s", None, "", "step"), ("perf/data_wait_s", None, "dashed", "waiting for data")],
            "One optimiser step; dashed, how much of it rank 0 waited for features. Near the line: the loader is the bottleneck.",
        ),
        _curve(
            runs, "Peak memory", "GiB", [("perf/peak_memory_mib", None, "", "rank 0")],
            "Most that rank 0 held so far: on a GPU allocated tensors, on a CPU the whole process. Resuming begins anew.", scale=2.0**-10,
        ),
    ]  # fmt: skip


def thinned(points: Points) -> Points:
    """About `MOST_POINTS` of the points and the last one: the least and the greatest of each stretch, so that a peak stays in sight."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = -(-2 * len(points) // MOST_POINTS)
    kept = {len(points) - 1}
    for begin in range(0, len(points), stretch):
        places = range(begin, min(begin + stretch, len(points)))
        kept |= {min(places, key=lambda place: points[place][1]), max(places, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]


def _marked(points: Points) -> Points:
    """The points that bear the mark of their run: all, or where they would touch each other the last one."""
    return points if len(points) <= MOST_MARKS else points[-1:]


def _curve(
    runs: Sequence[Run],
    title: str,
    unit: str,
    names: Sequence[tuple[str, int | None, str, str]],
    meaning: str,
    *,
    top: float | None = None,
    digits: int = 3,
    scale: float = 1.0,
) -> Markup:
    """One line a run and number. `names` are (number, place in its list, style, word)."""
    series = []
    for number, run in enumerate(runs):
        for name, position, style, word in names:
            points = [(step, y * scale) for step, y in thinned(run.points(name, position))]
            series.append((number, style, f"{run.name}, {word}" if len(names) > 1 else run.name, points))
    values = [y for *_, points in series for _, y in points]
    if not values:
        return missing(title, f"{names[0][0]} was not logged.", "torchrun --nproc-per-node=1 -m specforge train RUN/config.yaml")
    chart = Chart(title, "optimiser step", unit, _steps([points for *_, points in series]), around(values, min(0.0, *values), top))
    for number, style, name, points in series:
        chart.line(points, f"r{number} {style}", name, digits)
        chart.dots(_marked(points) if style == "points" else points[-1:], number, radius=2.2)
    ends = [f"{name} ends at {points[-1][1]:.{digits}f}" for *_, name, points in series if points]
    return panel(title, chart.svg("; ".join(ends)), meaning)


def _walk(runs: Sequence[Run]) -> Markup:
    """The number that counts, with its interval, against the n-gram drafter on the same answers."""
    title = "Tokens per round"
    curves = [[run.points(f"eval/walk_acc_len{bound}") for bound in ("", "_low", "_high")] for run in runs]
    levels = _ngram_levels(runs)
    values = [y for curve in curves for points in curve for _, y in points] + [y for level in levels for y in level]
    if not any(points for points, *_ in curves):
        why = "No evaluation has a walk: nothing was evaluated, or the rows are not the target's own answers."
        return missing(title, why, "specforge eval RUN/config.yaml --checkpoint RUN/latest")
    chart = Chart(title, "optimiser step", "tokens per round, walk", _steps([points for points, *_ in curves]), around(values, 1.0))
    for (ngram, *bounds), numbers in levels.items():
        owners = " ".join(f"n{number}" for number in numbers)
        if len(bounds) == 2:
            low, high = bounds
            chart.band([(x, low) for x in chart.x], [(x, high) for x in chart.x], f"ngram {owners}")
        chart.level(ngram, f"ngram dashed {owners}", "n-gram")
    said = []
    for number, (run, (points, lows, highs)) in enumerate(zip(runs, curves, strict=True)):
        chart.band(thinned(lows), thinned(highs), f"r{number}")
        chart.line(thinned(points), f"r{number}", run.name)
        chart.dots(_marked(points), number, radius=2.2)
        best = [point for point in points if run.best and point[0] == run.best.step]
        chart.dots(best, number, "ring", 5.5, [f"{run.name}, best checkpoint: step {step:,}, {value:.3f}" for step, value in best])
        said += [f"{run.name} ends at {points[-1][1]:.3f}"] if points else []
    meaning = (
        "What a greedy chain decoder commits a round on held-out answers; bands are 95 % intervals, the hollow mark is the best "
        "checkpoint. A draft below the dashed n-gram is worth nothing."
    )
    return panel(title, chart.svg("; ".join(said)), meaning)


def _ngram_levels(runs: Sequence[Run]) -> dict[tuple[float, ...], list[int]]:
    """The n-gram drafter's walk, with its interval where it has one, and the numbers of the runs it belongs to: it learns nothing, so a
    run has one level, and runs on the same rows share it."""
    levels = dict[tuple[float, ...], list[int]]()
    for number, run in enumerate(runs):
        ends = [run.points(f"eval/ngram_walk_acc_len{bound}")[-1:] for bound in ("", "_low", "_high")]
        level = tuple(value for points in ends for _, value in points)
        if level:
            levels.setdefault(level, []).append(number)
    return levels


def _steps(curves: Sequence[Points]) -> tuple[float, float]:
    steps = [step for points in curves for step, _ in points]
    return (0.0, float(max([*steps, 1])))
