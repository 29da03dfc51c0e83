"""A ranking run as the command line makes it: the same at one rank and two, resumed as if never stopped, its best remembered."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from specforge.cli.__main__ import main
from specforge.cli.ranking import build_ranking_controller, evaluate_ranking_checkpoint
from specforge.config import RankingConfig, load_ranking_config
from specforge.distributed import World
from specforge.errors import CheckpointError, ConfigError
from specforge.log.run_log import read_metrics
from specforge.ranking.load import load_ranking_model
from specforge.training.run_folder import find_checkpoints, resolve
from tests.ranking.files_of_rows import random_lines, write
from tests.ranks import run_ranks

SHAPE = "task: ranking\nmodel: {slots: 3, rows: 64, slot_width: 6, width: 16, layers: 2, heads: 4, inner: 24, experts: 4}\n"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.csv`, `eval.csv` and `c.yaml`."""
    folder = tmp_path_factory.mktemp("rows")
    write(folder, *random_lines(24, 1, scored_share=0.8), name="train.csv")
    write(folder, *random_lines(40, 2, scored_share=0.9), name="eval.csv")
    (folder / "c.yaml").write_text(SHAPE)
    return folder


def words_of(rows: Path, run: Path, *more: str) -> list[str]:
    return [
        f"data.train_path={rows / 'train.csv'}", f"data.eval_path={rows / 'eval.csv'}", f"data.cache_dir={rows / 'cache'}",
        f"output_dir={run}", "train.steps=6", "train.batch_samples=8", "train.learning_rate=1e-2", "train.micro_batch_tokens=24",
        "train.log_every=1", "train.eval_every=2", "train.save_every=2", "checkpoint.keep=0", *more,
    ]  # fmt: skip


def config_of(rows: Path, run: Path, *more: str) -> RankingConfig:
    return load_ranking_config(rows / "c.yaml", words_of(rows, run, *more))


def train(world: World, config: RankingConfig) -> dict[str, torch.Tensor]:
    """Every parameter and moment at the end, whole."""
    controller = build_ranking_controller(config, world)
    controller.fit()
    tensors = {**controller.backend.draft_state(), **controller.backend.optimizer_state()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def numbers(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run / "metrics.jsonl", superseded=False) if name in line]


