"""`scripts/train.sbatch` as far as it can be held without Slurm; tests/long/test_sbatch.py runs it."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sbatch"


@pytest.mark.parametrize("checker", ["bash -n", "shellcheck"])
def test_the_script_is_sound(checker: str) -> None:
    command = [*checker.split(), str(SCRIPT)]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    subprocess.run(command, check=True)


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", SCRIPT, "RUN"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")
