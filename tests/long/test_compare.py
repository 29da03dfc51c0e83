"""`scripts/compare_methods.sh`, a few steps long."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from specforge.config.methods import METHODS

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_methods.sh"

pytestmark = pytest.mark.long


def start(out: Path, rows: int) -> "subprocess.Popen[str]":
    command = [SCRIPT, "--out", out, "--steps", "2", "--rows", str(rows), "--seeds", "1"]
    environment = {**os.environ, "SPECFORGE_VENV": sys.prefix}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def compare(out: Path, rows: int) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    with start(out, rows) as process:
        text, errors = process.communicate()
    return process.returncode, text, errors


def test_every_method_is_compared_and_what_was_trained_before_a_kill_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "methods"
    with start(out, rows=40) as process:
        assert process.stdout is not None
        trained, walk = process.stdout.readline().split(": walk ")
        os.killpg(process.pid, signal.SIGKILL)
    log = (out / trained / "metrics.jsonl").read_bytes()

    code, text, errors = compare(out, rows=40)
    assert code == 0, errors[-2000:]
    assert f"{trained}:" not in text and (out / trained / "metrics.jsonl").read_bytes() == log
    methods = json.loads(text.splitlines()[-1])["methods"]
    assert methods[trained.removesuffix("-0")]["walk"] == pytest.approx(float(walk), abs=5e-4)
    assert methods.keys() == METHODS.keys()
    sizes = [numbers["parameters"] for numbers in methods.values()]
    assert max(sizes) < 1.002 * min(sizes), "equal parameters"
    assert all(
        numbers["draft_tokens"] == 4 and 1 <= numbers["walk"] < 2 and min(numbers["draft_ms"], numbers["train_tokens_per_s"]) > 0
        for numbers in methods.values()
    )
    assert len({numbers["ngram"] for numbers in methods.values()}) == 1, "equal answers"
    assert all(f"| {name} |" in text for name in [*METHODS, "n-gram"])

    code, _, errors = compare(out, rows=60)
    assert code == 2 and "'rows': 40" in errors and "'rows': 60" in errors and "choose another folder" in errors
