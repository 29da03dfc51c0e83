"""`specforge suite --draft`: how much of what is scored a draft would have foreseen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from specforge.cli.__main__ import main
from specforge.cli.draft import read_draft
from specforge.features.target import Target
from specforge.suite.bundle import read_examples, read_tasks
from specforge.suite.prompts import Draw, chosen, write_prompts
from specforge.suite.token_cache import TokenCache
from tests.suite.bundles import write_bundle


def test_drafts_are_those_of_decoding(
    prepared: tuple[Path, list[str]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The drafter at work, begun anew before each scored token of the right rows."""
    folder = prepared[0] / "target"
    bundle = write_bundle(tmp_path / "bundle")
    words = ["--model", str(folder), "--bundle", str(bundle), "--bos", "eos", "--cache", str(tmp_path / "cache")]
    assert main(["suite", *words, "--draft", str(trained / "latest")]) == 0
    found = {task["task"]: task["draft_accepted"] for task in json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]}

    target = Target.load(folder, "float32")
    drafter = read_draft(str(trained / "latest"), folder, 1).drafter(target, None, torch.Generator())
    cache = TokenCache(tmp_path / "cache", folder, lambda: AutoTokenizer.from_pretrained(folder), "eos")
    rights = []
    for task in read_tasks(bundle):
        tokens = cache.get(task, Draw())
        assert len(write_prompts(task, chosen(read_examples(task), Draw()), Draw())) == len(tokens)
        right = []
        for example in range(len(tokens)):
            row = int(tokens.example_start_E1[example] + tokens.gold_E[example])
            ids = torch.from_numpy(tokens.row(row)).long()
            [features] = target.capture([tokens.row(row)], drafter.layer_ids)
            for start in range(max(int(tokens.scored_R[row]) - 1, 1), len(ids) - 1):
                drafter.begin([ids[: start + 1].numpy()], len(ids) + 8)
                drafter.extend(ids[None, 1 : start + 1], features["aux"][None, :start], [start])
                right.append(int(drafter.propose().ids_BK[0, 0]) == int(features["argmax"][start]))
        assert found[task.label] == pytest.approx(np.mean(right))
        rights += right
    assert 0 < np.mean(rights) < 1


def test_only_a_draft_that_learned_can_be_compared(
    prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(prepared[0] / "target"), "--bundle", str(write_bundle(tmp_path / "bundle")), "--draft", "ngram"]
    assert main(["suite", *words]) == 2
    assert "--draft ngram: learned nothing that could be compared" in capsys.readouterr().err


def test_fewer_shots_than_asked_for_are_said(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    label = read_tasks(bundle)[0].label
    words = ["--model", str(prepared[0] / "target"), "--bundle", str(bundle), "--bos", "eos", "--cache", str(tmp_path / "cache")]
    assert main(["suite", *words, "--tasks", label, "--num-shots", "20", "--max-per-task", "4"]) == 0
    line, *_, last = capsys.readouterr().out.splitlines()
    assert line.endswith("; 3 shots of 20, as there are no more examples")
    assert json.loads(last)["tasks"][0]["shots"] == 3
    assert main(["suite", *words, "--tasks", label, "--num-shots", "3", "--max-per-task", "4"]) == 0
    assert "as there are no more" not in capsys.readouterr().out
