"""The top of the page: what each draft is worth, what it rests on and what holds it back; then the numbers in one table."""

from collections.abc import Sequence
from statistics import median

from specforge.report.comparison import incomparable
from specforge.report.markup import Child, Markup, element, join
from specforge.report.panel import cell, table
from specforge.report.run import Run

WAITS = 0.1
"""From this share of a step on, waiting for data is worth a word."""


def verdicts(runs: Sequence[Run]) -> Markup:
    """A card a run, and what forbids to compare them."""
    warnings = [element("p", warning, class_="warning", role="note") for warning in incomparable(runs)]
    return join(element("div", *(_card(run, number) for number, run in enumerate(runs)), class_="verdicts"), *warnings)


def _card(run: Run, number: int) -> Markup:
    walk = run.number("eval/walk_acc_len")
    length = element("p", element("strong", cell(walk)), " tokens per round", _bounds(run, "eval/walk_acc_len"), class_="walk")
    facts = [_against_ngram(run), _live(run), _rounds(run), _steps(run), _waiting(run)]
    return element(
        "article",
        element("h2", f"{run.name} · {run.method}"),
        length if walk is not None else element("p", _why_no_walk(run), class_="walk"),
        element("ul", *(element("li", fact) for fact in facts if fact)),
        class_=f"verdict r{number}",
    )


def _bounds(run: Run, name: str) -> str:
    bounds = interval(run, name)
    return f" (95 %: {bounds})" if bounds != "–" else ""


def _why_no_walk(run: Run) -> str:
    match = run.number("eval/greedy_match")
    if match is None:
        return "Not evaluated yet."
    return f"No walk: only {match:.3f} of the held-out tokens are the target's own greedy choice."


def _against_ngram(run: Run) -> str:
    """Whether the intervals touch; where there are none, the difference alone."""
    name, other = "eval/walk_acc_len", "eval/ngram_walk_acc_len"
    walk, ngram = run.number(name), run.number(other)
    if walk is None or ngram is None:
        return ""
    against = f"an n-gram drafter's {ngram:.3f}{_bounds(run, other)}"
    low, high, ngram_low, ngram_high = (run.number(each + bound) for each in (name, other) for bound in ("_low", "_high"))
    if low is None or high is None or ngram_low is None or ngram_high is None:
        return f"{abs(walk - ngram):.3f} {'above' if walk >= ngram else 'below'} {against}"
    if low > ngram_high:
        return f"{walk - ngram:.3f} above {against}: the intervals do not touch"
    if high < ngram_low:
        return f"{ngram - walk:.3f} below {against}: the n-gram drafter costs nothing and is better"
    return f"Not told apart from {against}: the intervals overlap"


def _live(run: Run) -> str:
    live, predicted = run.number("eval/live/tokens_per_round"), run.number("eval/live/predicted_tokens_per_round")
    if live is None:
        return "Live decoding was not measured" if run.number("eval/walk_acc_len") is not None else ""
    of_same = f"; the walk of the same samples is {predicted:.3f}" if predicted is not None else ""
    return f"Live decoding of {run.number('eval/live/samples'):g} samples: {live:.3f}{of_same}"


def _rounds(run: Run) -> str:
    histogram = run.values("eval/walk_histogram")
    if not sum(histogram):
        return ""
    none, whole = histogram[0] / sum(histogram), histogram[-1] / sum(histogram)
    return f"{100 * none:.0f} % of the rounds accept no draft, {100 * whole:.0f} % accept all {len(histogram) - 1}"


def _steps(run: Run) -> str:
    """Which checkpoint it is, and whether a longer training promises more."""
    if run.step is None:
        return ""
    shown = f"Numbers of {run.checkpoint or f'step {run.step:,}'}"
    if not run.best:
        return f"{shown}; no checkpoint is marked as the best"
    if run.checkpoint != run.best.checkpoint:
        return f"{shown}, which is not the best checkpoint: that is {run.best.checkpoint}"
    last = max((step for step, _ in run.points(run.best.metric)), default=run.best.step)
    if run.best.step >= last:
        return f"{shown}, the best and the last one evaluated: a longer training may bring more"
    return f"{shown}, the best; evaluations went on to step {last:,}"


def _waiting(run: Run) -> str:
    steps, waits = ([seconds for _, seconds in run.points(f"perf/{name}")] for name in ("step_time_s", "data_wait_s"))
    share = sum(waits) / sum(steps) if sum(steps) else 0.0
    return f"Training waited for data {100 * share:.0f} % of its time" if share > WAITS else ""


def summary(runs: Sequence[Run]) -> Markup:
    """The numbers that decide, a row a run."""
    head = [
        *("run", "walk", "95 %", "n-gram", "95 %", "live", "acc_len", "draft 1 right", "ECE"),
        *("at step", "steps", "tokens/s", "peak GiB"),
    ]
    rows = [_row(run) for run in runs]
    caption = "The numbers in one table"
    meaning = (
        "On held-out answers. Walk, n-gram, live and acc_len: tokens per round, bonus token counted; live on its own samples. "
        "Draft 1 right: share of all starts. ECE: of the confidence as it is. Tokens/s: median over the training."
    )
    content = table(caption, head, rows, [f"r{number}" for number in range(len(runs))])
    return element("figure", content, element("figcaption", meaning), class_="summary")


def _row(run: Run) -> list[Child]:
    speeds, peaks = ([value for _, value in run.points(f"perf/{name}")] for name in ("tokens_per_s", "peak_memory_mib"))
    return [
        f"{run.name} · {run.method}",
        element("strong", cell(run.number("eval/walk_acc_len"))),
        interval(run, "eval/walk_acc_len"),
        cell(run.number("eval/ngram_walk_acc_len")),
        interval(run, "eval/ngram_walk_acc_len"),
        cell(run.number("eval/live/tokens_per_round")),
        cell(run.number("eval/acc_len")),
        cell(run.number("eval/avg_acc")),
        cell(run.number("eval/calibration/raw/ece")),
        cell(run.step, 0),
        cell(max((line["step"] for line in run.lines), default=None), 0),
        cell(median(speeds) if speeds else None, 0),
        cell(max(peaks) / 2**10 if peaks else None, 2),
    ]


def interval(run: Run, name: str) -> str:
    low, high = run.number(name + "_low"), run.number(name + "_high")
    return "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"
