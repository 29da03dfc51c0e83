"""scripts/chaos.sh, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


def test_five_kills_lose_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "chaos.sh"
    environment = {**os.environ, "SPECFORGE_VENV": sys.prefix}
    done = subprocess.run([script, "5", "--out", tmp_path / "chaos"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert list(last) == ["kills", "resumes", "lost_best", "torn", "loss_mismatches"]
    assert last["kills"] == 5 and 4 <= last["resumes"] <= 5
    assert (last["lost_best"], last["torn"], last["loss_mismatches"]) == (0, 0, 0)
