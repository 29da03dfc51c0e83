"""The run log on real files, and Weights & Biases in its offline mode."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from specforge.distributed import World
from specforge.errors import DataError
from specforge.log import RunLog, read_metrics
from tests.ranks import run_ranks


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_numbers_reach_the_file_and_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", World())
    log.write(10, {"train/loss": 2.34567, "train/samples_seen": 1_234_567, "train/accuracy": [0.5, 0.25], "perf/step_time_s": 0.25})
    log.close()
    log.close()
    assert without_time(read_metrics(tmp_path / "run" / "metrics.jsonl")) == [
        {"step": 10, "train/loss": 2.34567, "train/samples_seen": 1_234_567, "train/accuracy": [0.5, 0.25], "perf/step_time_s": 0.25}
    ]
    assert capsys.readouterr().out == "step 10  train: loss 2.346  samples_seen 1234567  accuracy [0.5 0.25]  perf: step_time_s 0.25\n"


def test_the_console_leaves_the_numbers_of_single_groups_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, World())
    log.write(0, {"eval/acc_len": 3.0, "eval/python/acc_len": 2.5, "plain": 1.5})
    log.close()
    assert capsys.readouterr().out == "step 0  eval: acc_len 3  plain 1.5\n"
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["eval/python/acc_len"] == 2.5


def test_a_line_is_in_the_file_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, World())
    log.write(1, {"train/loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    log.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, World())
    log.write(1, {"a": math.nan, "b": [1.0, math.inf]})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["a"])
    assert line["b"][0] == 1.0
    assert math.isnan(line["b"][1])


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", World(rank=1, size=2), "offline")
    log.write(1, {"loss": 1.0})
    log.note("resume", step=1)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_torn_line_is_skipped_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}]
    log = RunLog(tmp_path, World())
    log.write(2, {"loss": 2.0})
    log.close()
    assert without_time(read_metrics(path)) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2="):
        read_metrics(path)


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_resume_keeps_later_lines_and_says_so(tmp_path: Path) -> None:
    first = RunLog(tmp_path, World())
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": float(step)})
    first.close()
    second = RunLog(tmp_path, World())
    second.note("resume", step=2, checkpoint="run-step2")
    second.note("resume", step=2, checkpoint="again")
    second.write(3, {"loss": 30.0})
    second.close()

    path = tmp_path / "metrics.jsonl"
    lines = without_time(read_metrics(path))
    assert [line.get("loss") for line in lines] == [1, 2, 3, 4, None, None, 30]
    assert lines[4] == {"event": "resume", "step": 2, "checkpoint": "run-step2", "superseded_to_step": 4}
    assert lines[5] == {"event": "resume", "step": 2, "checkpoint": "again"}
    valid = [line for line in read_metrics(path, superseded=False) if "event" not in line]
    assert [(line["step"], line["loss"]) for line in valid] == [(1, 1), (2, 2), (3, 30)]


def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def session(world: World, run_id: str, step: int) -> None:
        log = RunLog(tmp_path, world, "offline", "specforge-tests", run_id, {"seed": 7})
        log.write(step, {"train/loss": 0.5 * step, "eval/per_position_acc": [0.75, 0.625]})
        log.close()

    run_ranks(session, "first", 1, world=1)
    run_ranks(session, "first", 2, world=1)
    run_ranks(session, "fork", 3, world=1)
    records = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    token = (tmp_path / "wandb_id").read_text().strip()
    assert [path.name for path in records] == [f"run-{run_id}-{token}.wandb" for run_id in ("first", "first", "fork")]
    for content in [path.read_bytes() for path in records]:
        for written in (b"train/loss", b"eval/per_position_acc/1", b"eval/per_position_acc/2", b"0.625", b"seed", b"specforge-tests"):
            assert written in content
    output = capfd.readouterr()
    assert output.err == ""
    assert [line.split("  ")[0] for line in output.out.splitlines()] == ["step 1", "step 2", "step 3"]
