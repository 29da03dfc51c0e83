"""The committed experiment log: its claims can be measured again, and they are why the levers' defaults are what they are."""

import dataclasses
from collections import defaultdict

import pytest

from specforge.bench.case import Case
from specforge.bench.cases import load_case
from specforge.bench.cases.ranking import LEVERS, chosen_levers
from specforge.bench.log import PAGE, ExperimentLog, Row, page
from specforge.cli import bench
from specforge.cli.benches import case as command
from specforge.config.levers import Levers

ROWS = ExperimentLog(command.DOCS).rows()


def with_defaults(case: Case, row: Row) -> dict[str, str]:
    """A row knows nothing of levers that its case did not have yet, and they were at their defaults."""
    return {name: row.levers.get(name, lever.default) for name, lever in case.levers.items()}


@pytest.mark.parametrize("asked", sorted({row.command for row in ROWS}))
def test_a_claim_can_be_measured_again(asked: str) -> None:
    """The command beside a claim is one that this command line takes, and asks for the very configuration of the claim."""
    program, verb, *words = asked.split()
    given = bench.parse(words)
    case = load_case(given.case)
    [configuration] = command.asked_for(case, given)
    assert (program, verb) == ("specforge", "bench")
    for row in (row for row in ROWS if row.command == asked):
        assert (configuration.levers, configuration.problem) == (with_defaults(case, row), row.problem)
        assert case.digest(configuration) == row.levers_hash


def test_the_page_is_made_of_the_log() -> None:
    assert (command.DOCS / PAGE).read_text() == page(ROWS)


def test_losers_are_kept() -> None:
    assert {"reference", "faster", "slower than the reference"} <= {row.verdict for row in ROWS}


def compared(lever: str) -> list[tuple[Row, Row]]:
    """(row with the default, row that differs from it in this lever alone), of one command and problem."""
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in ROWS:
        if row.case == "ranking" and row.synchronised_ms is not None:
            runs[row.date, str(row.problem)].append(row)
    case, found = load_case("ranking"), []
    for rows in runs.values():
        changed = [{name for name, choice in with_defaults(case, row).items() if choice != case.levers[name].default} for row in rows]
        ours = [row for row, names in zip(rows, changed, strict=True) if not names]
        theirs = [row for row, names in zip(rows, changed, strict=True) if names == {lever}]
        found += [(one, other) for one in ours for other in theirs]
    return found


@pytest.mark.parametrize("lever", ["attn", "moe", "fuse_embedding", "filter_test_users", "compile"])
def test_no_other_choice_is_faster_than_the_default(lever: str) -> None:
    """By more than a tenth, in their best rounds. Levers that change an answer are not chosen by their speed."""
    pairs = compared(lever)
    assert pairs, "an experiment with the default and another choice is in the log"
    for ours, theirs in pairs:
        assert ours.minimum_ms is not None and theirs.minimum_ms is not None
        assert ours.minimum_ms <= 1.1 * theirs.minimum_ms, theirs.command


def test_the_case_has_the_defaults_and_the_reference_of_the_levers() -> None:
    case = load_case("ranking")
    default = case.checked({}, {})
    assert chosen_levers(default) == Levers()
    assert chosen_levers(case.at_reference(default)) == Levers.reference()
    words = {"attn": "loop", "dtype": "bfloat16", "keep_fp32_modules": "head", "compile": "true", "filter_test_users": "false"}
    ours = Levers(attn="loop", dtype="bfloat16", keep_fp32_modules=("head",), compile=True, filter_test_users=False)
    assert chosen_levers(case.checked(words, {})) == ours
    assert chosen_levers(case.checked({"expert_merge": "true"}, {})) == Levers(expert_merge=True)
    assert set(LEVERS) < set(dataclasses.asdict(Levers()))
