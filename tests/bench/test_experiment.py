"""Configurations are what was asked for; one that differs from its reference is named and not timed; the rest is scored and logged."""

import json
import math
from pathlib import Path

import pytest
import torch

from specforge.bench.case import Configuration, available, largest_difference
from specforge.bench.cases import CASES, load_case
from specforge.bench.experiment import measure, rows
from specforge.bench.log import LOG, PAGE, ExperimentLog, Row
from specforge.bench.score import SCORES
from specforge.bench.sweep import configurations, with_references
from specforge.errors import ConfigError, DataError
from tests.bench.small_case import SumCase

CPU = torch.device("cpu")


def test_sweeps_go_over_one_another() -> None:
    asked = configurations(SumCase(), ["chunk=4"], ["levers.way=loop,product", "tokens=2,3"])
    assert [(each.levers["way"], each.levers["chunk"], each.problem["tokens"]) for each in asked] == [
        ("loop", "4", 2), ("loop", "4", 3), ("product", "4", 2), ("product", "4", 3),
    ]  # fmt: skip
    assert {each.problem["scale"] for each in asked} == {1.0}
    assert [str(each) for each in configurations(SumCase(), [], [])] == ["tokens=16 scale=1.0 way=product chunk=8"]
    assert len(configurations(SumCase(), [], ["way=product,product"])) == 1


def test_each_problem_has_its_reference_first_and_once() -> None:
    case = SumCase()
    found = with_references(case, configurations(case, [], ["way=product,loop", "chunk=1,8", "tokens=2,3"]))
    ways = [(each.problem["tokens"], each.levers["way"], each.levers["chunk"]) for each in found]
    assert ways[:4] == [(2, "loop", "1"), (2, "product", "1"), (3, "loop", "1"), (3, "product", "1")]
    assert len(ways) == len(set(ways)) == 8


@pytest.mark.parametrize(
    ("levers", "sweeps", "said"),
    [
        (["wey=loop"], [], "--lever wey=loop: must set one of way, chunk"),
        (["way=loop,product"], [], "use --sweep"),
        ([], ["size=3"], "size: case 'sum' has no such key; its levers are way, chunk, and its problem tokens, scale."),
        ([], ["way=fast"], "way='fast': must be one of loop, product, kernel."),
        ([], ["chunk=-1"], "chunk='-1': must be a whole number from 0 on."),
        ([], ["tokens=2.5"], "tokens='2.5': must be a whole number."),
        ([], ["tokens"], "--sweep tokens: must be key=value."),
        (["way=loop"], ["levers.way=product"], "way is set already"),
    ],
)
def test_what_no_case_has_is_refused(levers: list[str], sweeps: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configurations(SumCase(), levers, sweeps)
    assert said in str(refused.value)


def test_a_lever_that_the_device_lacks_falls_back_with_a_reason() -> None:
    [asked] = configurations(SumCase(), ["way=kernel"], [])
    taken, reasons = available(SumCase(), asked, CPU, strict=False)
    assert taken.levers == {"way": "product", "chunk": "8"} and taken.problem == asked.problem
    assert reasons == ["way=product stands in for kernel: there is no such kernel."]
    with pytest.raises(ConfigError, match=r"way='kernel': there is no such kernel; use way=product, or leave out --strict"):
        available(SumCase(), asked, CPU, strict=True)


def measured_rows(case: SumCase, sweeps: list[str], score: str | None = None) -> list[Row]:
    spec = SCORES[score] if score else None
    asked = with_references(case, configurations(case, [], sweeps))
    return rows(case, measure(case, asked, 2, CPU, spec), 2, CPU, spec)


def test_a_way_that_differs_is_not_timed() -> None:
    case = SumCase(error=1e-3)
    slow, fast = measured_rows(case, [])
    assert slow.verdict == "reference" and slow.synchronised_ms is not None and slow.times_faster == 1.0
    assert fast.verdict == "differs from the reference, not timed" and fast.difference == pytest.approx(1e-3, rel=1e-3)
    assert (fast.synchronised_ms, fast.dispatch_ms, fast.times_faster, fast.score) == (None, None, None, None)
    assert sum("product" in run for run in case.runs) == 1, "once for the comparison"


def test_ways_that_agree_are_timed_and_scored() -> None:
    slow, fast = measured_rows(SumCase(), [], "contest")
    assert fast.difference == 0.0 and fast.synchronised_ms is not None
    assert fast.times_faster == pytest.approx(slow.synchronised_ms / fast.synchronised_ms)
    expected = SCORES["contest"].score(fast.synchronised_ms / 1e3, 1.0, {"auc": 0.75, "pcoc": 1.0})
    assert fast.score == pytest.approx(expected) and fast.score_name == "contest"
    with pytest.raises(ConfigError, match="needs acc_len, draft_tokens"):
        measured_rows(SumCase(), [], "draft")


def test_a_row_is_held_against_the_reference_of_its_own_problem() -> None:
    found = measured_rows(SumCase(), ["tokens=4,16"])
    assert [row.verdict == "reference" for row in found] == [True, False, True, False]
    assert [row.difference for row in found] == [0.0] * 4
    assert found[0].levers_hash == found[2].levers_hash != found[1].levers_hash


def test_differences() -> None:
    one = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([10])}
    assert largest_difference(one, one) == 0.0
    assert largest_difference({**one, "a": torch.tensor([1.0, -4.2])}, one) == pytest.approx(0.05)
    assert largest_difference({**one, "b": torch.tensor([11])}, one) == pytest.approx(0.1)
    assert largest_difference({"a": one["a"]}, one) == largest_difference({**one, "a": torch.ones(3)}, one) == math.inf
    assert largest_difference({**one, "a": torch.tensor([1.0, math.nan])}, one) == math.inf
    assert largest_difference({**one, "b": torch.tensor([1])}, {**one, "b": torch.tensor([0])}) > 1e30, "0 was expected: no rounding"
    empty = {"a": torch.empty(0, 3)}
    assert largest_difference(empty, empty) == 0.0