@pytest.mark.parametrize("size", [1, 2])
def test_resumed_equals_uninterrupted(size: int, rows: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = run_ranks(train, config_of(rows, whole), world=size)
    shutil.copytree(whole, cut, symlinks=True)
    for checkpoint in find_checkpoints(cut):
        if checkpoint.step > 4:
            shutil.rmtree(checkpoint.path)
    found = run_ranks(train, config_of(rows, cut, f"train.resume_from={cut / 'latest'}"), world=size)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("train/loss", "eval/auc", "eval/avg_loss"):
        assert numbers(cut, name) == numbers(whole, name)


def test_two_ranks_learn_what_one_learns(rows: Path, tmp_path: Path) -> None:
    """Without the balance loss, which is that of a micro-batch, and those of one rank and of two differ."""
    runs = [run_ranks(train, config_of(rows, tmp_path / str(size), "model.balance_weight=0"), world=size)[0] for size in (1, 2)]
    flat = [torch.cat([tensors[name].double().flatten() for name in sorted(tensors)]) for tensors in runs]
    assert (flat[0] - flat[1]).norm() / flat[0].norm() < 1e-5
    for name in ("train/loss", "train/grad_norm", "eval/auc", "eval/pcoc", "eval/avg_loss"):
        assert numbers(tmp_path / "1", name) == pytest.approx(numbers(tmp_path / "2", name), rel=1e-4)


def test_the_balance_loss_counts_and_is_that_of_micro_batches(rows: Path, tmp_path: Path) -> None:
    """Of the same micro-batches, which one rank takes one after the other, it is the same at two."""
    losses = {}
    for weight, budget, sizes in ((0.0, 2000, (1,)), (0.1, 2000, (1,)), (0.1, 24, (1, 2))):
        for size in sizes:
            run = tmp_path / f"{weight}-{budget}-{size}"
            run_ranks(
                train,
                config_of(rows, run, f"model.balance_weight={weight}", f"train.micro_batch_tokens={budget}", "train.steps=1"),
                world=size,
            )
            losses[weight, budget, size] = numbers(run, "train/loss")[0]
    assert losses[0.1, 2000, 1] > losses[0.0, 2000, 1] + 0.001
    assert losses[0.1, 24, 1] > losses[0.1, 2000, 1], "fewer rows are less even"
    assert losses[0.1, 24, 2] == pytest.approx(losses[0.1, 24, 1], abs=0.01)


def test_the_best_checkpoint_is_the_one_of_the_largest_auc(rows: Path, tmp_path: Path) -> None:
    train(World(), config_of(rows, tmp_path, "train.eval_every=1", "train.steps=4"))
    scores = numbers(tmp_path, "eval/auc")
    meta = json.loads((tmp_path / "best_meta.json").read_text())
    assert (meta["metric"], meta["score"], meta["step"]) == ("eval/auc", max(scores), scores.index(max(scores)))
    assert resolve(tmp_path / "best").step == meta["step"]


@pytest.mark.parametrize("size", [1, 2])
def test_command_line_trains_evaluates_and_calibrates(size: int, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of any number of ranks; the loaded model predicts what the evaluation measured, its logits shifted."""
    run_ranks(train, config_of(rows, tmp_path), world=size)
    words = [str(rows / "c.yaml"), *words_of(rows, tmp_path), "--checkpoint", str(tmp_path / "latest")]
    assert main(["eval", *words, "--calibrate"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r".*eval\.csv: \d+ rows of \d+ users; left out: .+\.", line) for line in printed)
    found = json.loads(printed[-1])
    assert found["eval/auc"] == numbers(tmp_path, "eval/auc")[-1]
    assert found["eval/calibration/shifted/gauc"] == found["eval/calibration/raw/gauc"], "the order of a user's rows stays"

    config = config_of(rows, tmp_path)
    loaded = load_ranking_model(tmp_path / "latest", config.levers)
    assert loaded.shift == found["eval/calibration/shift"] != 0
    assert evaluate_ranking_checkpoint(config, tmp_path / "latest", World())["eval/pcoc"] == found["eval/pcoc"]


def test_main_trains_what_the_file_is_about(rows: Path, tmp_path: Path) -> None:
    assert main(["train", str(rows / "c.yaml"), *words_of(rows, tmp_path, "train.steps=2")]) == 0
    assert resolve(tmp_path / "latest").step == 2
    assert load_ranking_config(tmp_path / "config.yaml") == config_of(rows, tmp_path, "train.steps=2")


def test_what_cannot_go_on_is_refused(rows: Path, tmp_path: Path) -> None:
    train(World(), config_of(rows, tmp_path, "train.steps=2"))
    resume = f"train.resume_from={tmp_path / 'latest'}"
    with pytest.raises(CheckpointError, match="signid_mode: checkpoint 'modulo', now 'clamp'"):
        build_ranking_controller(config_of(rows, tmp_path, resume, "levers.signid_mode=clamp"), World())
    with pytest.raises(ConfigError, match=r"signid_mode='clamp'.*trained with 'modulo'.*set signid_mode='modulo'"):
        build_ranking_controller(config_of(rows, tmp_path, resume, "levers.signid_mode=clamp", "train.allow_config_change=true"), World())
    with pytest.raises(CheckpointError, match=r"its model has inner=24, wanted is 8; set model\.inner=24"):
        build_ranking_controller(config_of(rows, tmp_path, resume, "model.inner=8", "train.allow_config_change=true"), World())
    with pytest.raises(CheckpointError, match="holds a run already"):
        build_ranking_controller(config_of(rows, tmp_path), World())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("levers.expert_merge=true", r"levers\.expert_merge=True: is for a model that is trained already"),
        ("levers.dtype=bfloat16", r"levers\.dtype='bfloat16': is for a model that is trained already"),
        ("levers.merge_threshold=1.5", r"merge_threshold=1\.5: must lie in \(0, 1\]"),
        ("model.heads=3", r"model\.heads=3: must divide model\.width=16"),
        ("model.top_k=5", r"model\.top_k=5: must be at most model\.experts=4"),
        ("model.experts=1", r"model\.experts=1: must be at least 2"),
        ("levers.attn=fast", r"levers\.attn"),
        ("task=racing", r"task='racing': there is no such task"),
    ],
)
def test_a_wrong_setting_is_named(word: str, said: str, rows: Path, tmp_path: Path) -> None:
    from specforge.config import load_task

    with pytest.raises(ConfigError, match=said):
        load_task(rows / "c.yaml", words_of(rows, tmp_path, word))


def test_another_seed_is_another_model(rows: Path, tmp_path: Path) -> None:
    """Negative control of the resume test: the bits do depend on what is drawn."""
    one, other = (train(World(), config_of(rows, tmp_path / seed, f"seed={seed}", "train.steps=1")) for seed in "01")
    assert any(not torch.equal(one[name], other[name]) for name in one)
