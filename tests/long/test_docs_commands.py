"""The commands of README and docs, as a reader types them: page by page, README first, in a folder in which a small quickstart has been.

What a block takes long for, and the machines and models that are the reader's own, are made smaller by the mark above it; the words
around it, and what one command leaves for the next, are real.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from specforge.config import dump_config, load_config
from specforge.demo.bundle import write_bundle
from specforge.demo.rows import split_answers
from tests.doc_pages import PAGES, ROOT, Block, blocks

pytestmark = pytest.mark.long
RUN = [block for page in PAGES for block in blocks(page) if block.is_run]


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Bash in `folder`, with the programs of this environment first."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SPECFORGE_VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the quickstart has left its rows, its configuration and its run, all of them small, beside what readers bring."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "scripts", "specforge", "tests"):
        (folder / name).symlink_to(ROOT / name)
    quickstart = folder / "runs" / "quickstart"
    quickstart.mkdir(parents=True)
    settings = ["output_dir=runs/quickstart/run", "run_id=demo", "train.steps=8", "train.batch_samples=8", "train.save_every=4"]
    (quickstart / "train.yaml").write_text(dump_config(load_config(ROOT / "configs" / "eagle3-embedded.yaml", settings)))
    answers = "runs/quickstart/answers.jsonl"
    made = shell(
        "python -m specforge.demo.rows --train 120 --heldout 40 runs/quickstart/prompts.jsonl\n"
        "specforge prepare runs/quickstart/train.yaml data.train_path=runs/quickstart/prompts.jsonl"
        f" --regenerate {answers} --max-new-tokens 24\n",
        folder,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    split_answers(folder / answers)
    trained = shell("specforge train runs/quickstart/train.yaml", folder)
    assert trained.returncode == 0, trained.stderr[-3000:]
    bring(folder)
    return folder


def bring(folder: Path) -> None:
    """What the pages suppose a reader to have: prompts, rows, a suite, the configuration of README for them, and what takes minutes to
    make, the token streams of the target's recipe."""
    quickstart = folder / "runs" / "quickstart"
    for rows, name in ((quickstart / "prompts.jsonl", "prompts.jsonl"), (quickstart / "heldout.jsonl", "heldout.jsonl")):
        (folder / name).write_text("".join(rows.read_text().splitlines(keepends=True)[:16]))
    write_bundle(folder / "eval_bundle", 12)
    streams = folder / "runs" / "target" / "streams.npz"
    streams.parent.mkdir()
    np.savez(streams, **{name: np.random.default_rng(0).integers(4000, size=20_000, dtype=np.uint16) for name in ("sources", "chats")})
    (folder / "my.yaml").write_text(next(block.text for block in blocks(ROOT / "README.md") if block.language == "yaml"))
    smaller = [
        "model.target_path=specforge/demo/target", "data.eval_path=heldout.jsonl", "data.max_length=128", "train.batch_samples=8",
        "train.micro_batch_tokens=256", "train.eval_every=2", "train.save_every=2", "method.options.draft_tokens=3",
        "method.options.draft_vocab_size=512",
    ]  # fmt: skip
    (folder / "my.yaml").write_text(dump_config(load_config(folder / "my.yaml", smaller)))


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.place)
def test_commands(block: Block, checkout: Path) -> None:
    if "peer.sh" in block.text and os.environ.get("SPECFORGE_OFFLINE"):
        pytest.skip("SPECFORGE_OFFLINE is set; unset it to have other projects' programs installed from PyPI")
    lines = block.text
    for old, new in block.smaller.items():
        lines = re.sub(rf"(?<!\S){re.escape(old)}(?!\S)", new, lines)
    done = shell(lines, checkout)
    assert done.returncode == 0, f"{lines}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_a_command_that_fails_is_noticed(checkout: Path) -> None:
    done = shell("specforge export --check runs/quickstart\ntrue", checkout)
    assert done.returncode == 6
