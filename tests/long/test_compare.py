"""`scripts/compare_methods.sh`, a few steps long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specforge.config.methods import METHODS

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_methods.sh"

pytestmark = pytest.mark.long


def call(out: Path, rows: int) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, "--out", out, "--steps", "2", "--rows", str(rows), "--seeds", "1"]
    return subprocess.run(command, env={**os.environ, "SPECFORGE_VENV": sys.prefix}, capture_output=True, text=True, check=False)


def compare(out: Path) -> tuple[str, dict[str, dict[str, float]]]:
    done = call(out, rows=40)
    assert done.returncode == 0, done.stderr[-2000:]
    *text, last = done.stdout.splitlines()
    return "\n".join(text), json.loads(last)["methods"]


def test_every_method_is_compared_and_what_was_trained_is_kept(tmp_path: Path) -> None:
    text, methods = compare(tmp_path / "methods")
    assert methods.keys() == METHODS.keys()
    sizes = [numbers["parameters"] for numbers in methods.values()]
    assert max(sizes) < 1.002 * min(sizes), "equal parameters"
    assert all(
        numbers["draft_tokens"] == 4 and 1 <= numbers["walk"] < 2 and min(numbers["draft_ms"], numbers["train_tokens_per_s"]) > 0
        for numbers in methods.values()
    )
    assert len({numbers["ngram"] for numbers in methods.values()}) == 1, "equal answers"
    assert all(f"| {name} |" in text for name in [*METHODS, "n-gram"])

    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("methods/*/metrics.jsonl")}
    _, again = compare(tmp_path / "methods")
    assert len(logs) == len(METHODS) and all(path.stat().st_mtime_ns == changed for path, changed in logs.items())
    assert [numbers["walk"] for numbers in again.values()] == [numbers["walk"] for numbers in methods.values()]

    done = call(tmp_path / "methods", rows=60)
    assert done.returncode == 2 and "'rows': 40" in done.stderr and "'rows': 60" in done.stderr and "choose another folder" in done.stderr
