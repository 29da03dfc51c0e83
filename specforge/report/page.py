"""The whole page: one file with its style and script inside, and a policy under which a browser fetches nothing and runs nothing else."""

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from specforge import __version__
from specforge.report.acceptance import acceptance_panels
from specforge.report.confidence import confidence_panels
from specforge.report.markup import Markup, element
from specforge.report.panel import table
from specforge.report.provenance import provenance_panels
from specforge.report.run import Run
from specforge.report.texts import text_panels
from specforge.report.training import speed_panels, training_panels

LONGEST = 8
"""As many runs have a colour of their own."""
_HERE = Path(__file__).parent


def page(runs: Sequence[Run]) -> str:
    """The report of up to `LONGEST` runs.

    Raises:
        CheckpointError, DataError: a file of a run holds something else than it should.
    """
    runs = distinct(runs)
    style, script = (Markup((_HERE / name).read_text()) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    title = "specforge: " + ", ".join(run.name for run in runs)
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta http-equiv="Content-Security-Policy" content="{}">').format(policy),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        element("style", style),
    )
    sections = [
        ("training", "Training", training_panels(runs)),
        ("acceptance", "Acceptance", acceptance_panels(runs)),
        ("confidence", "Confidence", confidence_panels(runs)),
        ("text", "Real text", text_panels(runs)),
        ("speed", "Speed and memory", speed_panels(runs)),
        ("provenance", "Configuration and provenance", provenance_panels(runs)),
    ]
    body = element(
        "body",
        element("header", element("h1", "What the draft is worth"), element("p", _lead(runs), class_="lead")),
        _bar(runs, [(name, title) for name, title, _ in sections]),
        element("main", _summary(runs), *(_section(*section) for section in sections)),
        element(
            "footer", f"specforge {__version__}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC. Made from files of the runs alone."
        ),
        element("div", class_="tip", hidden=True, role="status"),
        element("script", script),
    )
    return str(Markup("<!doctype html>\n") + element("html", head, body, lang="en") + Markup("\n"))


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one name told apart by their folders."""
    names = Counter(run.name for run in runs)
    return [run.renamed(f"{run.name} ({run.folder})") if names[run.name] > 1 else run for run in runs]


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _lead(runs: Sequence[Run]) -> str:
    """One sentence a run: its walk against the n-gram drafter."""
    return " ".join(map(_sentence, runs))


def _sentence(run: Run) -> str:
    walk, ngram = run.number("eval/walk_acc_len"), run.number("eval/ngram_walk_acc_len")
    if walk is None:
        return f"{run.name} has no walk yet."
    against = f", {abs(walk - ngram):.2f} {'more' if walk >= ngram else 'fewer'} than an n-gram drafter" if ngram is not None else ""
    return f"{run.name} commits {walk:.2f} tokens a round{against}."


def _bar(runs: Sequence[Run], sections: Sequence[tuple[str, str]]) -> Markup:
    """Always in sight: which runs are shown, and the way to each section."""
    toggles = [
        element(
            "button",
            element("i", aria_hidden="true"),
            run.name,
            type="button",
            class_=f"r{number}",
            aria_pressed="true",
            data_run=f"r{number}",
        )
        for number, run in enumerate(runs)
    ]
    links = [element("a", title, href=f"#{name}") for name, title in sections]
    return element(
        "div", element("div", *toggles, class_="legend", role="group", aria_label="Runs shown"), element("nav", *links), class_="topbar"
    )


def _section(name: str, title: str, panels: Sequence[Markup]) -> Markup:
    return element("section", element("h2", title), element("div", *panels, class_="panels"), id=name)


def _summary(runs: Sequence[Run]) -> Markup:
    """The numbers that decide, a row a run."""
    head = ["", "walk", "95 %", "n-gram", "95 %", "live", "acc_len", "draft 1 right", "ECE", "steps", "tokens/s", "GiB"]
    rows = [
        [
            f"{run.name} · {run.method}",
            element("strong", _cell(run.number("eval/walk_acc_len"))),
            _interval(run, "eval/walk_acc_len"),
            _cell(run.number("eval/ngram_walk_acc_len")),
            _interval(run, "eval/ngram_walk_acc_len"),
            _cell(run.number("eval/live/tokens_per_round")),
            _cell(run.number("eval/acc_len")),
            _cell(run.number("eval/avg_acc")),
            _cell(run.number("eval/calibration/raw/ece")),
            f"{max((line['step'] for line in run.lines), default=0):,}",
            _cell(_median(run, "perf/tokens_per_s"), 0),
            _cell(_last(run, "perf/peak_memory_mib"), 2, 2.0**-10),
        ]
        for run in runs
    ]
    meaning = "The best checkpoint on held-out answers. Walk, n-gram, live: tokens per round, bonus token counted; tokens/s: median."
    content = table(head, rows, [f"r{number}" for number in range(len(runs))], "Summary")
    return element("figure", content, element("figcaption", meaning), class_="summary")


def _interval(run: Run, name: str) -> str:
    low, high = run.number(name + "_low"), run.number(name + "_high")
    return "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"


def _median(run: Run, name: str) -> float | None:
    values = sorted(value for _, value in run.points(name))
    return values[len(values) // 2] if values else None


def _last(run: Run, name: str) -> float | None:
    values = run.points(name)
    return values[-1][1] if values else None


def _cell(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"
