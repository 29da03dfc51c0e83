"""Panels of what `metrics.jsonl` says: loss, acceptance, speed and memory over the steps."""

from collections.abc import Sequence

from specforge.report.chart import Chart, around
from specforge.report.markup import Markup
from specforge.report.panel import missing, panel
from specforge.report.run import Points, Run

EVERY_POINT = 400
"""Longer lines are thinned: a screen has no more columns."""


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
    """At most `EVERY_POINT` of the points and the last one."""
    stride = -(-len(points) // EVERY_POINT)
    return [*points[:: stride or 1], *([points[-1]] if points and (len(points) - 1) % (stride or 1) else [])]


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
        if style == "points":
            chart.dots(points, f"r{number}", radius=2.2)
    ends = [f"{name} ends at {points[-1][1]:.{digits}f}" for *_, name, points in series if points]
    return panel(title, chart.svg("; ".join(ends)), meaning)


def _walk(runs: Sequence[Run]) -> Markup:
    """The number that counts, with its interval, against the n-gram drafter on the same answers."""
    title, name, ngram = "Tokens per round", "eval/walk_acc_len", "eval/ngram_walk_acc_len"
    curves = [(run.points(name), run.points(name + "_low"), run.points(name + "_high")) for run in runs]
    ends = [run.points(ngram)[-1:] for run in runs]
    values = [y for curve in curves for points in curve for _, y in points] + [y for points in ends for _, y in points]
    if not any(points for points, _, _ in curves):
        why = "No evaluation has a walk: nothing was evaluated, or the rows are not the target's own answers."
        return missing(title, why, "specforge eval RUN/config.yaml --checkpoint RUN/latest")
    chart = Chart(title, "optimiser step", "tokens per round, walk", _steps([curve[0] for curve in curves]), around(values, 1.0))
    for number, (run, points) in enumerate(zip(runs, ends, strict=True)):
        _baseline(chart, run, number, points, ngram, seen=[end[0][1] for end in ends[:number] if end])
    for number, (run, (points, lows, highs)) in enumerate(zip(runs, curves, strict=True)):
        chart.band(lows, highs, f"r{number}")
        chart.line(points, f"r{number}", run.name)
        chart.dots(points, f"r{number}", radius=2.2)
        if run.best:
            best = [point for point in points if point[0] == run.best.step]
            tips = [f"{run.name}, best: step {step}, {value:.3f}" for step, value in best]
            chart.dots(best, f"r{number} ring", 5.0, tips)
    said = [f"{run.name} ends at {points[-1][1]:.3f}" for run, (points, _, _) in zip(runs, curves, strict=True) if points]
    meaning = (
        "What a greedy chain decoder commits a round on held-out answers; bands are 95 % intervals, the ring is the best checkpoint. "
        "A draft below the dashed n-gram is worth nothing."
    )
    return panel(title, chart.svg("; ".join(said)), meaning)


def _baseline(chart: Chart, run: Run, number: int, points: Points, name: str, seen: Sequence[float]) -> None:
    """The n-gram drafter learns nothing, so its number is one level; runs on the same rows share it."""
    if not points or points[0][1] in seen:
        return
    lows, highs = run.points(name + "_low")[-1:], run.points(name + "_high")[-1:]
    for low, high in zip(lows, highs, strict=False):
        chart.band([(x, low[1]) for x in chart.x], [(x, high[1]) for x in chart.x], f"ngram n{number}")
    chart.line([(x, points[0][1]) for x in chart.x], f"ngram dashed n{number}", "n-gram")


def _steps(curves: Sequence[Points]) -> tuple[float, float]:
    steps = [step for points in curves for step, _ in points]
    return (0.0, float(max([*steps, 1])))
