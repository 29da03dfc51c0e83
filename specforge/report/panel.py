"""The card around a chart: what it is, what it means, and what to do where a run lacks it."""

import math
from collections.abc import Sequence

from specforge.report.markup import Child, Markup, element, join

EVALUATE = "specforge eval RUN/config.yaml --checkpoint RUN/best"


def panel(title: str, content: Markup, meaning: Child, key: str = "") -> Markup:
    return element(
        "figure", element("h3", title), content, element("p", key, class_="key") if key else None, element("figcaption", meaning),
    )  # fmt: skip


def missing(title: str, why: str, command: str) -> Markup:
    """A panel of a number that was never measured, and the command that measures it."""
    return element(
        "figure", element("h3", title), element("p", why, " Measure it with ", element("code", command), class_="missing"), class_="absent"
    )


def cell(value: float | None, digits: int = 3) -> str:
    """A number of a table; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Child]], row_classes: Sequence[str] = ()) -> Markup:
    """The first column names the rows; the others are right-aligned numbers. On a phone the table scrolls in its own frame."""
    cells = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]), class_=classes or None)
        for row, classes in zip(rows, row_classes or [""] * len(rows), strict=True)
    ]
    top = element("thead", element("tr", *(element("th", word, scope="col") for word in head)))
    inner = element("table", element("caption", caption), top, element("tbody", *cells))
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def tabs(name: str, label: str, panes: Sequence[tuple[str, Markup]]) -> Markup:
    """Panes of which one is seen; all of them where scripts do not run, and on paper."""
    if len(panes) == 1:
        return panes[0][1]
    buttons = [
        element(
            "button", title, type="button", role="tab", id=f"{name}-tab-{number}", aria_controls=f"{name}-{number}",
            aria_selected="true" if number == 0 else "false",
        )
        for number, (title, _) in enumerate(panes)
    ]  # fmt: skip
    bodies = [
        element("div", content, role="tabpanel", id=f"{name}-{number}", aria_labelledby=f"{name}-tab-{number}", data_title=title)
        for number, (title, content) in enumerate(panes)
    ]
    return element("div", element("div", *buttons, role="tablist", aria_label=label), join(*bodies), class_="tabs")
