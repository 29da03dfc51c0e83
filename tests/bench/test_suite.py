"""The bench of the suite: what it measures, and that it tells a wrong way from a right one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge.bench import suite_peer
from specforge.bench.child import run_child
from specforge.bench.suite import Way, main, verdict
from specforge.errors import SpecForgeError
from specforge.suite.bundle import read_examples, read_tasks
from specforge.suite.evaluate import Evaluation, Manner, TaskResult
from specforge.suite.prompts import Draw
from tests.suite.bundles import write_bundle
from tests.suite.test_evaluate import make, results
from tests.texts import make_text_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_target(tmp_path_factory.mktemp("bench") / "target")


@pytest.fixture(scope="module")
def words(target: Path) -> list[str]:
    bundle = write_bundle(target.parent / "bundle")
    labels = [task.label for task in read_tasks(bundle)[:2]]
    paths = ["--model", str(target), "--bundle", str(bundle), "--cache", str(target.parent / "tokens"), "--tasks", *labels]
    return [*paths, "--bos", "eos", "--max-per-task", "8"]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return numbers


def test_every_way_agrees_and_nothing_moves_while_the_clock_runs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--batch-sizes", "3", "8", "--pieces", "64", "--ahead", "1", "2"]
    assert main([*words, *sweep]) == 0
    numbers = last_line(capsys)
    assert [way["way"] for way in numbers["ways"]] == ["exact", "batched 3", "batched 8", "tree 64", "auto 64"]
    assert all(way["copies"] == 0 and way["flips"] == [] and way["largest_difference"] < 1e-4 for way in numbers["ways"])
    assert [(first["way"], first["ahead_tasks"]) for first in numbers["first_runs"][:3]] == [("exact", 1), ("exact", 2), ("batched 3", 1)]
    assert numbers["ways"][3]["slots"] < numbers["ways"][0]["slots"] <= numbers["ways"][2]["slots"]
    assert numbers["faults"] == [] and numbers["cached_first_forward_s"] > 0


def test_a_device_without_room_is_a_fault(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--skip-first", "--modes", "tree", "--pieces", "64", "--resident-bytes", "1"]) == 1
    numbers = last_line(capsys)
    assert numbers["first_runs"] == []
    assert numbers["faults"] == [f"tree 64: {numbers['ways'][0]['copies']} copies to the device while the clock ran"]
    assert numbers["ways"][0]["copies"] > 0


def test_how_soon_a_cached_suite_begins_without_a_sweep(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--skip-first", "--modes"]) == 0
    numbers = last_line(capsys)
    assert numbers["sequential_s"] is None and numbers["ways"] == [] and numbers["cached_first_forward_s"] > 0


def scored(evaluation: Evaluation, target: Path) -> TaskResult:
    [result] = results(evaluation, target, read_tasks(target.parent / "bundle")[:1], Manner("exact"))
    return result


def test_a_way_that_errs_is_named(words: list[str], target: Path) -> None:
    result = scored(make(target), target)
    loss_R, right_E = result.answers.loss_R.copy(), result.answers.right_E.copy()
    loss_R[3] += 0.5
    right_E[[1, 2]] = ~right_E[[1, 2]]
    way = Way("crooked", Manner())
    way.compare(result, replace(result.answers, loss_R=loss_R, right_E=right_E))
    assert way.largest_difference == pytest.approx(0.5)
    label = result.task.label
    assert verdict([way], torch.float32) == [
        f"crooked: answers {label}/1, {label}/2 otherwise (2 in all)",
        "crooked: losses differ by 5.0e-01",
    ]
    assert len(verdict([way], torch.bfloat16)) == 1  # of half precision the differences are only printed
    straight = Way("straight", Manner())
    straight.compare(result, result.answers)
    assert verdict([straight], torch.float32) == []


def test_what_the_peer_says_is_compared_example_by_example() -> None:
    same = {"task": "one", "answered_otherwise": [], "largest_difference": 9e-5}
    assert suite_peer.verdict(same) == []
    assert suite_peer.verdict({**same, "largest_difference": 2e-4}) == ["one: log-probabilities differ by 2.0e-04"]
    assert suite_peer.verdict({**same, "largest_difference": np.nan}) == ["one: log-probabilities differ by nan"]
    assert suite_peer.verdict({**same, "answered_otherwise": [3]}) == ["one: lm-evaluation-harness answers examples [3] otherwise"]


def test_a_missing_peer_and_unfit_tasks_are_said(
    words: list[str], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECFORGE_PEER_VENV", str(tmp_path))
    assert main([*words, "--peer", "lm-eval"]) == 2
    assert "make it with scripts/peer.sh lm-eval" in capsys.readouterr().err
    tasks = read_tasks(target.parent / "bundle")
    schema = next(task for task in tasks if task.kind == "schema")
    with pytest.raises(SpecForgeError, match=r"is not multiple choice; choose others by --tasks"):
        suite_peer.compare(tmp_path, target, target.parent / "bundle", schema, Draw(), "float32")
    assert len(read_examples(tasks[0])) > 9
    with pytest.raises(SpecForgeError, match=r"has 9 examples; give 10 or more"):
        suite_peer.compare(tmp_path, target, target.parent / "bundle", tasks[0], Draw(9), "float32")


def test_a_child_is_measured_and_its_last_words_are_passed_on() -> None:
    """100 MiB that it fills are in its peak, and 400 of ours are not."""
    own = bytearray(b"1") * (400 * 2**20)
    child = run_child(["python3", "-c", "filled = bytearray(b'1') * (100 * 2**20); print('done')"])
    assert child.printed == "done\n" and child.cpu_s > 0 and 100 < child.peak_mib < len(own) / 2**20
    with pytest.raises(SpecForgeError, match=r"ended with 3; run it to see why. It said last:\nno such thing"):
        run_child(["sh", "-c", "echo no such thing >&2; exit 3"])
    with pytest.raises(SpecForgeError, match=r"`/nowhere` cannot be run"):
        run_child(["/nowhere"])