def test_a_log_comes_back_and_is_added_to(tmp_path: Path) -> None:
    log = ExperimentLog(tmp_path / "new" / "folder")
    assert log.rows() == []
    first, second = measured_rows(SumCase(error=1e-3), ["tokens=4,16"], "contest"), measured_rows(SumCase(error=math.inf), [])
    log.append(first)
    log.append(second)
    again = ExperimentLog(log.folder).rows()
    assert again == [*first, *second]
    assert again[-1].difference is None and json.loads((log.folder / LOG).read_text().splitlines()[-1])["difference"] is None


def test_the_page_has_a_line_for_each_configuration_with_its_command(tmp_path: Path) -> None:
    found = measured_rows(SumCase(error=1e-3), ["tokens=4,16"])
    ExperimentLog(tmp_path).append(found)
    page = (tmp_path / PAGE).read_text()
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    head, body = lines[0], lines[2:]
    assert head[:3] == ["| tokens", "way", "chunk"]
    assert [line[:2] for line in body] == [["| 4", "loop"], ["| 4", "product"], ["| 16", "loop"], ["| 16", "product"]]
    assert [line[-1].strip("| `") for line in body] == [row.command for row in found]
    assert [line[-2] for line in body] == ["reference", "differs from the reference, not timed"] * 2
    assert found[1].command == "specforge bench run sum --lever way=product --lever chunk=8 --sweep tokens=4 --rounds 2"
    assert "In all lines: scale=1.0\n" in page


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    log = ExperimentLog(tmp_path)
    log.append(measured_rows(SumCase(), []))
    with (tmp_path / LOG).open("a") as file:
        file.write('{"case": "sum"}\n')
    with pytest.raises(DataError, match=r"experiments.jsonl line 3: must have the fields case, levers"):
        log.rows()


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_a_reference_and_a_default_that_it_knows(name: str) -> None:
    case = load_case(name)
    assert case.name == name
    [default] = configurations(case, [], [])
    for configuration in (default, case.at_reference(default)):
        assert case.checked(configuration.levers, {key: str(value) for key, value in configuration.problem.items()}) == configuration
        assert available(case, configuration, CPU, strict=True) == (configuration, [])


SMALL = {
    "packed-attention": ["documents=5", "tokens=40", "attn=auto,loop,padded,bucket", "dtype=float32,bfloat16"],
    "moe": ["tokens=1,9", "width=8", "inner=8", "moe=auto,sorted,dense,grouped"],
    "slots": ["tokens=5", "rows=50"],
    "draft-step": ["tokens=24", "documents=2", "method=eagle3,dflash", "loss_chunk_rows=0,7"],
    "decode-round": ["texts=2", "new_tokens=6", "drafter=ngram,eagle3"],
    "suite": ["examples=6", "mode=batched,tree,auto"],
    "ranking": [
        "users=30", "mean_rows=6", "attn=loop,bucket", "moe=sorted,dense", "filter_test_users=false,true", "batch_rows=40,4000",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ways_of_every_case_agree(name: str) -> None:
    case = load_case(name)
    asked = with_references(case, configurations(case, [], SMALL[name]))
    measured = measure(case, asked, 0, CPU)
    assert [str(each.configuration) for each in measured if each.times is None] == []
    assert len({str(Configuration({}, each.configuration.problem)) for each in measured}) == (2 if name in ("moe", "draft-step") else 1)
