"""A prepared folder that runs of the command line share."""

from pathlib import Path

import pytest

from specforge.cli.__main__ import main
from specforge.cli.compose import build_controller
from specforge.config import load_config
from specforge.distributed import World
from tests.texts import make_text_target, write_rows


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with target, regenerated answers and evaluation answers; and the settings that use them."""
    folder = tmp_path_factory.mktemp("prepared")
    target = make_text_target(folder / "target")
    settings = [f"model.target_path={target}", f"output_dir={folder / 'unused'}", "data.max_length=64", "train.micro_batch_tokens=128"]
    (folder / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 3, draft_vocab_size: 100}}\n")
    for split, count in (("train", 24), ("heldout", 6)):
        prompts = write_rows(folder / f"{split}-prompts.jsonl", count)
        words = [str(folder / "c.yaml"), *settings, f"data.train_path={prompts}", "--regenerate", str(folder / f"{split}.jsonl")]
        assert main(["prepare", *words, "--max-new-tokens", "12"]) == 0
    settings += [f"data.train_path={folder / 'train.jsonl'}", f"data.eval_path={folder / 'heldout.jsonl'}"]
    settings += ["train.batch_samples=4", "train.learning_rate=1e-2", "train.log_every=1", "eval.bootstrap=20"]
    return folder, settings


@pytest.fixture(scope="session")
def trained(prepared: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose draft is right about one time in six; its checkpoint is `run-step40`."""
    folder, settings = prepared
    run = tmp_path_factory.mktemp("trained") / "run"
    build_controller(load_config(folder / "c.yaml", [*settings, f"output_dir={run}", "train.steps=40"]), World()).fit()
    return run
