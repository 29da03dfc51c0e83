"""The quickstart, as a user runs it: its last line is what the README promises."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from specforge.log.run_log import read_metrics

pytestmark = pytest.mark.long
KEYS = [
    *("walk", "walk_low", "walk_high", "ngram_walk", "acc_len", "simulated_acc_len", "core"),
    *("best_step", "resumed_from_step", "final_step", "seconds"),
]


def test_quickstart(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "quickstart.sh"
    environment = {**os.environ, "SPECFORGE_VENV": sys.prefix}
    done = subprocess.run([script, "--out", tmp_path / "run"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert list(last) == KEYS
    assert last["walk"] >= last["ngram_walk"] + 0.3
    assert last["walk_low"] <= last["walk"] <= last["walk_high"]
    assert 0 < last["resumed_from_step"] < last["final_step"]
    tasks = [json.loads(line) for line in (tmp_path / "run" / "suite" / "tasks.jsonl").read_text().splitlines()]
    assert last["core"] == pytest.approx(fmean(task["centred"] for task in tasks))
    assert all(task["slots"] < task["row_tokens"] for task in tasks if task["mode"] == "tree")
    assert 0.1 < fmean(task["draft_accepted"] for task in tasks) < 0.9
    evaluations = [line for line in read_metrics(tmp_path / "run" / "run" / "metrics.jsonl") if line.get("step") == last["best_step"]]
    best = next(line for line in evaluations if "eval/walk_acc_len" in line)
    assert best["eval/ngram_walk_acc_len_high"] < last["walk_low"], "the two intervals do not touch"
    assert best["eval/samples"] >= 200
