"""Panels of one evaluation a run: where drafts survive, how long rounds are, and in which domains."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from specforge.report.chart import BOTTOM, TOP, Chart, around
from specforge.report.markup import Markup, element, join
from specforge.report.panel import missing, panel
from specforge.report.run import Run

EVALUATE = "specforge eval RUN/config.yaml --checkpoint RUN/best"
LIVE = f"{EVALUATE} --live 60"


def acceptance_panels(runs: Sequence[Run]) -> list[Markup]:
    return [_survival(runs), _histogram(runs), _domains(runs), _lengths(runs)]


def survival_of(histogram: Sequence[float]) -> list[float]:
    """Share of rounds that accept at least 1, 2, ... drafts, from the rounds that accept 0, 1, ... of them."""
    at_least = list(accumulate(reversed(histogram)))[::-1]
    return [count / at_least[0] for count in at_least[1:]] if at_least and at_least[0] else []


def _positions(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(k), value) for k, value in enumerate(values, 1) if math.isfinite(value)]


def _numbered(last: int, first: int = 1) -> list[tuple[float, str]]:
    stride = max(1, last // 8)
    return [(float(k), str(k)) for k in range(first, last + 1, stride)]


def _survival(runs: Sequence[Run]) -> Markup:
    title = "Survival by position"
    curves = [
        (survival_of(run.values("eval/walk_histogram")), run.values("eval/live/survival"), run.values("eval/survival")) for run in runs
    ]
    longest = max((len(values) for curve in curves for values in curve), default=0)
    if not longest:
        return missing(title, "No evaluation was kept.", EVALUATE)
    chart = Chart(title, "draft k", "share of rounds that accept k", (0.8, longest + 0.2), (0.0, 1.0), _numbered(longest))
    drawn: list[list[float]] = []
    for number, run in enumerate(runs):
        ngram = survival_of(run.values("eval/ngram_walk_histogram"))
        if ngram and ngram not in drawn:
            drawn.append(ngram)
            chart.line(_positions(ngram), f"ngram dashed n{number}", "n-gram, walk")
    said = []
    for number, (run, (walk, live, starts)) in enumerate(zip(runs, curves, strict=True)):
        chart.line(_positions(starts), f"r{number} dotted", f"{run.name}, every start")
        chart.line(_positions(walk), f"r{number}", f"{run.name}, walk")
        chart.dots(_positions(walk), f"r{number}", radius=2.2)
        decoded = _positions(live)
        chart.dots(decoded, f"r{number} ring", 5.0, [f"{run.name}, live: draft {k:g}, {share:.3f}" for k, share in decoded])
        said += [f"{run.name}: " + ", ".join(f"{value:.3f}" for value in walk or starts)]
    meaning = join(
        "How far a round gets. Walk and live both count rounds. ",
        *(_of_live(run) for run in runs),
    )
    key = "solid: the walk · rings: live decoding · dotted: every start counted alike"
    return panel(title, chart.svg("; ".join(said)), meaning, key)


def _of_live(run: Run) -> Markup:
    """Live decoding beside the walk of the very samples that it decoded."""
    decoded, predicted = run.number("eval/live/tokens_per_round"), run.number("eval/live/predicted_tokens_per_round")
    if decoded is None:
        return join(f"Live decoding of {run.name} was never measured; measure it with ", element("code", LIVE), ". ")
    of_same = "" if predicted is None else f", the walk of the same samples {predicted:.3f}"
    return join(f"{run.name} decoded {run.numbers.get('eval/live/samples')} samples live: {decoded:.3f} tokens per round{of_same}. ")


def _histogram(runs: Sequence[Run]) -> Markup:
    title, name = "Accepted drafts a round", "eval/walk_histogram"
    shares = [_shares(run.values(name)) for run in runs]
    longest = max((len(values) for values in shares), default=0)
    if not longest:
        return missing(title, "No evaluation has the rounds of its walk.", EVALUATE)
    top = max(value for values in [*shares, *(_shares(run.values("eval/ngram_walk_histogram")) for run in runs)] for value in values)
    chart = Chart(title, "drafts accepted", "share of rounds", (-0.5, longest - 0.5), around([0.0, top], 0.0), _numbered(longest - 1, 0))
    width = 0.8 / len(runs)
    said = []
    for number, (run, values) in enumerate(zip(runs, shares, strict=True)):
        live, ngram = (_shares(run.values(f"eval/{kind}histogram")) for kind in ("live/", "ngram_walk_"))
        for k, value in enumerate(values):
            left = k - 0.4 + number * width
            rounds = int(run.values(name)[k])
            chart.bar(left, left + width * 0.92, value, f"r{number}", f"{run.name}: {rounds:,} rounds accept {k}, {value:.1%}")
            for place, kind, word in ((live, f"r{number} live", "live"), (ngram, f"ngram n{number}", "n-gram")):
                if k < len(place):
                    tip = f"{word if word == 'n-gram' else f'{run.name}, {word}'}: {place[k]:.1%} accept {k}"
                    chart.stroke((left, place[k]), (left + width * 0.92, place[k]), kind, tip)
        said.append(f"{run.name}: " + ", ".join(f"{value:.1%}" for value in values))
    key = "bars: the walk · coloured lines: live decoding · grey lines: n-gram"
    return panel(
        title,
        chart.svg("; ".join(said)),
        "Rounds at 0 bring one token, the target's own; rounds at the right end want a longer chain.",
        key,
    )


def _shares(counts: Sequence[float]) -> list[float]:
    return [count / (sum(counts) or 1) for count in counts]


def _domains(runs: Sequence[Run]) -> Markup:
    """One row a domain: the walk of every run as a dot, that of the n-gram drafter as a grey line."""
    title = "Tokens per round by domain"
    names = sorted({domain for run in runs for domain in run.domains if run.number(f"eval/{domain}/walk_acc_len")})
    if not names:
        return missing(title, "No evaluation knows a domain: give the held-out rows a `domain`.", EVALUATE)
    values = [
        value
        for run in runs
        for domain in names
        for kind in ("", "ngram_")
        if (value := run.number(f"eval/{domain}/{kind}walk_acc_len")) is not None
    ]
    row = 13.0 * len(runs) + 17.0
    height = TOP + BOTTOM + row * len(names)
    chart = Chart(title, "tokens per round, walk", "", around(values, 1.0), (0.0, float(len(names))), height=height, left=14.0)
    said = []
    for place, domain in enumerate(names):
        y = TOP + row * place
        chart.words(14.0, y + 9, domain if len(domain) <= 40 else f"{domain[:39]}…", "name")
        for number, run in enumerate(runs):
            level = len(names) - place - (17.0 + 13.0 * number + 2) / row
            walk, ngram = run.number(f"eval/{domain}/walk_acc_len"), run.number(f"eval/{domain}/ngram_walk_acc_len")
            chart.stroke((chart.x[0], level), (chart.x[1], level), f"r{number} rail")
            if ngram is not None:
                x, centre = chart.at((ngram, level))
                chart.mark(x, centre, f"ngram n{number}", f"n-gram on {domain}: {ngram:.3f}")
            if walk is not None:
                chart.dots([(walk, level)], f"r{number}", 4.0, [f"{run.name} on {domain}: {walk:.3f}"])
                said.append(f"{run.name} on {domain}: {walk:.3f}")
    return panel(
        title,
        chart.svg("; ".join(said)),
        "Dots are drafts, grey marks the n-gram drafter on the same answers; a dot left of its mark loses to it.",
    )


def _lengths(runs: Sequence[Run]) -> Markup:
    title = "Tokens per round by chain length"
    curves = [_positions(run.values("eval/walk_acc_len_by_draft_tokens")) for run in runs]
    if not any(curves):
        return missing(title, "No evaluation has a walk.", EVALUATE)
    live = [_live(run, len(curve)) for run, curve in zip(runs, curves, strict=True)]
    longest = max(map(len, curves))
    values = [y for curve in [*curves, *live] for _, y in curve]
    chart = Chart(title, "drafts of the chain", "tokens per round, walk", (0.8, longest + 0.2), around(values, 1.0), _numbered(longest))
    for number, (run, curve, decoded) in enumerate(zip(runs, curves, live, strict=True)):
        chart.line(curve, f"r{number}", run.name)
        chart.dots(curve, f"r{number}", radius=2.2)
        chart.dots(decoded, f"r{number} ring", 5.0, [f"{run.name}, live: {length:.3f}" for _, length in decoded])
    trees = [f"{run.name}, tree {shape}: {length:.3f}" for run in runs for shape, length in _trees(run)]
    meaning = (
        "What a shorter chain would bring; draft no further than where the line turns flat. A ring is live decoding, on its own samples."
    )
    return panel(title, chart.svg("; ".join(run.name for run in runs)), meaning, " · ".join(trees))


def _live(run: Run, drafts: int) -> list[tuple[float, float]]:
    decoded = run.number("eval/live/tokens_per_round")
    return [(float(drafts), decoded)] if decoded is not None else []


def _trees(run: Run) -> list[tuple[str, float]]:
    trees: Any = run.numbers.get("eval/trees", {})
    return [(str(shape), float(length)) for shape, length in trees.items()] if isinstance(trees, dict) else []
