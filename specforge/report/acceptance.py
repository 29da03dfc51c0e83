"""Panels of one evaluation a run: where drafts survive, how long rounds are, in which domains, and for which chains."""

import math
from collections.abc import Sequence
from itertools import accumulate

from specforge.report.chart import Chart, around
from specforge.report.domains import domain_panel
from specforge.report.markup import Markup, element, join
from specforge.report.panel import EVALUATE, missing, panel
from specforge.report.run import Run

LIVE = f"{EVALUATE} --live 60"


def acceptance_panels(runs: Sequence[Run]) -> list[Markup]:
    return [_survival(runs), _histogram(runs), domain_panel(runs), _lengths(runs)]


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
    chart = Chart(title, "draft k", "share that reaches draft k", (0.8, longest + 0.2), (0.0, 1.0), _numbered(longest))
    shared = dict[tuple[float, ...], list[str]]()
    for number, run in enumerate(runs):
        shared.setdefault(tuple(survival_of(run.values("eval/ngram_walk_histogram"))), []).append(f"n{number}")
    for ngram, owners in shared.items():
        chart.line(_positions(ngram), f"ngram dashed {' '.join(owners)}", "n-gram, walk")
    said = []
    for number, (run, (walk, live, starts)) in enumerate(zip(runs, curves, strict=True)):
        chart.line(_positions(starts), f"r{number} dotted", f"{run.name}, every start")
        chart.line(_positions(walk), f"r{number}", f"{run.name}, walk")
        chart.line(
            _positions(survival_of(run.values("eval/live/predicted_histogram"))), f"r{number} thin", f"{run.name}, walk, live samples"
        )
        chart.dots(_positions(walk), number, radius=2.2)
        decoded = _positions(live)
        chart.dots(decoded, number, "ring", 5.0, [f"{run.name}, live: draft {k:g}, {share:.3f}" for k, share in decoded])
        said += [f"{run.name}: " + ", ".join(f"{value:.3f}" for value in walk or starts)]
    meaning = join("How many rounds accept at least k drafts: walk and live both count rounds. ", *map(_of_live, runs))
    key = "solid: the walk · hollow: live decoding · thin: the walk of its samples · dotted: share of starts, not rounds · dashed: n-gram"
    return panel(title, chart.svg("; ".join(said)), meaning, key)


def _of_live(run: Run) -> Markup:
    """Live decoding beside the walk of the very samples that it decoded."""
    decoded, predicted = run.number("eval/live/tokens_per_round"), run.number("eval/live/predicted_tokens_per_round")
    if decoded is None:
        return join(f"Live decoding of {run.name} was never measured; measure it with ", element("code", LIVE), ". ")
    of_same = "" if predicted is None else f", the walk of the same samples {predicted:.3f}"
    return join(f"{run.name} decoded {run.number('eval/live/samples'):g} samples live: {decoded:.3f} tokens per round{of_same}. ")


def _histogram(runs: Sequence[Run]) -> Markup:
    title, name = "Accepted drafts a round", "eval/walk_histogram"
    shares = [_shares(run.values(name)) for run in runs]
    longest = max((len(values) for values in shares), default=0)
    if not longest:
        return missing(title, "No evaluation has the rounds of its walk.", EVALUATE)
    others: list[list[list[float]]] = [
        [_shares(run.values(f"eval/{kind}")) for kind in ("live/histogram", "ngram_walk_histogram")] if values else [[], []]
        for run, values in zip(runs, shares, strict=True)
    ]
    top = max(value for values in [*shares, *(each for pair in others for each in pair)] for value in values)
    chart = Chart(title, "drafts accepted", "share of rounds", (-0.5, longest - 0.5), around([0.0, top], 0.0), _numbered(longest - 1, 0))
    width = 0.8 / len(runs)
    said = []
    for number, (run, values, (live, ngram)) in enumerate(zip(runs, shares, others, strict=True)):
        rounds = run.values(name)
        for k, value in enumerate(values):
            left, right = k - 0.4 + number * width, k - 0.4 + (number + 0.92) * width
            chart.bar(left, right, value, f"r{number}", f"{run.name}: {rounds[k]:,.0f} rounds accept {k}, share {value:.3f}")
            for place, classes, drafter in ((live, f"r{number} live", f"{run.name}, live"), (ngram, f"ngram n{number}", "n-gram")):
                if k < len(place):
                    chart.stroke((left, place[k]), (right, place[k]), classes, f"{drafter}: share {place[k]:.3f} accepts {k}")
        said.append(f"{run.name}: " + ", ".join(f"{value:.3f}" for value in values))
    meaning = "Rounds at 0 bring one token, the target's own; many rounds at the right end want a longer chain."
    return panel(
        title, chart.svg("; ".join(said)), meaning, "bars: the walk · thick lines: live decoding, its samples · dashed lines: n-gram"
    )


def _shares(counts: Sequence[float]) -> list[float]:
    return [count / (sum(counts) or 1) for count in counts]


def _lengths(runs: Sequence[Run]) -> Markup:
    title = "Tokens per round by chain length"
    curves = [_positions(run.values("eval/walk_acc_len_by_draft_tokens")) for run in runs]
    if not any(curves):
        return missing(title, "No evaluation has a walk.", EVALUATE)
    longest = max(map(len, curves))
    values = [y for curve in curves for _, y in curve]
    chart = Chart(title, "drafts of the chain", "tokens per round, walk", (0.8, longest + 0.2), around(values, 1.0), _numbered(longest))
    for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        chart.line(curve, f"r{number}", run.name)
        chart.dots(curve, number, radius=2.2)
    said = [f"{run.name}: " + ", ".join(f"{length:.3f}" for _, length in curve) for run, curve in zip(runs, curves, strict=True)]
    trees = [f"{run.name}, tree {shape}: {length:.3f}" for run in runs for shape, length in run.named_values("eval/trees").items()]
    meaning = "What a shorter chain would bring; draft no further than where the line turns flat."
    if trees:
        meaning += " Trees are depth x top-k x nodes, along the same answers."
    return panel(title, chart.svg("; ".join(said)), meaning, " · ".join(trees))
