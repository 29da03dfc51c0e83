"""The log of experiments: a JSONL file that is only appended to, one row a configuration, and the Markdown page made from all of it.

What lost is logged like what won. Each row names the command by which that one configuration is measured again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from specforge import files
from specforge.errors import DataError

LARGEST_MIB = 256
LOG, PAGE = "experiments.jsonl", "experiments.md"


@dataclass(frozen=True)
class Row:
    case: str
    levers: dict[str, str]
    levers_hash: str
    problem: dict[str, Any]
    command: str
    commit: str | None
    """With a `+` where files of the package differed from it; None: not in a repository."""
    date: str
    """UTC; one for all rows of a command."""
    host: str
    machine: str
    torch: str
    threads: int
    clock: str
    rounds: int
    difference: float | None
    """Largest to the reference, relative; None: not finite."""
    tolerance: float
    dispatch_ms: float | None
    """Median, as the following; None: not timed, since the outputs differ."""
    synchronised_ms: float | None
    minimum_ms: float | None
    spread: float | None
    """Middle half of the rounds over the median."""
    times_faster: float | None
    """Than the reference, by synchronised medians."""
    synchronisations: int | None
    """Of one call; None: not profiled."""
    quality: dict[str, float | None]
    """None: not finite."""
    score: float | None
    score_name: str | None
    verdict: str


class ExperimentLog:
    """`experiments.jsonl` and `experiments.md` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, rows: Sequence[Row]) -> None:
        """Both files; the page is replaced in one step."""
        with files.writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a") as file:
                file.write("".join(files.json_line(asdict(row)) + "\n" for row in rows))
            files.write_text(self.folder / PAGE, page(self.rows()))

    def rows(self) -> list[Row]:
        """
        Raises:
            DataError: a line is not a row of this log.
        """
        path = self.folder / LOG
        lines = files.read_bytes(path, DataError, LARGEST_MIB).decode().splitlines() if path.exists() else []
        return [_row(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def page(rows: Iterable[Row]) -> str:
    """Newest first; one table a command, one line a configuration."""
    parts = [
        "# Experiments",
        f"Made from `{LOG}` beside this page; do not edit. Times are medians in milliseconds with both clocks, of which only the "
        "synchronised one is scored; `x` is how many times faster than the reference of the same run; the difference is the largest to the "
        "reference's outputs, relative to the largest of them. What differs by more than the tolerance is not timed.",
    ]
    for (_, case), group in reversed([(key, list(group)) for key, group in groupby(rows, lambda row: (row.date, row.case))]):
        parts.append(_section(case, group))
    return "\n\n".join(parts) + "\n"


def _section(case: str, rows: Sequence[Row]) -> str:
    first = rows[0]
    swept = [key for key in first.levers if len({row.levers[key] for row in rows}) > 1]
    fixed = {key: value for key, value in first.levers.items() if key not in swept}
    varied = [key for key in first.problem if len({row.problem[key] for row in rows}) > 1]
    given = " ".join(f"{key}={value}" for key, value in {**first.problem, **fixed}.items() if key not in varied)
    about = (
        f"{first.machine}, torch {first.torch}, {first.threads} threads, {first.clock}, {first.rounds} rounds, "
        f"commit {first.commit or 'unknown'}, host {first.host}.\n\nIn all lines: {given}"
    )
    names = list(dict.fromkeys(name for row in rows for name in row.quality))
    head = [*varied, *swept, "dispatch", "synchronised", "minimum", "spread", "x", "waits", "difference", "tolerance", *names]
    head += ["score" if first.score_name is None else f"score {first.score_name}", "verdict", "command"]
    lines = [head, ["---"] * len(head), *(_cells(row, varied, swept, names) for row in rows)]
    return f"## {case}, {first.date}\n\n{about}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row, varied: Sequence[str], swept: Sequence[str], names: Sequence[str]) -> list[str]:
    times = [row.dispatch_ms, row.synchronised_ms, row.minimum_ms]
    return [
        *(str(row.problem[key]) for key in varied),
        *(row.levers[key] for key in swept),
        *(_number(x, "{:.3f}") for x in times),
        _number(row.spread, "{:.0%}"), _number(row.times_faster, "{:.2f}"), _number(row.synchronisations, "{}"),
        "not finite" if row.difference is None else f"{row.difference:.1e}", f"{row.tolerance:.0e}",
        *(_number(row.quality.get(name), "{:.5g}") for name in names),
        _number(row.score, "{:.2f}"), row.verdict, f"`{row.command}`",
    ]  # fmt: skip


def _number(x: float | None, form: str) -> str:
    return "" if x is None else form.format(x)


def _row(line: str, where: str) -> Row:
    names = [field.name for field in fields(Row)]
    try:
        values: Any = files.parse_json(line.encode())
    except ValueError as error:
        raise DataError(f"{where}={line[:40]!r}: must be a JSON object; restore the file, or delete the line.") from error
    if not isinstance(values, Mapping) or sorted(values) != sorted(names):
        raise DataError(f"{where}: must have the fields {', '.join(names)}; restore the file, or delete the line.")
    return Row(**values)
