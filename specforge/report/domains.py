"""Panel of the domains: the walk of every run as its mark with an interval, that of the n-gram drafter as a grey line."""

from collections.abc import Sequence

from specforge.report.chart import BOTTOM, TOP, Chart, around
from specforge.report.markup import Markup
from specforge.report.panel import EVALUATE, missing, panel
from specforge.report.run import Run

_NAMES = ("walk_acc_len", "walk_acc_len_low", "walk_acc_len_high", "ngram_walk_acc_len")
_HEAD, _ROW = 17.0, 13.0
"""Heights of a domain's name and of a run below it."""


def domain_panel(runs: Sequence[Run]) -> Markup:
    title = "Tokens per round by domain"
    names = sorted({domain for run in runs for domain in run.domains if run.number(f"eval/{domain}/walk_acc_len") is not None})
    if not names:
        return missing(title, "No evaluation knows a domain: give the held-out rows a `domain`.", EVALUATE)
    row = _ROW * len(runs) + _HEAD
    height = TOP + BOTTOM + row * len(names)
    ends = around(_values(runs, names), 1.0)
    chart = Chart(title, "tokens per round, walk", "", ends, (0.0, float(len(names))), height=height, left=14.0, right=46.0)
    said = []
    for place, domain in enumerate(names):
        y = TOP + row * place
        chart.words(14.0, y + 9, _named(runs, domain), "name")
        for number, run in enumerate(runs):
            level = len(names) - place - (_HEAD + _ROW * number + 2) / row
            said += _draw(chart, run, number, domain, level)
    meaning = (
        "Marks are drafts with the 95 % intervals of their samples, grey lines the n-gram drafter on the same answers; a mark left of its "
        "line loses to it. Few samples: no interval."
    )
    return panel(title, chart.svg("; ".join(said)), meaning)


def _values(runs: Sequence[Run], domains: Sequence[str]) -> list[float]:
    names = [f"eval/{domain}/{name}" for domain in domains for name in _NAMES]
    return [value for run in runs for name in names if (value := run.number(name)) is not None]


def _named(runs: Sequence[Run], domain: str) -> str:
    """The domain with the number of its samples, which runs on other rows have others of."""
    counts = sorted({int(count) for run in runs if (count := run.number(f"eval/{domain}/samples")) is not None})
    word = domain if len(domain) <= 36 else f"{domain[:35]}…"
    return word + (f" · {' or '.join(f'{count:,}' for count in counts)} samples" if counts else "")


def _draw(chart: Chart, run: Run, number: int, domain: str, level: float) -> list[str]:
    """One run's row; returns it in words."""
    walk, low, high, ngram = (run.number(f"eval/{domain}/{name}") for name in _NAMES)
    chart.stroke((chart.x[0], level), (chart.x[1], level), f"r{number} rail")
    if ngram is not None:
        chart.mark(*chart.at((ngram, level)), f"ngram n{number}", f"n-gram on {domain}: {ngram:.3f}")
    if walk is None:
        return []
    told = f"{run.name} on {domain}: {walk:.3f}"
    if low is not None and high is not None:
        told += f", 95 %: {low:.2f}–{high:.2f}"
        chart.stroke((low, level), (high, level), f"r{number} interval", told)
    chart.dots([(walk, level)], number, radius=4.0, tips=[told])
    x, y = chart.at((chart.x[1], level))
    chart.words(x + 6, y + 3.5, f"{walk:.3f}", f"value r{number}")
    return [told]
