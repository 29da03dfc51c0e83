"""`specforge bench run` from words to log."""

import json
from pathlib import Path
from typing import Any

import pytest

from specforge.bench.cases.moe import MixtureCase
from specforge.bench.log import ExperimentLog
from specforge.cli import bench
from specforge.cli.__main__ import main
from specforge.cli.benches import case as command
from specforge.cli.demo import CALM


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is as the bench wants it, so that it starts no other."""
    for name, value in CALM.items():
        monkeypatch.setenv(name, value)


def ran(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[list[str], dict[str, Any]]:
    assert main(["bench", "run", *words]) == code
    *lines, last = capsys.readouterr().out.splitlines()
    numbers: dict[str, Any] = json.loads(last)
    return lines, numbers


def test_a_sweep_is_printed_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, numbers = ran(capsys, "moe", "--sweep", "levers.moe=dense,sorted", "--rounds", "2", "--profile", "--out", str(tmp_path))
    verdicts = [(each["levers"]["moe"], each["verdict"] == "reference") for each in numbers["configurations"]]
    assert verdicts == [("loop", True), ("dense", False), ("sorted", False)]
    assert numbers["faults"] == [] and numbers["case"] == "moe"
    loop, dense, _ = numbers["configurations"]
    assert loop["synchronisations"] >= 16 and dense["synchronisations"] == 0, "the loop asks each expert which tokens are its own"
    assert any("aten::nonzero" in line for line in lines)
    logged = ExperimentLog(tmp_path).rows()
    assert [row.levers["moe"] for row in logged] == ["loop", "dense", "sorted"]
    assert all(row.synchronised_ms == row.dispatch_ms for row in logged)


def test_short_forms_are_levers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, numbers = ran(capsys, "moe", "--moe", "sorted", "--rounds", "1", "--out", str(tmp_path))
    assert numbers["configurations"][1]["levers"]["moe"] == "sorted"


def test_a_fallback_is_printed_and_strict_refuses_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["packed-attention", "--attn", "flex", "--sweep", "tokens=30", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["bench", "run", *words]) == 0
    assert "attn=auto stands in for flex: its kernel needs a CUDA device, and this is cpu." in capsys.readouterr().err
    assert main(["bench", "run", *words, "--strict"]) == 2
    assert "attn='flex': its kernel needs a CUDA device" in capsys.readouterr().err


def test_a_case_that_differs_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Tokens of width 2 are much alike: their 80 picks are of few experts, of which each has 15 places."""
    sweep = ["--sweep", "moe=capacity", "--sweep", "tokens=40", "--sweep", "width=2", "--rounds", "1", "--out", str(tmp_path)]
    lines, numbers = ran(capsys, "moe", *sweep, code=1)
    lost = numbers["configurations"][1]
    assert lost["verdict"] == "differs from the reference, not timed" and lost["quality"]["picks_without_place"] > 0
    [again] = numbers["faults"]
    assert again.startswith("specforge bench run moe --lever moe=capacity --lever dtype=float32 --sweep tokens=40 --sweep width=2 ")
    assert any("not timed" in line for line in lines)
    assert ExperimentLog(tmp_path).rows()[1].synchronised_ms is None, "what lost is logged too"


def test_a_logged_command_asks_for_its_own_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran(capsys, "moe", "--sweep", "moe=loop,dense", "--sweep", "tokens=2,3", "--rounds", "1", "--out", str(tmp_path))
    for row in ExperimentLog(tmp_path).rows():
        words = row.command.split()
        assert words[:2] == ["specforge", "bench"]
        [asked] = command.asked_for(MixtureCase(), bench.parse(words[2:]))
        assert (asked.levers, asked.problem) == (row.levers, row.problem)


def test_what_is_published_lies_in_both_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs"
    monkeypatch.setattr(command, "DOCS", docs)
    words = ["slots", "--sweep", "tokens=3", "--sweep", "rows=9", "--rounds", "1", "--out", str(tmp_path / "run"), "--publish"]
    assert main(["bench", "run", *words]) == 2
    assert "--publish" in capsys.readouterr().err and not (tmp_path / "run").exists()
    docs.mkdir()
    ran(capsys, *words)
    assert ExperimentLog(docs).rows() == ExperimentLog(tmp_path / "run").rows() != []
