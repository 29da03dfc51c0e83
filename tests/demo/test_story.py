"""The words at the end of the quickstart."""

import json
import os
import sys
from pathlib import Path

import pytest

from specforge.cli.demo import TARGET, closing_words

ROOT = Path(__file__).parents[2]

README = (ROOT / "README.md").read_text()


def test_the_last_words_are_those_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the numbers of its JSON line and its table, and a folder of 620 MiB, of which a link's target counts once."""
    last = json.loads(next(line for line in README.splitlines() if line.startswith('{"walk"')))
    numbers = {
        "eval/walk_acc_len": last["walk"], "eval/walk_acc_len_low": last["walk_low"], "eval/walk_acc_len_high": last["walk_high"],
        "eval/ngram_walk_acc_len": last["ngram_walk"], "eval/ngram_walk_acc_len_low": 1.76, "eval/ngram_walk_acc_len_high": 2.00,
    }  # fmt: skip
    out = Path("runs/quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    (tmp_path / "specforge").symlink_to(ROOT / "specforge")
    step = out / "run" / "demo-step600"
    step.mkdir(parents=True)
    with (step / "weights").open("wb") as file:
        os.truncate(file.fileno(), 620 * 2**20)
    (out / "run" / "best").symlink_to("demo-step600")
    (out / "run" / "other").symlink_to("demo-step600/weights")
    assert closing_words(numbers, out, tmp_path / TARGET.relative_to(ROOT)) + "\n" + json.dumps(last) in README


def test_without_a_walk_the_rest_is_said(tmp_path: Path) -> None:
    assert closing_words({}, tmp_path, TARGET).startswith(f"\nThe draft is {tmp_path / 'run' / 'best' / 'draft'}; all of")
