"""Whether the numbers of several runs may be held against each other."""

from collections.abc import Callable, Sequence

from specforge.report.run import Run


def incomparable(runs: Sequence[Run]) -> list[str]:
    """A sentence for each condition of a measurement in which the runs differ; what a run does not say is not held against it."""
    conditions: list[tuple[Callable[[Run], str], str]] = [
        (_target, "Different targets, so acceptance and loss do not compare"),
        (_rows, "Measured on different held-out answers, so small differences mean nothing"),
        (_drafts, "Chains of different length, of which the longer one can accept more"),
    ]
    return [f"{meaning}: {_listed(said)}." for of, meaning in conditions if len((said := _by_value(runs, of)).keys() - {""}) > 1]


def _by_value(runs: Sequence[Run], of: Callable[[Run], str]) -> dict[str, list[str]]:
    names = dict[str, list[str]]()
    for run in runs:
        names.setdefault(of(run), []).append(run.name)
    return names


def _listed(names: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} ({', '.join(of)})" for value, of in names.items() if value)


def _target(run: Run) -> str:
    """A path says nothing where files were edited or moved; the fingerprint of its files does."""
    path, fingerprint = run.target, run.fingerprint
    return f"{path}, fingerprint {fingerprint}" if fingerprint else path


def _rows(run: Run) -> str:
    samples, starts = run.number("eval/samples"), run.number("eval/starts")
    return "" if samples is None or starts is None else f"{samples:,.0f} samples with {starts:,.0f} places to draft from"


def _drafts(run: Run) -> str:
    drafts = run.number("eval/draft_tokens")
    return "" if drafts is None else f"{drafts:g} drafts"
