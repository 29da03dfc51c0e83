"""`specforge bench run CASE`: ways to do one thing, each held against the plain one and timed beside it."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import specforge
from specforge import files
from specforge.bench.case import Case, Configuration, available
from specforge.bench.cases import CASES, load_case
from specforge.bench.experiment import Measured, measure, rows
from specforge.bench.log import PAGE, ExperimentLog, Row
from specforge.bench.score import SCORES
from specforge.bench.sweep import configurations, with_references
from specforge.distributed import World
from specforge.errors import ConfigError

SHORT_FORMS = ("attn", "moe", "compile")
DOCS = Path(specforge.__file__).parents[1] / "docs"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", choices=CASES, help="; ".join(f"{name}: {about}" for name, (_, about) in CASES.items()))
    parser.add_argument("--lever", action="append", default=[], metavar="NAME=CHOICE", help="set a lever, for all that is measured")
    for name in SHORT_FORMS:
        parser.add_argument(f"--{name}", metavar="CHOICE", help=f"--lever {name}=CHOICE")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B",
        help="measure each value of levers.NAME, or of a key of the problem; several sweeps go over one another",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=30, help="how often each configuration is timed, by turns (default 30)")
    parser.add_argument("--profile", action="store_true", help="the slowest operators of each, and how often it waits for the device")
    parser.add_argument("--score", choices=SCORES, help="weigh time and quality")
    parser.add_argument("--strict", action="store_true", help="refuse a lever that this device lacks, instead of falling back")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the experiment log (default runs/bench)")
    parser.add_argument("--publish", action="store_true", help="log the experiment in this repository's docs too")


def run(given: argparse.Namespace) -> int:
    if given.publish and not DOCS.is_dir():
        raise ConfigError(f"--publish: {DOCS} is no folder; run it from a clone of the repository.")
    case, device = load_case(given.case), World.join().device
    asked = [_available(case, each, device, given.strict) for each in asked_for(case, given)]
    spec = SCORES[given.score] if given.score else None
    measured = measure(case, with_references(case, asked), given.rounds, device, spec, given.profile)
    found = rows(case, measured, given.rounds, device, spec)
    _say(measured, found)
    for folder in (given.out, *([DOCS] if given.publish else [])):
        ExperimentLog(folder).append(found)
    differing = [row.command for row in found if row.synchronised_ms is None]
    print(files.json_line(_numbers(case, found, given.out) | {"faults": differing}))
    return 1 if differing else 0


def asked_for(case: Case, given: argparse.Namespace) -> list[Configuration]:
    short = [f"{name}={getattr(given, name)}" for name in SHORT_FORMS if getattr(given, name)]
    return configurations(case, [*given.lever, *short], given.sweep)


def _available(case: Case, asked: Configuration, device: Any, strict: bool) -> Configuration:
    configuration, reasons = available(case, asked, device, strict)
    for reason in reasons:
        print(reason, file=sys.stderr, flush=True)
    return configuration


def _say(measured: Sequence[Measured], found: Sequence[Row]) -> None:
    longest = max(len(str(each.configuration)) for each in measured)
    print(f"{'':<{longest}}{'dispatch ms':>13}{'synchronised':>14}{'minimum':>10}{'spread':>8}{'x':>8}{'difference':>12}  verdict")
    for each, row in zip(measured, found, strict=True):
        print(f"{each.configuration!s:<{longest}}{_times(row)}{each.difference:>12.1e}  {row.verdict}{_good(row)}")
    for each in measured:
        if each.profile is not None:
            print(f"\n{each.configuration}\n{each.profile.table()}")


def _times(row: Row) -> str:
    if row.dispatch_ms is None:
        return f"{'-':>13}{'-':>14}{'-':>10}{'-':>8}{'-':>8}"
    return f"{row.dispatch_ms:>13.3f}{row.synchronised_ms:>14.3f}{row.minimum_ms:>10.3f}{row.spread:>8.0%}{row.times_faster:>8.2f}"


def _good(row: Row) -> str:
    words = [f"{name} {value:.4g}" for name, value in row.quality.items() if value is not None]
    return "".join(f", {word}" for word in [*words, *([f"score {row.score:.2f}"] if row.score is not None else [])])


def _numbers(case: Case, found: Sequence[Row], out: Path) -> dict[str, Any]:
    of_run = ("case", "command", "commit", "date", "host", "machine", "torch", "threads", "clock", "rounds", "score_name")
    return {
        "case": case.name,
        "clock": found[0].clock,
        "commit": found[0].commit,
        "page": str(out / PAGE),
        "configurations": [{name: value for name, value in asdict(row).items() if name not in of_run} for row in found],
    }
