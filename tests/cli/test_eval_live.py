"""`specforge eval --live` and `--simulate`: the predicted number and the decoded one side by side, equal, at any number of ranks."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specforge.cli.__main__ import main
from specforge.cli.compose import evaluate_checkpoint
from specforge.config import load_config
from specforge.config.methods import METHODS
from specforge.decode.tree import TreeShape
from specforge.distributed import World
from specforge.features.target import Target
from specforge.log.run_log import read_metrics
from tests.ranks import run_ranks

TREES = ("3x1x3", "3x2x6", "2x3x5")
OWN = ("target_loads", "target_forwards", "cache_s")
"""What an evaluation says of its process."""


def no_number(word: str) -> float:
    raise AssertionError(f"{word} is not JSON")


def evaluated(capsys: pytest.CaptureFixture[str], run: Path, *words: object) -> tuple[str, dict[str, Any]]:
    """(all but the last line of stdout, the object of the last line)."""
    assert main(["eval", str(run / "config.yaml"), "--checkpoint", str(run / "latest"), *map(str, words)]) == 0
    text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return text, json.loads(last, parse_constant=no_number)


def test_the_walk_is_what_decoding_shows(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, numbers = evaluated(capsys, trained, "--live", 6, "--simulate", *TREES)
    live = {name.removeprefix("eval/live/"): value for name, value in numbers.items() if name.startswith("eval/live/")}
    assert live["predicted_tokens_per_round"] == live["tokens_per_round"] == numbers["eval/walk_acc_len"] > 1.05
    assert (live["samples"], live["answers"], live["same_answers"]) == (6, 6, 6)
    assert live["tokens"] == numbers["eval/starts"], "every token of an answer but its first"
    assert live["rounds"] == sum(live["histogram"]) and live["tokens_per_round"] == live["tokens"] / live["rounds"]
    accepted = sum(count * rounds for count, rounds in enumerate(live["histogram"]))
    assert accepted <= live["tokens"] - (live["rounds"] - 6), "a round adds a token to its drafts, the last one of an answer perhaps not"
    printed = re.search(r"predicted ([\d.]+), decoded ([\d.]+) \((\d+) tokens in (\d+) rounds\)", text)
    assert printed is not None and printed[1] == printed[2] == f"{live['tokens_per_round']:.6f}"
    assert [int(printed[3]), int(printed[4])] == [live["tokens"], live["rounds"]]

    trees = numbers["eval/trees"]
    assert list(trees) == list(TREES)
    assert trees["3x1x3"] == live["tokens_per_round"], "one beam is the chain"
    assert trees["3x2x6"] > trees["3x1x3"]
    assert f"{trees['3x2x6']:.3f} tokens per round" in text
    lengths = numbers["eval/walk_acc_len_by_draft_tokens"]
    assert lengths[-1] == numbers["eval/walk_acc_len"] and lengths == sorted(lengths)
    assert "tokens per round by drafts of a chain: " + ", ".join(f"{k}: {x:.3f}" for k, x in enumerate(lengths, 1)) in text


def test_shorter_chains_and_fewer_samples(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every length that one pass predicts is what decoding with that length shows; the walk beside it is over the same samples."""
    _, whole = evaluated(capsys, trained, "--live", 5)
    live = {name: whole[f"eval/live/{name}"] for name in ("samples", "tokens_per_round", "predicted_tokens_per_round")}
    assert (live["samples"], whole["eval/samples"]) == (5, 6)
    assert live["predicted_tokens_per_round"] == live["tokens_per_round"] != whole["eval/walk_acc_len"]
    for draft_tokens in (1, 2):
        _, numbers = evaluated(capsys, trained, "--live", 100, f"eval.draft_tokens={draft_tokens}")
        assert numbers["eval/live/samples"] == 6, "there are no more"
        assert numbers["eval/live/tokens_per_round"] == whole["eval/walk_acc_len_by_draft_tokens"][draft_tokens - 1]


def evaluate(world: World, run: Path, live: int, *settings: str) -> dict[str, Any]:
    config, trees = load_config(run / "config.yaml", settings), [TreeShape.parse(tree) for tree in TREES]
    numbers = evaluate_checkpoint(config, run / "latest", world, live=live, trees=trees)
    return {name: value for name, value in numbers.items() if name not in OWN}


@pytest.mark.parametrize(
    ("live", "settings"), [(5, ()), (1, ("eval.max_samples=1", "eval.bootstrap=0"))], ids=["all", "a rank without samples"]
)
def test_two_ranks_say_what_one_says(live: int, settings: tuple[str, ...], trained: Path) -> None:
    """To the last bit what counts drafts; what sums losses and confidences, as far as the order of sums allows."""
    alone, *pair = [*run_ranks(evaluate, trained, live, *settings, world=1), *run_ranks(evaluate, trained, live, *settings, world=2)]
    assert alone["eval/live/tokens_per_round"] == alone["eval/live/predicted_tokens_per_round"]
    for numbers in pair:
        assert numbers.keys() == alone.keys()
        for name, value in alone.items():
            if name == "eval/avg_loss" or name.startswith("eval/calibration/"):
                assert numbers[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
            else:
                assert numbers[name] == value, name


def test_numbers_that_nobody_can_know_are_null_and_a_dash(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sample is in one half: either nothing fits, or nothing is measured, so that no ranking exists."""
    text, numbers = evaluated(capsys, trained, "eval.max_samples=1", "eval.bootstrap=0")
    unknown = [name for name, value in numbers.items() if value is None or (isinstance(value, list) and None in value)]
    assert "eval/calibration/raw/per_position_auc" in unknown
    assert all(name.startswith("eval/calibration/") for name in unknown)
    assert "nan" not in text and re.search(r"raw, draft 3 +-", text)
    for line in (trained / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_number)
    assert len(read_metrics(trained / "metrics.jsonl")) > 40


def test_what_cannot_be_decoded_is_refused_at_once(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(trained / "config.yaml"), "--checkpoint", str(trained / "latest")]
    for more, said in (
        (["--live", "-1"], "--live -1: must not be negative"),
        (["--simulate", "3x2x6", "3x2"], "tree '3x2': must be three numbers"),
        (["--simulate", "3x2x11"], "nodes between depth and the 10 candidates"),
        (["--simulate", "2x101x150"], "the draft knows 100 tokens"),
        (["--live", "2", "eval.draft_tokens=4"], "the draft was trained for 3"),
    ):
        assert main([*words, *more]) == 2
        out, err = capsys.readouterr()
        assert said in err and not out


def test_a_method_that_drafts_chains_alone(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who drafts trees is said by the registry; no command knows a method by its name."""
    monkeypatch.setitem(METHODS, "eagle3", replace(METHODS["eagle3"], tree_drafter=""))
    target = load_config(trained / "config.yaml").model.target_path
    for words in (
        ["eval", trained / "config.yaml", "--checkpoint", trained / "latest", "--simulate", "3x2x6"],
        ["generate", "--target", target, "--draft", trained / "latest", "--prompt", "a", "--tree", "3x2x6"],
    ):
        loads = Target.loads
        assert main([str(word) for word in words]) == 2
        assert Target.loads == loads, "refused before any work"
        out, err = capsys.readouterr()
        assert "drafts chains alone; leave --tree and --simulate out" in err and not out
