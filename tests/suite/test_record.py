"""What was scored once is known, whatever killed the run, and stays in its folder, whatever its label."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specforge.cli import compose
from specforge.cli.__main__ import main
from specforge.errors import DataError
from specforge.suite.bundle import Task
from specforge.suite.evaluate import TaskResult
from specforge.suite.record import Record
from specforge.suite.rules import answer
from specforge.suite.tokens import TaskTokens
from tests.processes import fork
from tests.suite.bundles import TASKS, write_bundle
from tests.texts import make_text_target

LABELS = [task[0] for task in TASKS]


def result(label: str, right: int = 1, baseline_pct: float = 50.0) -> TaskResult:
    """Two examples of two rows, of one scored token each but the last row, which has none; so many are right."""
    starts = np.arange(0, 9, 2)
    rows = [np.array(values, dtype=np.int32) for values in (np.zeros(8), [1, 1, 1, 2], [1, 1, 1, 2], [1] * 4, [1] * 4, [0, 2, 4])]
    gold, classes = np.array([0, 0 if right == 2 else 1], dtype=np.int32), np.zeros(1, dtype=np.int32)
    tokens = TaskTokens(rows[0], starts, rows[1], rows[2], rows[3], rows[4], rows[5], gold, classes)
    said = answer(tokens, np.array([-1.0, -3.0, -0.5]), np.array([True, False, False]))
    return TaskResult(Task(label, "multiple_choice", Path("rows.jsonl"), 0, " ", baseline_pct), "tree", tokens, said, 8, 5, 0.25)


# -- lines -------------------------------------------------------------------------------------------------------------


def test_known_is_the_same_task_in_the_same_way(tmp_path: Path) -> None:
    record = Record(tmp_path / "out")
    record.write(result("a"), {"model": "x", "dtype": "float32"})
    record.write(result("b", right=2), {"model": "x"})
    for each in (record, Record(tmp_path / "out")):
        known = each.known("a", {"dtype": "float32", "model": "x"})
        assert known is not None and (known["accuracy"], known["centred"], known["slots"]) == (0.5, 0.0, 5)
        assert each.known("a", {"model": "x"}) is None
        assert each.known("b", {"model": "x", "dtype": "float32"}) is None
        assert each.known("c", {"model": "x"}) is None


def test_the_last_one_counts(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert record.last_centred("a") is None
    record.write(result("a", right=2), {"model": "x"})
    record.write(result("a", right=1, baseline_pct=0), {"model": "y"})
    record.write(result("b", right=2), {"model": "x"})
    for each in (record, Record(tmp_path)):
        assert each.last_centred("a") == 0.5
        first = each.known("a", {"model": "x"})
        assert first is not None and first["centred"] == 1.0
    record.write(result("a", right=1), {"model": "x"})
    again = Record(tmp_path).known("a", {"model": "x"})
    assert again is not None and again["centred"] == 0.0


def test_examples_by_hand(tmp_path: Path) -> None:
    """What is not a number is null."""
    Record(tmp_path).write(result("a"), {})
    assert [json.loads(line) for line in (tmp_path / "examples" / "a.jsonl").read_text().splitlines()] == [
        {"example": 0, "gold": 0, "predicted": 0, "right": True, "margin": 2.0, "losses": [1.0, 3.0], "greedy": [True, False]},
        {"example": 1, "gold": 1, "predicted": 0, "right": False, "margin": None, "losses": [0.5, None], "greedy": [False, True]},
    ]
    [line] = (tmp_path / "tasks.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"task": "a", "mode": "tree", "examples": 2, "accuracy": 0.5, "empty_spans": 1}.items()


def test_a_torn_line_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    record, path = Record(tmp_path), tmp_path / "tasks.jsonl"
    for label in ("a", "b"):
        record.write(result(label), {})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for kept in range(len(whole)):
        path.write_bytes(whole[:kept])
        torn = Record(tmp_path)
        assert path.read_bytes() == whole[: first if kept >= first else 0]
        assert (torn.known("a", {}) is not None, torn.known("b", {})) == (kept >= first, None)
    torn.write(result("b"), {})
    assert path.read_bytes() == whole
    assert Record(tmp_path).known("b", {}) is not None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"task": "a"}', "identity is missing"),
        ('{"task": "a", "identity": 3}', "identity=3 must be of type str"),
    ],
)
def test_a_line_of_another_kind_is_refused(tmp_path: Path, line: str, said: str) -> None:
    Record(tmp_path).write(result("a"), {})
    with (tmp_path / "tasks.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=rf"tasks\.jsonl:2: {said}"):
        Record(tmp_path)


def test_strange_labels_stay_in_the_folder_and_apart(tmp_path: Path) -> None:
    labels = ["a", "a_b", "a/b", "a\\b", "a b", "../x", "..", ".", "", ".x", "x", "/etc/x", "a\0b", "a\nb", "b" * 300, "b" * 301, "é" * 90]
    labels += ["𝒜" * 90, "日本"]
    record = Record(tmp_path / "out")
    for number, label in enumerate(labels):
        record.write(result(label, right=1 + number % 2), {})
    written = sorted((tmp_path / "out" / "examples").iterdir())
    assert len(written) == len(labels)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["examples", "tasks.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(path.suffix == ".jsonl" and not path.name.startswith(".") and path.name.isascii() for path in written)
    assert {"a.jsonl", "a_b.jsonl", "x.jsonl"} <= {path.name for path in written}
    again = Record(tmp_path / "out")
    for number, label in enumerate(labels):
        known = again.known(label, {})
        assert known is not None and known["accuracy"] == (1 + number % 2) / 2


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("suite")
    target, bundle = make_text_target(folder / "target"), write_bundle(folder / "bundle")
    return ["suite", "--model", str(target), "--bundle", str(bundle), "--bos", "eos", "--cache", str(folder / "cache"), "--out"]


def lines_and_numbers(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    *lines, _, numbers = capsys.readouterr().out.splitlines()
    return lines, json.loads(numbers)


def without_times(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in task.items() if name not in ("seconds", "identity")} for task in numbers["tasks"]]


def test_a_second_run_scores_nothing(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, str(tmp_path)]) == 0
    lines, numbers = lines_and_numbers(capsys)
    assert [line.split()[0] for line in lines] == [task["task"] for task in numbers["tasks"]] == LABELS
    assert not any("(kept)" in line for line in lines)
    written = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.jsonl")}
    assert sorted(path.stem for path in written) == sorted([*LABELS, "tasks"])

    assert main([*words, str(tmp_path)]) == 0
    again, same = lines_and_numbers(capsys)
    assert again == [f"{line}  (kept)" for line in lines]
    assert (same["core"], without_times(same)) == (numbers["core"], without_times(numbers))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.jsonl")} == written

    assert main([*words, str(tmp_path), "--tasks", "strange", "letters", "--rule", "sum"]) == 0
    other, _ = lines_and_numbers(capsys)
    assert [line.split()[0] for line in other] == ["letters", "strange"] and not any("(kept)" in line for line in other)
    assert all(any(arrow in line for arrow in "↑↓=") for line in other), "compared with the last time"


@pytest.mark.parametrize("torn", [False, True], ids=["between lines", "within a line"])
def test_a_killed_run_goes_on_with_what_is_missing(
    words: list[str], tmp_path: Path, torn: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, done = Record.write, list[str]()

    def write_three(record: Record, result: TaskResult, identity: dict[str, Any]) -> None:
        if len(done) == 3:
            if torn:
                with (tmp_path / "tasks.jsonl").open("a") as file:
                    file.write('{"task": "str')
            os.kill(os.getpid(), signal.SIGKILL)
        write(record, result, identity)
        done.append(result.task.label)

    def run() -> None:
        monkeypatch.setattr(compose, "set_threads", lambda world: None)  # a fork has no thread pool
        monkeypatch.setattr(Record, "write", write_three)
        main([*words, str(tmp_path)])

    victim = fork(run)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert main([*words, str(tmp_path)]) == 0
    lines, numbers = lines_and_numbers(capsys)
    assert [line.split()[0] for line in lines if "(kept)" in line] == LABELS[:3]
    assert [line.split()[0] for line in lines if "(kept)" not in line] == LABELS[3:]
    assert [json.loads(line)["task"] for line in (tmp_path / "tasks.jsonl").read_text().splitlines()] == LABELS
    assert main([*words, str(tmp_path / "uninterrupted")]) == 0
    assert without_times(lines_and_numbers(capsys)[1]) == without_times(numbers)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--num-shots", "-1"], 2, "--num-shots -1: must be at least 0"),
        (["--batch", "0"], 2, "--batch 0: must be at least 1"),
        (["--max-per-task", "-1"], 2, "--max-per-task -1: must be at least 0"),
        (["--tasks", "nothing"], 2, "--tasks nothing: "),
        (["--max-length", "4"], 3, "tokens are scored and the model reads 4"),
        (["--bos", "bos"], 3, "--bos bos: the tokenizer has no BOS token"),
    ],
)
def test_what_cannot_be_scored_is_said(
    words: list[str], tmp_path: Path, more: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, str(tmp_path), *more]) == code
    out, err = capsys.readouterr()
    assert said in err and "CORE" not in out


def test_data_that_is_missing_is_said(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "eval_data" / "words" / "letters.jsonl").unlink()
    assert main([*words, str(tmp_path / "out"), "--bundle", str(bundle)]) == 3
    assert "letters.jsonl: there is no such file; task 'letters' needs it" in capsys.readouterr().err
