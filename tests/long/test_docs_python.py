"""The Python of README and docs: each block is a program of its own, run where the files that it names exist, made small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specforge.cli.__main__ import main
from specforge.ranking.world import ClickWorld
from tests.doc_pages import PAGES, ROOT, Block, blocks
from tests.texts import make_text_target, write_rows

pytestmark = pytest.mark.long
PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds README's `my.yaml` with a tiny target and its rows, and what the commands of `docs/ranking.md` leave, of few users."""
    folder = tmp_path_factory.mktemp("python")
    target = make_text_target(folder / "target")
    write_rows(folder / "train.jsonl", 120)
    [configuration] = [block.text for block in blocks(ROOT / "README.md") if block.language == "yaml"]
    small = configuration.replace("/models/my-target", str(target)).replace("32000", "64").replace("batch_samples: 64", "batch_samples: 8")
    (folder / "my.yaml").write_text(small)
    of_clicks, ranking = ClickWorld(), folder / "runs" / "ranking"
    settings = [f"output_dir={ranking / 'synthetic'}", "train.steps=1"]
    for name, seed, users in (("train", 0, 48), ("eval", 1, 200)):
        path = ranking / "world" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        of_clicks.draw(users, seed).save(path, name)
        settings.append(f"data.{name}_path={path}")
    assert main(["train", str(ROOT / "configs" / "ranking" / "synthetic.yaml"), *settings]) == 0
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_a_block_of_python_runs(block: Block, folder: Path) -> None:
    done = python(folder, "-W", "error", "-c", block.text)
    assert done.returncode == 0, f"{block.text}\n{done.stderr[-3000:]}"


def test_python_that_fails_is_noticed(folder: Path) -> None:
    done = python(folder, "-c", 'from specforge.config import load_config\nload_config("your.yaml")')
    assert done.returncode == 1
    assert "ConfigError" in done.stderr
