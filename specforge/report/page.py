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
from specforge.report.marks import outline
from specforge.report.markup import Markup, element
from specforge.report.provenance import provenance_panels
from specforge.report.run import Run
from specforge.report.summary import summary, verdicts
from specforge.report.texts import text_panels
from specforge.report.training import speed_panels, training_panels

GENERATOR = '<meta name="generator" content="specforge report">'
"""By this a report is known; it stands among the first lines."""
_HERE = Path(__file__).parent


def page(runs: Sequence[Run]) -> str:
    """The report of up to `MOST_RUNS` runs.

    Raises:
        CheckpointError, DataError: a file of a run holds something else than it should.
    """
    runs = distinct(runs)
    style, script = (Markup((_HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    title = "specforge: " + ", ".join(run.name for run in runs)
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(GENERATOR),
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
        element("header", element("h1", "What the draft is worth"), verdicts(runs)),
        _bar(runs, [(name, title) for name, title, _ in sections]),
        element("main", summary(runs), *(_section(*section) for section in sections)),
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


def _bar(runs: Sequence[Run], sections: Sequence[tuple[str, str]]) -> Markup:
    """Always in sight: which runs are shown, and the way to each section."""
    toggles = [
        element(
            "button",
            element("svg", element("path", d=outline(number, 6.0, 6.0, 5.0), class_="dot"), viewBox="0 0 12 12", aria_hidden="true"),
            run.name,
            type="button",
            class_=f"r{number}",
            aria_pressed="true",
            data_run=number,
        )
        for number, run in enumerate(runs)
    ]
    links = [element("a", title, href=f"#{name}") for name, title in sections]
    return element(
        "div",
        element("div", *toggles, class_="legend", role="group", aria_label="Runs shown"),
        element("nav", *links, aria_label="Sections"),
        class_="topbar",
    )


def _section(name: str, title: str, panels: Sequence[Markup]) -> Markup:
    return element("section", element("h2", title), element("div", *panels, class_="panels"), id=name)
